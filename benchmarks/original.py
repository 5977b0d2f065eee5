"""A training step of an original code and ours in turn, in one process: images/s, their ratio, MFU, peak memory.

    python benchmarks/original.py ect PATH --cfg configs/cifar10_ect.yml --stage 15 [section.key=value ...] [--out FILE]
    python benchmarks/original.py edm PATH --cfg configs/cifar10_edm.yml
    python benchmarks/original.py py-meanflow PATH --cfg configs/cifar10_meanflow.yml

PATH is a checkout (originals.py says of what, and what of it runs). Widths, dropout, rate, augmentation and batch are
the config's for both sides; batches of noise are on the device already. A side whose memory does not hold the batch
takes it in parts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import flops, machine, matmul_peak, peak_memory, random_images, save, seconds
from originals import CODES, Original
from step import first_of

import config
from training import diagnose, trainer
from training.devices import set_arithmetic


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", choices=tuple(CODES), help="whose")
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout of it")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="of the same method, with a song_unet")
    parser.add_argument("--random", metavar="CxR", default="3x32", help="channels and pixels of the images, of noise")
    parser.add_argument("--stage", type=int, help="ECT's")
    parser.add_argument("--tf32", action="store_true", help="let the original use TF32, which it does not by itself")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn, after one that is not timed")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, folder)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for side in ("ours", "theirs"):
        r = result[side]
        print(
            f"{side:7} {r['images_per_second']:10,.1f} images/s, {r['precision']}, {r['microbatch']} a pass, MFU "
            f"{r['share_of_peak']:.1%} of {r['matmul_peak'] / 1e12:.3g} TFLOP/s, peak memory "
            f"{r['peak_memory'] / 2**30:.2f} GiB, compiled: {r['compiled']}"
        )
    print(f"{result['what']}: ours is {result['ratio']:.2f} times as fast")
    if args.out:
        save(result, args.out)
    return 0


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Both sides' figures."""
    cfg = config.load(args.cfg, [*args.overrides, f"run.dir={folder}/run", "train.init_from=null"])
    trainer.data.load = lambda _: random_images(args.random, max(cfg.train.batch_size, 2))
    run = trainer.Trainer(cfg)
    ours, batch, device = run.train_step, cfg.train.batch_size, run.device
    if args.stage is not None:
        ours.step = first_of(args.stage, ours.objective)
    images = run.dataset.images[:batch].to(device)
    if cfg.train.microbatch == "auto" and device.type == "cuda":
        diagnose.find_microbatch(ours, lambda rows: (images[rows], None))
    theirs = CODES[args.code](args.path, cfg, run.dataset.shape[:2], device, args.stage or 0)
    theirs.tf32 |= args.tf32
    sides = {"ours": lambda: ours(images, None), "theirs": lambda: theirs.step(images.float() / 127.5 - 1)}
    tf32 = {"ours": cfg.train.tf32, "theirs": theirs.tf32}
    set_arithmetic(theirs.tf32)
    find_parts(theirs, sides["theirs"], batch)
    took: dict[str, list[float]] = {name: [] for name in sides}
    memory = {}
    for _ in range(args.rounds):
        for name, step in sides.items():
            set_arithmetic(tf32[name])
            took[name].append(turn(step, args.steps, device))
            memory[name] = peak_memory(device)
    result = {
        "what": f"{args.code}{'' if args.stage is None else f' at stage {args.stage}'}, {args.random}, batch {batch}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "stage": args.stage,
        "batch": batch,
        "ratio": statistics.median(b / a for a, b in zip(took["ours"], took["theirs"], strict=True)),
        "machine": machine(device),
    }
    set_arithmetic(theirs.tf32)
    few = min(batch, 8)
    operations = {
        "ours": run.speed.flops_per_image(images, None),
        "theirs": flops(lambda: theirs.loss(images[:few].float() / 127.5 - 1).backward()) / few,
    }
    how = {"ours": ours.precision, "theirs": "fp32"}
    for name in sides:
        peak, middle = matmul_peak(device, how[name], 1.0), statistics.median(took[name])
        result[name] = {
            "precision": "tf32" if tf32[name] and how[name] == "fp32" else how[name],
            "compiled": theirs.compiled if name == "theirs" else cfg.train.compile,
            "microbatch": ours.microbatch if name == "ours" else theirs.microbatch or batch,
            "seconds": middle,
            "images_per_second": batch / middle,
            "peak_memory": memory[name],
            "flops_per_image": operations[name],
            "matmul_peak": peak,
            "share_of_peak": operations[name] * batch / middle / peak,
        }
    return result


def find_parts(theirs: Original, step: Callable[[], Any], batch: int) -> None:
    """Halve what it takes in a pass until its step fits; where its code does not compile, go on without."""
    while True:
        try:
            return step() and None
        except torch.OutOfMemoryError:
            theirs.microbatch = (theirs.microbatch or batch) // 2
            if not theirs.microbatch:
                raise config.ConfigError("the original has no memory here for one image a pass") from None
        except Exception as error:
            if not theirs.compiled:
                raise
            print(f"the original does not compile here, and runs eager: {str(error)[:300]}", file=sys.stderr)
            del theirs.backward  # the class's own again
            theirs.compiled = False
        torch._dynamo.reset()
        theirs.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def turn(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds a step; the other side's memory is free, and the peak counts from here."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return seconds(lambda: [step() for _ in range(steps)], device) / steps


if __name__ == "__main__":
    sys.exit(main())
