"""Where a training step's time goes: data, student, target, backward, optimizer, EMA, logging; and a one-step sample.

    python benchmarks/step.py --cfg benchmarks/cpu.yml --random 3x32 [section.key=value ...] [--out FILE.json]

Runs the trainer's own loop, steps that save and sample left out. On a GPU the clock is the device's. Operations are
counted by torch.utils.flop_counter in eager mode, and compared with a large matrix product on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Split, flops, machine, matmul_peak, peak_memory, random_images, save, seconds

import config
import networks
from sampling import drawing
from training import trainer

SECTIONS = ("data", "student forward", "target forward", "backward", "optimizer", "EMA", "logging", "rest")
NOT_THE_MODEL = ("data", "optimizer", "EMA", "logging")


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE")
    parser.add_argument("--random", metavar="CxR", help="images of noise instead of the config's data, as 3x32")
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--brief", action="store_true", help="neither the matmul peak nor samples")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = measure(args.cfg, args.overrides, args.random, args.steps, args.warmup, args.brief)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(result))
    if args.out:
        save(result, args.out)
    return 0


def measure(
    path: str, overrides: list[str], random: str | None, steps: int, warmup: int, brief: bool = False
) -> dict[str, Any]:
    """The figures of one config."""
    with tempfile.TemporaryDirectory() as folder:
        total = steps + warmup
        quiet = ["sample.every=0", "metrics.every=0", "metrics.at_end=false", "train.lr_warmup=0"]
        quiet += [f"train.steps={total}", f"train.save_every={total}", f"run.dir={folder}/run", "train.init_from=null"]
        cfg = config.load(path, [*overrides, *quiet])
        if random:
            trainer.data.load = lambda _: random_images(random)
        run = trainer.Trainer(cfg)
        run.cfg.train.log_every = min(cfg.train.log_every, steps)
        run.open_folder()
        sections, operations = timed_loop(run, steps, warmup)
        run.close()
    step = sum(sections.values())
    batch = run.local_batch
    result = {
        "what": f"{cfg.objective.name}, {cfg.network.name}, {run.shape['channels']}x{run.shape['resolution']}"
        f"x{run.shape['resolution']}, batch {batch}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "batch": batch,
        "resolution": run.shape["resolution"],
        "width": cfg.network.model_channels,
        "microbatch": run.microbatch,
        "precision": run.precision,
        "compile": cfg.train.compile,
        "seconds": step,
        "images_per_second": batch / step,
        "sections": sections,
        "not_the_model": sum(sections[name] for name in NOT_THE_MODEL) / step,
        "peak_memory": peak_memory(run.device),
        "flops_per_image": operations / batch,
        "machine": machine(run.device),
    }
    if not brief:
        peak = matmul_peak(run.device, run.precision)
        result |= {"matmul_peak": peak, "share_of_peak": operations / step / peak}
        result["samples"] = [sample(run, autocast, peak) for autocast in dict.fromkeys([None, run.model.autocast])]
    return result


def timed_loop(run: trainer.Trainer, steps: int, warmup: int) -> tuple[dict[str, float], int]:
    """Seconds of each section per step, and the operations of a step."""
    split, seen, counted = Split(run.device), 0, 0
    train_step, batches, backward = run.train_step, trainer.data.batches, torch.Tensor.backward

    def timed_batches(*args: Any) -> Any:
        source = batches(*args)
        while True:
            with split.section("data"):
                batch = next(source)
            yield batch

    def counted_step(*batch: Any) -> None:
        nonlocal seen, counted
        if seen == warmup:
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            split.start()
        if seen == 0:
            counted = flops(lambda: train_step(*batch))
        else:
            train_step(*batch)
        seen += 1

    sections: dict[str, float] = {}
    run.train_step = counted_step
    run.save = lambda: sections.update(split.totals())  # the loop's end
    run.write_grid = run.say_next = lambda: None
    for module in [run.model, *run.objective.modules()]:
        if isinstance(module, networks.Preconditioner):
            split.wrap(module, "raw", lambda: "student forward" if torch.is_grad_enabled() else "target forward")
    split.wrap(run, "prepare", "data")
    split.wrap(run, "update", "optimizer")
    split.wrap(run, "add_to_log", "logging")
    split.wrap(run, "write_log", "logging")
    for ema in run.emas:
        split.wrap(ema, "update", "EMA")
    if hasattr(run.objective, "after_step"):
        split.wrap(run.objective, "after_step", "EMA")
    split.wrap(torch.Tensor, "backward", "backward")
    trainer.data.batches = timed_batches
    try:
        run.loop()
    finally:
        torch.Tensor.backward, trainer.data.batches = backward, batches
    return {name: sections.get(name, 0.0) / steps for name in SECTIONS}, counted


def sample(run: trainer.Trainer, autocast: torch.dtype | None, peak: float) -> dict[str, Any]:
    """One-step samples from the average: in float32, as generate.py draws them, or in the step's own arithmetic."""
    model, count = run.emas[0].module, run.local_batch
    labels = torch.zeros(count, dtype=torch.int64) if run.shape["label_dim"] else None
    model.autocast = autocast

    def draw() -> None:
        list(drawing.generate(model, 0, range(count), [run.cfg.network.sigma_max], labels=labels, batch_size=count))

    operations = flops(draw)
    took = statistics.median(seconds(draw, run.device) for _ in range(3))
    model.autocast = None
    return {
        "precision": "fp32" if autocast is None and run.precision != "fp64" else run.precision,
        "images_per_second": count / took,
        "flops_per_image": operations / count,
        "share_of_peak": operations / took / peak,
    }


def table(r: dict[str, Any]) -> str:
    """For people."""
    m = r["machine"]
    lines = [
        f"{r['what']}, {r['parameters'] / 1e6:.2f}M parameters, {r['precision']}, compile {r['compile']}",
        f"{m['hardware']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, {m['date']}",
        "",
        f"step             {r['seconds'] * 1e3:10.1f} ms   {r['images_per_second']:,.1f} images/s",
    ]
    for name, took in r["sections"].items():
        lines.append(f"  {name:15}{took * 1e3:10.1f} ms   {took / r['seconds']:6.1%}")
    lines += [
        f"not the model    {r['not_the_model']:10.1%}      data, optimizer, EMA, logging",
        f"peak memory      {r['peak_memory'] / 2**30:10.2f} GiB",
        f"operations       {r['flops_per_image'] / 1e9:10.2f} GFLOP an image and step",
    ]
    if "matmul_peak" in r:
        peak = f"{r['matmul_peak'] / 1e12:10.3f} TFLOP/s in {r['precision']}"
        lines.append(f"matmul peak      {peak}; the step runs at {r['share_of_peak']:.1%} of it")
    for s in r.get("samples", []):
        share = f"{s['share_of_peak']:.1%} of the same peak"
        lines.append(f"one-step samples {s['images_per_second']:10.1f} images/s in {s['precision']}, {share}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
