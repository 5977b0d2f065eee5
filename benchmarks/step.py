"""Where a training step's time goes: data, student, target, backward, optimizer, EMA, logging; and a one-step sample.

    python benchmarks/step.py --cfg benchmarks/cpu.yml --random 3x32 [section.key=value ...] [--out FILE.json]
    python benchmarks/step.py --cfg configs/cifar10_ect.yml --random 3x32 --stage 15 train.batch_size=512

Runs the trainer's own loop from step --at-step on, or from the first of a method's stage; steps that save and sample
are left out. On a GPU the clock is the device's. Operations are counted as training counts them (training/speed.py),
and compared with a large matrix product on the same machine.
"""

import argparse
import bisect
import copy
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Split, flops, machine, matmul_peak, peak_memory, random_images, save, seconds

import config
import networks
from sampling import drawing, plan
from training import diagnose, trainer

SECTIONS = ("data", "student forward", "target forward", "backward", "optimizer", "EMA", "logging", "rest")
NOT_THE_MODEL = ("data", "optimizer", "EMA", "logging")


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE")
    parser.add_argument("--random", metavar="CxR", help="images of noise instead of the config's data, as 3x32")
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--at-step", type=int, default=0, metavar="K", help="steps of the run that are taken as done")
    place.add_argument("--stage", type=int, metavar="A", help="instead: as many as come before stage A (ect)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--brief", action="store_true", help="neither the matmul peak nor samples")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = measure(args)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(result))
    if args.out:
        save(result, args.out)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one config."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["sample.every=0", "metrics.every=0", "metrics.at_end=false", "train.lr_warmup=0"]
        cfg = config.load(args.cfg, [*args.overrides, *quiet, f"run.dir={folder}/run", "train.init_from=null"])
        if args.random:
            trainer.data.load = lambda _: random_images(args.random)
            if getattr(cfg.objective, "teacher", None):  # of fresh weights, which are as much work
                cfg.objective.teacher = None
                trainer.load_teacher = lambda _, model: copy.deepcopy(model).eval().requires_grad_(False)
        run = trainer.Trainer(cfg)
        step = run.train_step
        step.step = step.logged = args.at_step if args.stage is None else first_of(args.stage, step.objective)
        if cfg.train.microbatch == "auto" and run.device.type == "cuda":  # the loop asks at the first step alone
            diagnose.find_microbatch(step, run.dataset.read)
        cfg.train.steps = max(cfg.train.steps, step.step + args.warmup + args.steps)
        cfg.train.save_every, cfg.train.log_every = cfg.train.steps, min(cfg.train.log_every, args.steps)
        sections, operations = timed_loop(run, args.steps, args.warmup)
    took, batch, shape = sum(sections.values()), step.local_batch, step.codec.network_shape
    stage = {} if args.stage is None else {"stage": args.stage}
    size = f"{shape['channels']}x{shape['resolution']}x{shape['resolution']}"
    result = {
        "what": f"{cfg.objective.name}{''.join(f' at stage {a}' for a in stage.values())}, {cfg.network.name}, {size}, "
        f"batch {batch}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        **stage,
        "batch": batch,
        "resolution": shape["resolution"],
        "width": cfg.network.model_channels,
        "microbatch": step.microbatch,
        "precision": step.precision,
        "compile": cfg.train.compile,
        "seconds": took,
        "images_per_second": batch / took,
        "sections": sections,
        "not_the_model": sum(sections[name] for name in NOT_THE_MODEL) / took,
        "peak_memory": peak_memory(run.device),
        "flops_per_image": operations,
        "machine": machine(run.device),
    }
    if not args.brief:
        peak = matmul_peak(run.device, step.precision, 1.0)
        result |= {"matmul_peak": peak, "share_of_peak": operations * batch / took / peak}
        result["samples"] = [sample(step, autocast, peak) for autocast in dict.fromkeys([None, step.model.autocast])]
    return result


def first_of(stage: int, objective: torch.nn.Module) -> int:
    """The first step of a method's stage."""
    at = getattr(objective, "stage", None)
    step = bisect.bisect_left(range(10**9), stage, key=at) if at else 10**9
    if step == 10**9 or at(step) != stage:
        raise config.ConfigError(f"--stage {stage}: this run's method has no such stage")
    return step


def timed_loop(run: trainer.Trainer, steps: int, warmup: int) -> tuple[dict[str, float], float]:
    """Seconds of each section per step, and the operations of a step for an image."""
    split, operations = Split(run.device), [0.0]
    step, batches, backward = run.train_step, trainer.data.batches, torch.Tensor.backward

    def timed_batches(*args: Any) -> Any:
        source = batches(*args)
        for seen in itertools.count():
            run.stopping = seen == warmup + steps  # the loop reads a batch ahead: it ends, and saves, without this one
            with split.section("data"):
                batch = next(source)
            if seen == warmup:
                operations[0] = run.speed.flops_per_image(*batch)
                run.speed.bound = lambda *_: None  # it would be timed
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(run.device)
                split.start()
            yield batch

    sections: dict[str, float] = {}
    run.save = lambda: sections.update(split.totals())
    run.folder.next_command = lambda *_: "measured"
    for module in [step.model, *step.objective.modules()]:
        if isinstance(module, networks.Preconditioner):
            split.wrap(module, "raw", lambda: "student forward" if torch.is_grad_enabled() else "target forward")
            split.wrap(module, "jvp", "target forward")
    split.wrap(step, "prepare", "data")
    split.wrap(step, "update", "optimizer")
    split.wrap(step, "add_to_log", "logging")
    split.wrap(run, "write_log", "logging")
    for ema in step.emas:
        split.wrap(ema, "update", "EMA")
    if hasattr(step.objective, "after_step"):
        split.wrap(step.objective, "after_step", "EMA")
    split.wrap(torch.Tensor, "backward", "backward")
    trainer.data.batches = timed_batches
    try:
        with run.opened():
            run.loop()
    finally:
        torch.Tensor.backward, trainer.data.batches = backward, batches
    return {name: sections.get(name, 0.0) / steps for name in SECTIONS}, operations[0]


def sample(step: Any, autocast: torch.dtype | None, peak: float) -> dict[str, Any]:
    """One-step samples from the average: in float32, as generate.py draws them, or in the step's own arithmetic."""
    model, count = step.emas[0].module, step.local_batch
    given = torch.zeros(count, dtype=torch.int64) if step.model.label_dim else None
    model.autocast = autocast
    highest, solver = [plan.highest_level(step.cfg)], "multistep" if plan.clock(step.cfg) == "sigma" else "jumps"

    def draw(count: int = count) -> None:
        own = None if given is None else given[:count]
        list(drawing.generate(model, 0, range(count), highest, solver, given=own, batch_size=count))

    operations = flops(lambda: draw(1))
    took = statistics.median(seconds(draw, step.device) for _ in range(3))
    model.autocast = None
    return {
        "precision": "fp32" if autocast is None and step.precision != "fp64" else step.precision,
        "images_per_second": count / took,
        "flops_per_image": operations,
        "share_of_peak": operations * count / took / peak,
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
        lines[3] += f", MFU {r['share_of_peak']:.1%}"
        peak = f"{r['matmul_peak'] / 1e12:10.3f} TFLOP/s in {r['precision']}"
        lines.append(f"matmul peak      {peak}; the step runs at {r['share_of_peak']:.1%} of it")
    for s in r.get("samples", []):
        share = f"{s['share_of_peak']:.1%} of the same peak"
        lines.append(f"one-step samples {s['images_per_second']:10.1f} images/s in {s['precision']}, {share}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
