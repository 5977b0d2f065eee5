"""Does the loop wait for images? A folder of 32-pixel PNGs, decoded as they are read.

    python benchmarks/loading.py [--workers 2] [--batch 512] [--speed 4660] [--out FILE.json]

Prints how many images a second the workers give, and how long a loop waits that takes `speed` images a second: 4,660
is the bound of an H200 (790 TFLOP/s in bf16) for the published CIFAR-10 network's consistency step.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, random_images, save
from PIL import Image

import config
import data


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--speed", type=float, default=4660, help="images a second that the loop takes")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(random_images("3x32", 4096).images):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(f"{folder}/{i}.png")
        dataset = data.load(config.Data(name="folder", path=folder, memory_gb=0.0))
        indices, start = list(range(2048)), time.process_time()
        dataset.files.read(indices)
        cost = (time.process_time() - start) / len(indices)
        with contextlib.closing(data.batches(dataset, 0, args.batch, workers=args.workers)) as batches:
            next(batches)
            alone = took(batches, 0.0, args.seconds, args.batch)[0]
            _, waited = took(batches, args.batch / args.speed, args.seconds, args.batch)
    print(f"an image costs {cost * 1e6:.0f} us of one core's time")
    print(f"{args.workers} workers give {alone:,.0f} images/s; a loop of {args.speed:,.0f} images/s waits {waited:.1%}")
    if args.out:
        figures = {
            "workers": args.workers,
            "batch": args.batch,
            "images_per_second": alone,
            "speed": args.speed,
            "cost": cost,
        }
        save({**figures, "waited": waited, "machine": machine(torch.device("cpu"))}, args.out)
    return 0


def took(batches, step: float, seconds: float, batch: int) -> tuple[float, float]:
    """(images/s, share of the time spent in waiting) of a loop whose step takes so long."""
    start, waited, count = time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) - start < seconds:
        next(batches)
        waited += time.perf_counter() - now
        time.sleep(step)
        count += 1
    total = time.perf_counter() - start
    return count * batch / total, waited / total


if __name__ == "__main__":
    sys.exit(main())
