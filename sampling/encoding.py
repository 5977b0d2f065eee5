"""What encode.py writes: the latents of a set of images, batch by batch, into one file.

The file is safetensors: one header, then a tensor of all means, one of all deviations, the same of the mirrored images,
labels, and mean and std a channel. Any row is read through a memory map without an index of a million names, as a zip
has; LightningDiT's tools read it as a shard of theirs; and what the latents were made of lies in its metadata. Latents
are float16: rounded by 2^-11 of themselves, far below the deviation that they are drawn with, at half the size.

It grows as FILE.part, which has its full size from the start and takes each batch at its place, from any rank.
FILE.part.done holds what is done: for each batch its number of values a channel, their sums and sums of squares.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import data
from config import Config, ConfigError
from networks import Autoencoder
from sources.codecs import as_input
from sources.images import ImageSet
from sources.latent_files import DTYPES
from sources.latents import ABOUT, FORMAT, PARTS

BATCH = 64  # images; part of what a file is, since a last bit may change with it
PIXELS = 2**22  # that one pass of the encoder takes: a batch of 256 pixels


def header(cfg: Config, images: ImageSet, autoencoder: Autoencoder, input_range: str) -> tuple[bytes, dict[str, Any]]:
    """The file's first bytes, and name -> (dtype, shape, place in the file) of its tensors. Raises ConfigError."""
    (channels, side, _), (c, factor) = images.shape, (autoencoder.channels, autoencoder.factor)
    if channels != autoencoder.image_channels:
        takes = f"takes images of {autoencoder.image_channels} channels, and these have {channels}"
        raise ConfigError(
            f"--autoencoder: {autoencoder.source} {takes}; set data.channels={autoencoder.image_channels}"
        )
    if side % factor:
        raise ConfigError(
            f"--autoencoder: its latents are {factor} times smaller, and {side} pixels do not divide by it"
        )
    shape = (len(images), c, side // factor, side // factor)
    names = [name for name in PARTS if cfg.data.flip or "flip" not in name]
    if autoencoder.tiny:  # whose deviation is 0
        names = [name for name in names if not name.endswith("_std")]
    tensors = {name: ("F16", shape) for name in names}
    if images.labels is not None:
        tensors["labels"] = ("I64", (len(images),))
    tensors |= {"channel_mean": ("F64", (c,)), "channel_std": ("F64", (c,))}
    source = os.path.abspath(autoencoder.source) if os.path.exists(autoencoder.source) else autoencoder.source
    known = {"source": source, "hash": autoencoder.hash, "input_range": input_range, "factor": factor}
    section = cfg.data.model_dump(exclude={"dir", "workers", "memory_gb", "flip", "autoencoder", "scaling"})
    if cfg.data.path:
        section["path"] = os.path.abspath(cfg.data.path)
    about = {
        "format": FORMAT,
        "autoencoder": {**known, "image_channels": channels},
        "classes": images.class_names if images.labels is not None else None,
        "images": {**section, "count": len(images), "fingerprint": images.facts()["fingerprint"]},
    }
    content: dict[str, Any] = {"__metadata__": {ABOUT: json.dumps(about)}}
    places, at = {}, 0
    for name, (dtype, size) in tensors.items():
        stop = at + int(np.prod(size)) * (2 if dtype == "F16" else 8)
        content[name] = {"dtype": dtype, "shape": size, "data_offsets": [at, stop]}
        places[name], at = (dtype, size, at), stop
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8
    first = len(text).to_bytes(8, "little") + text
    return first, {name: (dtype, size, len(first) + at) for name, (dtype, size, at) in places.items()}


class LatentFile:
    """A file of latents on its way; many processes may write to it, each its own batches."""

    def __init__(self, out: Path, first: bytes, tensors: dict[str, Any]):
        self.out, self.first, self.tensors = out, first, tensors
        self.part, self.done = (out.with_name(f"{out.name}.part{end}") for end in ("", ".done"))
        self.count, self.channels = tensors["latents"][1][:2]
        self.record = 8 * (1 + 2 * self.channels)  # bytes of a batch in `done`

    def begin(self) -> None:
        """Make the two files, or find those of a command that was stopped. Raises ConfigError."""
        if self.out.exists():
            raise ConfigError(f"--out: {self.out} is there already; name another file, or remove it")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.part.exists() and self.done.exists():
            with open(self.part, "rb") as file:
                if file.read(len(self.first)) != self.first:
                    what = "is of other images, another autoencoder or other settings"
                    raise ConfigError(f"--out: {self.part} {what}; give those again, or remove it to start anew")
            return
        _, shape, at = self.tensors["channel_std"]
        size = at + 8 * shape[0]
        free = shutil.disk_usage(self.out.parent).free
        if size > free:
            has = f"the disk has {free / 2**30:.1f}"
            raise ConfigError(f"--out: {self.out} takes {size / 2**30:.1f} GiB, and {has}; name a file on a larger one")
        self.done.unlink(missing_ok=True)
        with open(self.part, "wb") as file:
            file.write(self.first)
            file.truncate(size)
        with open(self.done, "wb") as file:
            file.truncate(self.record * -(-self.count // BATCH))

    def finished(self) -> np.ndarray:
        """What `done` holds, float64 (batches, 1 + 2 c); a batch that is not done has 0 values."""
        return np.fromfile(self.done, np.float64).reshape(-1, 1 + 2 * self.channels)

    def write(self, batch: int, parts: dict[str, torch.Tensor], labels: torch.Tensor | None) -> None:
        """Write a batch's tensors of `header`'s names, float16 (B, c, r, r), then that it is done."""
        with open(self.part, "r+b") as file:
            given = parts if labels is None else {**parts, "labels": labels.long()}
            for name, values in given.items():
                content = values.cpu().contiguous().numpy()
                file.seek(self.tensors[name][2] + batch * BATCH * content[0].nbytes)
                file.write(content.tobytes())
            file.flush()
            os.fsync(file.fileno())
        z = parts["latents"].double()
        square = z.square()
        if "latents_std" in parts:  # the spread of what is drawn
            square = square + parts["latents_std"].double().square()
        sums = [z.new_tensor([z[:, 0].numel()]), z.sum((0, 2, 3)), square.sum((0, 2, 3))]
        with open(self.done, "r+b") as file:
            file.seek(batch * self.record)
            file.write(torch.cat(sums).cpu().numpy().tobytes())

    def end(self) -> tuple[np.ndarray, np.ndarray]:
        """Put mean and std a channel in the file and give it its name; the two, float64 (c,)."""
        count, *sums = self.finished().sum(0)
        mean, square = np.array(sums).reshape(2, -1)
        mean /= count
        std = np.sqrt(np.maximum(square - count * mean**2, 0) / max(count - 1, 1))
        with open(self.part, "r+b") as file:
            for name, values in (("channel_mean", mean), ("channel_std", std)):
                file.seek(self.tensors[name][2])
                file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.part, self.out)
        self.done.unlink()
        return mean, std


@torch.no_grad()
def encode(
    images: ImageSet, autoencoder: Autoencoder, file: LatentFile, input_range: str, device: torch.device,
    place: tuple[int, int], workers: int, said: Callable[[str], None],
) -> None:  # fmt: skip
    """Encode what is not done, the batches of one rank. place: (rank, ranks). Raises ConfigError."""
    rank, world = place
    missing = np.flatnonzero(file.finished()[:, 0] == 0)
    own = missing[missing % world == rank].tolist()  # whatever others have done by now
    if len(missing) < -(-len(images) // BATCH):
        said(f"{file.part}: goes on; {-(-len(images) // BATCH) - len(missing):,} batches of {BATCH} are done")
    rows = [torch.arange(b * BATCH, min((b + 1) * BATCH, len(images))) for b in own]
    bar = tqdm(desc="encoding", total=len(rows) * BATCH, unit="image", disable=True if rank else None)
    together = max(1, PIXELS // images.resolution**2)
    with bar:
        for batch, (pixels, labels) in zip(own, data.read_batches(images, rows, workers), strict=True):
            x = as_input(data.to_float(pixels.to(device)), input_range)
            parts = {}
            for ending, side in (("", x), ("_flip", x.flip(3))):
                if f"latents{ending}" in file.tensors:
                    mean, std = (
                        torch.cat(made) for made in zip(*map(autoencoder.encode, side.split(together)), strict=True)
                    )
                    parts[f"latents{ending}"], parts[f"latents{ending}_std"] = mean, std
            parts = {name: z.to(DTYPES[file.tensors[name][0]]) for name, z in parts.items() if name in file.tensors}
            if not all(z.isfinite().all() for z in parts.values()):
                what = (
                    f"{autoencoder.source} gives latents that are not finite in float16 for images {batch * BATCH}..."
                )
                raise ConfigError(f"--autoencoder: {what}; train it anew or take another")
            file.write(batch, parts, labels)
            bar.update(len(pixels))
