"""Does the loop wait for images, and do sets of any size load the same way?

    python benchmarks/loading.py [--workers 2] [--batch 512] [--speed 4660] [--out FILE.json]
    python benchmarks/loading.py --records 500000 [--folder /tmp] [--out FILE.json]

The first, on a folder of 32-pixel PNGs decoded as they are read: how many images a second the workers give, and how
long a loop waits that takes `speed` images a second: 4,660 is the bound of an H200 (790 TFLOP/s in bf16) for the
published CIFAR-10 network's consistency step.

The second writes so many 32-pixel PNGs as 50 tar shards, 5 parquet files, a zip and a folder (of 50,000 at most),
reads each alone, with 1 and 2 workers, and deletes them. One epoch of the shards is read by a process that is killed
(SIGKILL) in the middle and by one that goes on from its last note, made every 20 batches: each image holds its number
in its first pixel, and every number must have come exactly once. Memory is noted ten times on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, random_images, save
from PIL import Image

import config
import data
from sources import files
from sources.images import ImageSet

NOTED = 20  # batches between two notes of where a reader is: what is read after the last one is read again
TARS, PARQUETS, IN_FOLDER = 50, 5, 50_000


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--speed", type=float, default=4660, help="images a second that the loop takes")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--records", type=int, help="images written as shards")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where they are written")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    figures = shards(args) if args.records else small(args)
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        found = {**figures, "machine": machine(torch.device("cpu"))}
        save({**kept, "shards": found} if args.records else {**found, "shards": kept.get("shards")}, args.out)
    return 0


def small(args: argparse.Namespace) -> dict[str, Any]:
    """A folder of 4,096 images: their cost, the workers' speed, and how long a loop waits for them."""
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
    figures = {"workers": args.workers, "batch": args.batch, "images_per_second": alone, "speed": args.speed}
    return {**figures, "cost": cost, "waited": waited}


def took(batches: Any, step: float, seconds: float, batch: int) -> tuple[float, float]:
    """(images/s, share of the time spent in waiting) of a loop whose step takes so long."""
    start, waited, count = time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) - start < seconds:
        next(batches)
        waited += time.perf_counter() - now
        time.sleep(step)
        count += 1
    total = time.perf_counter() - start
    return count * batch / total, waited / total


# Half a million of them -----------------------------------------------------------------------------------------------


def shards(args: argparse.Namespace) -> dict[str, Any]:
    """Write, read, kill and count; figures of each format."""
    root = Path(tempfile.mkdtemp(prefix="loading-", dir=args.folder))
    figures: dict[str, Any] = {"records": args.records, "batch": args.batch, "formats": {}}
    try:
        write(root, args.records)
        for name in ("tar", "parquet", "zip", "folder"):
            started = time.perf_counter()
            found = figures["formats"][name] = {"records": len(opened(root, name))}
            found["first_open_seconds"] = time.perf_counter() - started
            started = time.perf_counter()
            dataset = opened(root, name)
            found["open_seconds"] = time.perf_counter() - started
            for workers in (1, 2):
                with contextlib.closing(data.batches(dataset, 0, args.batch, workers=workers)) as batches:
                    for _ in range(8 * workers):  # what was read ahead while the workers started
                        next(batches)
                    found[f"workers_{workers}"] = took(batches, 0.0, args.seconds, args.batch)[0]
            if name in ("tar", "parquet"):
                found |= killed_and_resumed(root, name, args.records, args.batch)
            print(name, json.dumps(found), flush=True)
            assert found.get("once", args.records) == args.records, "records were lost or read twice"
    finally:
        shutil.rmtree(root)
    return figures


def opened(root: Path, name: str) -> ImageSet:
    files.HEADER_SECONDS = 0  # else so many seconds are spent at most on a look at the headers
    path = root / ("set.zip" if name == "zip" else name)
    return data.load(config.Data(name=name, path=str(path), dir=str(root / "data"), memory_gb=0.0))


def images(count: int) -> Iterator[bytes]:
    """PNGs of noise, image i with the number i in its first pixel."""
    pixels = random_images("3x32", 512).images.permute(0, 2, 3, 1).numpy()
    for i in range(count):
        image = pixels[i % 512].copy()
        image[0, 0] = i & 255, i >> 8 & 255, i >> 16 & 255
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=1)
        yield file.getvalue()


def numbers(images: torch.Tensor) -> np.ndarray:
    """The numbers int64 (B,) in the first pixels of uint8 (B, 3, 32, 32)."""
    return (images[:, :, 0, 0].long() * torch.tensor([1, 256, 65536])).sum(1).numpy()


def write(root: Path, count: int) -> None:
    """The same images four times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("tar", "parquet", "folder"):
        (root / name).mkdir()
    encoded = enumerate(images(count))
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    with zipfile.ZipFile(root / "set.zip", "w") as archive, contextlib.ExitStack() as stack:
        for shard in range(TARS):
            if shard % (TARS // PARQUETS) == 0:
                stack.close()
                table = stack.enter_context(pq.ParquetWriter(root / "parquet" / f"train-{shard:05}.parquet", schema))
            rows = list(itertools.islice(encoded, count * (shard + 1) // TARS - count * shard // TARS))
            with tarfile.open(root / "tar" / f"{shard:06}.tar", "w") as tar:
                for i, content in rows:
                    for name, member in ((f"{i:08}.png", content), (f"{i:08}.cls", b"%d" % (i % 10))):
                        info = tarfile.TarInfo(name)
                        info.size = len(member)
                        tar.addfile(info, io.BytesIO(member))
                    archive.writestr(f"{i:08}.png", content)
                    if i < IN_FOLDER:
                        (root / "folder" / f"{i:08}.png").write_bytes(content)
            values = [{"bytes": content, "path": f"{i:08}.png"} for i, content in rows]
            columns = {"image": values, "label": [i % 10 for i, _ in rows]}
            table.write_table(pa.table(columns, schema=schema), row_group_size=1000)


def killed_and_resumed(root: Path, name: str, count: int, batch: int) -> dict[str, Any]:
    """One epoch by two processes, the first killed in the middle; how many numbers came once, and memory on the way."""
    notes, context = root / f"{name}.notes", multiprocessing.get_context("spawn")
    first = context.Process(target=read_epoch, args=(root, name, count, batch, notes))
    first.start()
    while not notes.exists() or notes.stat().st_size < 8 * count * 0.45:
        time.sleep(0.01)
    time.sleep(0.2)  # into what is read and not noted yet
    first.kill()  # SIGKILL
    first.join()
    killed_at = notes.stat().st_size // 8
    second = context.Process(target=read_epoch, args=(root, name, count, batch, notes))
    second.start()
    second.join()
    came = np.bincount(np.fromfile(notes, np.int64)[:count], minlength=count)
    memory = [json.loads(line) for line in notes.with_suffix(".memory").read_text().splitlines()]
    return {"killed_at": killed_at, "once": int((came == 1).sum()), "most_often": int(came.max()), "memory_mb": memory}


def read_epoch(root: Path, name: str, count: int, batch: int, notes: Path) -> None:
    """Read on from the last whole note to the end of the first epoch, by two workers; note numbers, and memory."""
    step = notes.stat().st_size // (8 * batch) // NOTED * NOTED if notes.exists() else 0
    total, unwritten = -(-count // batch), []
    with open(notes, "ab") as file, open(notes.with_suffix(".memory"), "a") as memory:
        file.truncate(step * batch * 8)
        for images, _ in data.batches(opened(root, name), 0, batch, start_step=step, workers=2):
            unwritten.append(numbers(images))
            step += 1
            if step % NOTED == 0 or step == total:
                file.write(np.concatenate(unwritten).tobytes())
                file.flush()
                unwritten.clear()
            if step % -(-total // 10) == 0 or step == total:
                workers = [resident(child.pid) for child in torch.multiprocessing.active_children()]
                line = {"read": min(step * batch, count), "main": resident("self"), "workers": workers}
                print(json.dumps(line), file=memory, flush=True)
            if step == total:
                return


def resident(pid: int | str | None) -> float:
    """MB of memory of a process, of what it shares with others too."""
    return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())
