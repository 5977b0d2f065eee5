"""Datasets by name, decoded to uint8; the order they are read in; and where pixels become [-1, 1].

    dataset = load(cfg.data)
    for images, labels in batches(dataset, seed=0, batch_size=512):  # uint8 (B, C, H, W), int64 (B,) or None
        x = to_float(images)  # [-1, 1]

Add a dataset: write one function that takes the `data` section of the config and returns a `Dataset`, and name it
in DATASETS at the end of this file.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import signal
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from config import ConfigError
from objectives.draws import key
from sources import vectors

log = logging.getLogger(__name__)

# Only decoders that stay in memory: PIL's EPS reader, for one, starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
MAX_PIXELS = 100_000_000  # of one image: more is a decompression bomb or a scan nobody trains on
MAX_FILE = 256 * 2**20  # bytes of one image file
MAX_JSON = 512 * 2**20  # bytes of dataset.json: about ten million labels
MAX_CLASSES = 100_000  # labels are given to the network one-hot
CACHE_SECONDS = 5  # sets that take longer to decode are kept, decoded, under data.dir

# Broken files are reported here, one line each, not by PIL.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 0..255 to `dtype` in [-1, 1]: x / 127.5 - 1. Any shape."""
    return (images.to(torch.float32) / 127.5 - 1).to(dtype)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 0..255, rounded and clamped: the inverse of `to_float`, exact for all 256 values."""
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flip(images: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Mirror left to right the images (B, C, H, W) whose flag (B,), bool, is set.

    In training: `flip(x, draws.integers(2, (len(x),)).bool())`.
    """
    return torch.where(flags[:, None, None, None], images.flip(3), images)


def fit_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W) to 1 or 3 channels; grey is PIL's (ITU-R 601) luma. None: as they are."""
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    parts = [(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in images.split(4096)]
    return torch.cat(parts)


def fit_resolution(images: torch.Tensor, resolution: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W), centre-cropped to a square and resized: area means down, bicubic up. None: cropped only."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if resolution is None or resolution == side:
        return images.contiguous()
    how = {"mode": "area"} if resolution < side else {"mode": "bicubic", "align_corners": False}
    parts = [F.interpolate(part.float(), size=(resolution, resolution), **how) for part in images.split(4096)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


# ---------------------------------------------------------------------------------------------------------------------
# What every dataset is


@dataclass
class Dataset:
    """Square images of one size, labelled or not; in memory (`images`) or decoded when read (`files`)."""

    name: str
    num_classes: int = 0  # 0: no labels
    labels: torch.Tensor | None = None  # int64 (N,)
    images: torch.Tensor | None = None  # uint8 (N, C, H, W), on the CPU or a device
    files: Files | None = None
    reported: set[str] = field(default_factory=set)  # broken files that have been named already

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of images, channels, pixels per side."""
        if self.images is not None:
            return self.images.shape[0], self.images.shape[1], self.images.shape[3]
        assert self.files is not None
        return len(self.files.names), self.files.channels, self.files.resolution

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.shape[1]

    @property
    def resolution(self) -> int:
        """Pixels per side."""
        return self.shape[2]

    def to(self, device: torch.device | str) -> Dataset:
        """The same dataset with its decoded images and labels on `device`; a lazy set is returned as it is."""
        if self.images is None:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) for int64 (B,) indices; on the device of `images`, on the CPU for a lazy set."""
        return self.read(indices)[0]

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) or None."""
        if self.files is not None:
            return self.unpack(self.files.read(indices.tolist()))
        assert self.images is not None
        indices = indices.to(self.images.device, non_blocking=True)
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def unpack(self, read: tuple[torch.Tensor, torch.Tensor, list[str]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Files.read gave as images and labels; each broken file is named once."""
        images, used, broken = read
        for message in broken:
            if message not in self.reported:
                self.reported.add(message)
                log.warning("%s; the next image is read in its place", message)
        return images, None if self.labels is None else self.labels[used]


def load(data_cfg: Any) -> Dataset | vectors.Vectors:
    """The training split that the config's `data` section names: images, or the vectors of an npz.

    Args:
        data_cfg: an object with name, dir, path, resolution, channels, conditional, on_broken and memory_gb.

    Raises:
        ConfigError: what is missing or wrong and what to do, in one line.
    """
    if data_cfg.name not in DATASETS:
        raise ConfigError(f"data.name: {data_cfg.name!r} is not one of {', '.join(DATASETS)}")
    dataset = DATASETS[data_cfg.name](data_cfg)
    if isinstance(dataset, vectors.Vectors):
        return dataset
    if data_cfg.conditional and dataset.labels is None:
        raise ConfigError(
            f"data.conditional: {data_cfg.name} {data_cfg.path or ''} has no labels; add them (a folder: one subfolder "
            "per class; a zip: dataset.json; an npz: an array `labels`) or set data.conditional: false"
        )
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# The order of reading: a pure function of the seed, so no state is saved


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(key(seed, "order", epoch)))


def order(n: int, seed: int, positions: torch.Tensor) -> torch.Tensor:
    """Indices into a dataset of n at int64 `positions` (B,) of the endless stream of epochs, each newly shuffled."""
    indices = torch.empty_like(positions)
    epochs = positions // n
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        indices[here] = _permutation(n, seed, epoch)[positions[here] % n]
    return indices


def batches(
    dataset: Dataset | vectors.Vectors,
    seed: int,
    batch_size: int,  # of all ranks together
    start_step: int = 0,  # the first batch is this step's
    rank_slice: tuple[int, int] | None = None,  # this rank's rows [start, stop) of every batch; None: all
    workers: int = 0,  # processes that decode a lazy set; the batches are the same whatever the number
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Endless (uint8 images (B, C, H, W), int64 labels (B,) or None); step k has places [k B, (k+1) B) of `order`.

    Of vectors: (float32 values (B, ...), float32 conditions (B, K) or None).

    Raises ConfigError for images that cannot be used, as the config says.
    """
    start, stop = rank_slice or (0, batch_size)

    def indices() -> Iterator[torch.Tensor]:
        step = start_step
        while True:
            yield order(len(dataset), seed, step * batch_size + torch.arange(start, stop))
            step += 1

    if dataset.files is None:
        for rows in indices():
            yield dataset.read(rows)
    loader: Any = torch.utils.data.DataLoader(
        dataset.files,  # type: ignore[arg-type]  # anything with __getitems__
        batch_sampler=(rows.tolist() for rows in indices()),
        num_workers=workers,
        collate_fn=_as_they_are,
        worker_init_fn=_deaf,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(0),  # else it would draw from, and move, torch's global one
    )
    with _deferred_signals():  # until the new processes are deaf
        reads = iter(loader)
    for read in reads:
        if isinstance(read, ConfigError):
            raise read
        yield dataset.unpack(read)


def _as_they_are(read: Any) -> Any:
    return read


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_workers() -> None:
    """End loading processes left at exit: they do not hear the SIGTERM after which Python would wait for them."""
    for child in torch.multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _deaf(worker: int) -> None:
    """Clusters and Ctrl-C signal a whole group of processes: the main one decides, and needs these to end its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Images in files: a folder or a zip, decoded in memory, never extracted


class BrokenImage(Exception):
    """One image that cannot be read, and why."""


@dataclass
class Files:
    """Images in a folder or a zip archive, decoded, cropped and resized one by one. Picklable, safe to fork."""

    path: str  # the folder or the archive
    names: list[str]  # relative to it, with forward slashes
    zipped: bool
    on_broken: str = "skip"  # or "fail"
    resolution: int = 0  # pixels per side
    channels: int = 0
    resized: bool = True  # False: data.resolution is unset, and an image of another size is an error
    recoloured: bool = True  # False: data.channels is unset, and a colour image among grey ones is an error
    stamp: tuple[int, int] = (0, 0)  # the archive's time and size: never read a replaced one through an old index

    def load_bytes(self, index: int) -> bytes:
        """The file's bytes. Raises BrokenImage where there are more than MAX_FILE."""
        name = self.names[index]
        if not self.zipped:
            with open(os.path.join(self.path, name), "rb") as file:
                data = file.read(MAX_FILE + 1)
        else:
            archive = _archive(self.path, self.stamp, os.getpid())
            data = _read_member(archive, archive.getinfo(name), MAX_FILE)
        if len(data) > MAX_FILE:
            raise BrokenImage(f"the file is larger than {MAX_FILE >> 20} MiB")
        return data

    def open(self, index: int) -> Image.Image:
        """The image, its header read and checked. Raises BrokenImage."""
        try:
            image = Image.open(io.BytesIO(self.load_bytes(index)), formats=FORMATS)
        except Exception as error:  # a hostile file can raise anything from a decoder
            raise BrokenImage(_reason(error)) from error
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImage(f"{image.width} x {image.height} pixels are too many: a decompression bomb?")
        return image

    def decode(self, index: int) -> np.ndarray:
        """uint8 (C, R, R). Raises BrokenImage; ConfigError where the image is unlike the others."""
        image = self.open(index)
        name, r = _show(self.names[index]), self.resolution
        if not self.resized and image.size != (r, r):
            raise ConfigError(
                f"data.resolution: {name} is {image.width} x {image.height} pixels, others are {r} x {r}; "
                f"set data.resolution (for example {r}), and all are cropped and resized to it"
            )
        if not self.recoloured and self.channels == 1 and image.mode not in GREY_MODES:
            raise ConfigError(f"data.channels: {name} has colours, others are grey; set data.channels: 1 or 3")
        try:
            if image.size != (r, r):
                # A large JPEG is decoded at a half, a quarter or an eighth of its size.
                image.draft(None, (3 * r, 3 * r))
            ImageOps.exif_transpose(image, in_place=True)
            image = _plain_mode(image, self.channels)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            if image.size != (r, r):
                image = image.crop((left, top, left + side, top + side))
                image = image.resize((r, r), Image.Resampling.LANCZOS, reducing_gap=3.0)
            array = np.array(image)
        except Exception as error:
            raise BrokenImage(_reason(error)) from error
        return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]

    def broken(self, index: int, error: BrokenImage) -> str:
        """The one line about a broken image; raised as a ConfigError where the config says so."""
        line = f"data.path: {_show(self.names[index])} in {self.path} cannot be read ({error})"
        if self.on_broken == "fail":
            raise ConfigError(f"{line}; mend or remove it, or set data.on_broken: skip")
        return line

    def read(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images uint8 (B, C, R, R), the indices int64 (B,) that they are, one line for each broken file.

        In the place of a broken image stands the next good one, so that every rank, run and resumed run agrees.
        """
        images, used, lines = (
            np.empty((len(indices), self.channels, self.resolution, self.resolution), np.uint8),
            [],
            [],
        )
        for row, index in enumerate(indices):
            for attempt in range(len(self.names)):
                at = (index + attempt) % len(self.names)
                try:
                    images[row] = self.decode(at)
                    break
                except BrokenImage as error:
                    lines.append(self.broken(at, error))
            else:
                raise ConfigError(f"data.path: none of the {len(self.names)} images in {self.path} can be read")
            used.append(at)
        return torch.from_numpy(images), torch.tensor(used), lines

    def __getitems__(self, indices: list[int]) -> Any:
        """For DataLoader workers: an error comes back as a value, because theirs would be wrapped in a traceback."""
        try:
            return self.read(indices)
        except ConfigError as error:
            return error


@functools.lru_cache(maxsize=4)
def _archive(path: str, stamp: tuple[int, int], pid: int) -> zipfile.ZipFile:
    """An open archive per process: a forked worker must not share its parent's file position."""
    return zipfile.ZipFile(path)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes. Raises BrokenImage where it is encrypted, oddly compressed, or over `limit` bytes."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BrokenImage("its compression is not one of stored and deflated")  # the others unpack without a bound
    if info.flag_bits & 1:
        raise BrokenImage("it is encrypted")
    if info.file_size > limit:
        raise BrokenImage(f"it unpacks to more than {limit >> 20} MiB")
    with archive.open(info) as member:
        return member.read(limit + 1)


def _plain_mode(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL mode to L or RGB: 16 bits are scaled to 8, transparent pixels are laid on white."""
    if image.mode == "F":
        raise BrokenImage("its pixels are floats; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL's own conversion would clip 16 bits, not scale them
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float32).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _show(name: str) -> str:
    """A file name fit for a message of one line."""
    return name if name.isprintable() else ascii(name)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        text = f"not an image of a known kind: {', '.join(FORMATS)}"
    return text if text.isprintable() else ascii(text)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix[1:].lower() in SUFFIXES


def _from_files(cfg: Any, files: Files, labels: list[int] | None, num_classes: int) -> Dataset:
    """Settle size and channels, then decode all, where they fit in data.memory_gb, or none."""
    if not files.names:
        raise ConfigError(f"data.path: {files.path} holds no images ({', '.join(SUFFIXES)}); give the path of some")
    files.resized, files.recoloured = cfg.resolution is not None, cfg.channels is not None
    _settle_shape(cfg, files)
    label_tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    num_classes = 0 if labels is None else num_classes
    size = len(files.names) * files.channels * files.resolution**2
    if size > cfg.memory_gb * 2**30:
        return Dataset(cfg.name, num_classes, label_tensor, files=files)
    images, kept = _decoded(cfg, files)
    if len(kept) < len(files.names):
        log.warning("data.path: skipped %d of %d images", len(files.names) - len(kept), len(files.names))
    return Dataset(cfg.name, num_classes, None if label_tensor is None else label_tensor[kept], images)


def _settle_shape(cfg: Any, files: Files) -> None:
    """Unset resolution: that of the first image. Unset channels: 3 if one of 64 images has colour, else 1."""
    count = len(files.names)
    looked_at, first = 0, None
    colour = False
    for index in dict.fromkeys([*range(0, count, max(1, count // 64)), *range(count)]):
        try:
            image = files.open(index)
        except BrokenImage as error:
            files.broken(index, error)  # raises where broken images are fatal; named when it is read otherwise
            continue
        first = first or image.size
        colour |= image.mode not in GREY_MODES
        looked_at += 1
        if looked_at >= 64 or (cfg.resolution and cfg.channels):
            break
    if first is None:
        raise ConfigError(f"data.path: none of the {count} images in {files.path} can be read")
    if cfg.resolution is None and first[0] != first[1]:
        raise ConfigError(
            f"data.resolution: the images in {files.path} are {first[0]} x {first[1]} pixels, not square; "
            "set data.resolution (for example 64), and all are cropped and resized to it"
        )
    files.resolution = cfg.resolution or first[0]
    files.channels = cfg.channels or (3 if colour else 1)


def _decoded(cfg: Any, files: Files) -> tuple[torch.Tensor, torch.Tensor]:
    """All images uint8 (N, C, R, R) and the indices int64 (N,) of those that could be read."""
    cache = _cache_path(cfg, files)
    found = _read_cache(cache, files)
    if found is not None:
        return found
    started = time.monotonic()
    count = len(files.names)
    images = np.empty((count, files.channels, files.resolution, files.resolution), np.uint8)

    def decode(index: int) -> BrokenImage | None:
        try:
            images[index] = files.decode(index)
        except BrokenImage as error:
            return error
        return None

    kept = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, _progress(count) as bar:
        for start in range(0, count, 1024):  # in pieces: an error need not wait for all the others
            piece = range(start, min(start + 1024, count))
            # Tiny images are decoded faster by one thread than by many that wait for the interpreter's lock.
            errors = pool.map(decode, piece) if files.resized or files.resolution > 64 else map(decode, piece)
            for index, error in zip(piece, errors, strict=True):
                if error is None:
                    kept.append(index)
                else:
                    log.warning("%s; skipped", files.broken(index, error))
            bar.update(len(piece))
    if not kept:
        raise ConfigError(f"data.path: none of the {count} images in {files.path} can be read")
    images, indices = images if len(kept) == count else images[kept], np.array(kept, np.int64)
    if time.monotonic() - started > CACHE_SECONDS:
        _write_cache(cache, images, indices)
    return torch.from_numpy(images), torch.from_numpy(indices)


def _progress(count: int) -> tqdm:
    return tqdm(desc="decoding", total=count, unit="image", disable=None, delay=2)


def _cache_path(cfg: Any, files: Files) -> Path:
    """Named by all that decides the decoded pixels: the files' names, sizes and times, resolution and channels."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((1, os.path.abspath(files.path), files.stamp, files.resolution, files.channels)).encode())
    for name in files.names:
        digest.update(os.fsencode(name) + b"\0")
        if not files.zipped:
            info = os.stat(os.path.join(files.path, name))
            digest.update(repr((info.st_size, info.st_mtime_ns)).encode())
    return Path(cfg.dir) / "cache" / f"decoded-{files.resolution}x{files.channels}-{digest.hexdigest()}.npz"


def _read_cache(cache: Path, files: Files) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, kept = arrays["images"], arrays["kept"]
    except Exception:  # absent, or damaged: decode again
        return None
    shape = (len(kept), files.channels, files.resolution, files.resolution)
    good = images.dtype == np.uint8 and images.shape == shape and kept.dtype == np.int64 and kept.ndim == 1
    if not good or (files.on_broken == "fail" and len(kept) < len(files.names)):
        return None
    return torch.from_numpy(images), torch.from_numpy(kept)


def _write_cache(cache: Path, images: np.ndarray, kept: np.ndarray) -> None:
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, images=images, kept=kept)
        os.replace(partial, cache)
    except OSError as error:  # a full disk costs the next start its time, nothing else
        with contextlib.suppress(OSError):
            partial.unlink()
        log.warning("data.dir: the decoded images could not be kept in %s (%s)", cache.parent, _reason(error))


# ---------------------------------------------------------------------------------------------------------------------
# The datasets


def _in_memory(cfg: Any, images: torch.Tensor, labels: Any, num_classes: int) -> Dataset:
    """A dataset of uint8 images (N, C, H, W) at the size and channels that the config asks for."""
    images = fit_channels(fit_resolution(images, cfg.resolution), cfg.channels)
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return Dataset(cfg.name, 0 if labels is None else num_classes, labels, images=images)


def digits(cfg: Any) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes; no download. 0..16 is scaled to 0..255."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    return _in_memory(cfg, torch.from_numpy(images)[:, None], raw.target, 10)


def _torchvision(cfg: Any, kind: str, place: str) -> Any:
    """torchvision's training split from data.dir, downloaded if it is not there; `place`: what goes where by hand."""
    import torchvision

    dataset_class = getattr(torchvision.datasets, kind)
    try:
        return dataset_class(root=cfg.dir, train=True, download=False)
    except RuntimeError:  # torchvision's word for absent or damaged
        pass
    except Exception as error:
        raise ConfigError(
            f"data.dir: the {cfg.name} files in {cfg.dir} are damaged ({_reason(error)}); delete them, and they are "
            "downloaded again"
        ) from error
    try:
        return dataset_class(root=cfg.dir, train=True, download=True)
    except Exception as error:
        raise ConfigError(
            f"data.dir: {cfg.name} is not in {cfg.dir} and could not be downloaded ({_reason(error)}); "
            f"place {place} in {Path(cfg.dir) / kind / 'raw' if 'ubyte' in place else cfg.dir}"
        ) from error


# torchvision asks for the test files too.
_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (gunzipped)"


def _mnist(cfg: Any, kind: str) -> Dataset:
    raw = _torchvision(cfg, kind, _IDX)
    images = F.pad(raw.data[:, None], (2, 2, 2, 2))  # 28 to 32: black, as the background is
    return _in_memory(cfg, images, raw.targets, 10)


def mnist(cfg: Any) -> Dataset:
    """60,000 handwritten digits, 28x28 grey padded to 32x32, 10 classes."""
    return _mnist(cfg, "MNIST")


def fashion_mnist(cfg: Any) -> Dataset:
    """60,000 pieces of clothing, 28x28 grey padded to 32x32, 10 classes."""
    return _mnist(cfg, "FashionMNIST")


def _cifar(cfg: Any, kind: str, archive: str, num_classes: int) -> Dataset:
    raw = _torchvision(cfg, kind, archive)
    return _in_memory(cfg, torch.from_numpy(raw.data).permute(0, 3, 1, 2), raw.targets, num_classes)


def cifar10(cfg: Any) -> Dataset:
    """50,000 photographs, 32x32 colour, 10 classes."""
    return _cifar(cfg, "CIFAR10", "cifar-10-python.tar.gz", 10)


def cifar100(cfg: Any) -> Dataset:
    """50,000 photographs, 32x32 colour, 100 classes."""
    return _cifar(cfg, "CIFAR100", "cifar-100-python.tar.gz", 100)


def _given_path(cfg: Any, folder: bool) -> str:
    """data.path, which must exist and be of the right kind."""
    what = "a folder" if folder else f"a .{cfg.name} file"
    if not cfg.path:
        raise ConfigError(f"data.path: data.name: {cfg.name} reads {what}; set data.path to it")
    path = os.fspath(cfg.path)
    if not os.path.exists(path):
        raise ConfigError(f"data.path: {path} does not exist; set it to {what}")
    if folder != os.path.isdir(path):
        other = "folder" if os.path.isdir(path) else "npz" if path.endswith(".npz") else "zip"
        raise ConfigError(f"data.path: {path} is not {what}; correct it, or set data.name: {other}")
    if not folder and not os.path.isfile(path):
        raise ConfigError(f"data.path: {path} is not a regular file; set it to {what}")
    return path


def _list(root: str, below: str = "") -> list[os.DirEntry[str]]:
    """What lies in root/below, sorted by name."""
    try:
        return sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"data.path: {root}: {_show(below or '.')} cannot be listed ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _walk(root: str, below: str = "") -> Iterator[str]:
    """Relative names of the images under root, sorted. Links to files are followed, links to folders are not."""
    for entry in _list(root, below):
        name = f"{below}/{entry.name}" if below else entry.name
        if _is_folder(entry):
            yield from _walk(root, name)
        elif _is_image(name) and entry.is_file():  # not a pipe or a device, which could be read for ever
            yield name


def folder(cfg: Any) -> Dataset:
    """A tree of images. Where all lie in subfolders, the top ones are the classes, numbered in sorted order."""
    path = _given_path(cfg, folder=True)
    names = list(_walk(path))
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    labels = None
    if all("/" in name for name in names):
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.split("/")[0]] for name in names]
    return _from_files(cfg, Files(path, names, zipped=False, on_broken=cfg.on_broken), labels, len(classes))


# Super-class -> its classes' places among ImageNet-1k's sorted class folders
IMAGENET9 = {
    "dog": (151, 207, 234, 235, 254),
    "cat": (281, 282, 283, 284, 285),
    "frog": (30, 31, 32),
    "turtle": (33, 34, 35, 36, 37),
    "bird": (89, 90, 94, 96, 97),
    "monkey": (372, 373, 374, 375, 378),
    "fish": (393, 394, 395, 396, 397),
    "crab": (118, 119, 120, 121),
    "insect": (306, 307, 308, 309, 310),
}


def imagenet9(cfg: Any) -> Dataset:
    """Nine super-classes, 42 classes of ImageNet-1k's train folder; label 0 is dog, 8 insect, as in IMAGENET9."""
    path = _given_path(cfg, folder=True)
    classes = [entry.name for entry in _list(path) if _is_folder(entry)]
    if len(classes) != 1000:
        raise ConfigError(
            f"data.path: {path} has {len(classes)} class folders; ImageNet-1k's train folder, which imagenet9 is read "
            "from, has 1000 (n01440764 to n15075141)"
        )
    label_of = {classes[place]: label for label, places in enumerate(IMAGENET9.values()) for place in places}
    names = [name for folder_name in sorted(label_of) for name in _walk(path, folder_name)]
    labels = [label_of[name.split("/")[0]] for name in names]
    return _from_files(cfg, Files(path, names, zipped=False, on_broken=cfg.on_broken), labels, len(IMAGENET9))


def zip_(cfg: Any) -> Dataset:
    """EDM's format: images and, if labelled, dataset.json: {"labels": [["00000/img0.png", 6], ...]}, or null."""
    path = _given_path(cfg, folder=False)
    try:
        info = os.stat(path)
        stamp = (info.st_mtime_ns, info.st_size)
        archive = _archive(path, stamp, os.getpid())
        every_name = archive.namelist()
    except Exception as error:
        raise ConfigError(f"data.path: {path} cannot be read as a zip archive ({_reason(error)})") from error
    for name in every_name:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise ConfigError(f"data.path: {path} is refused: its member {_show(name)!r} points outside the archive")
    names = sorted({name for name in every_name if _is_image(name)})
    labels = _zip_labels(path, archive, names) if "dataset.json" in every_name else None
    num_classes = max(labels) + 1 if labels else 0
    files = Files(path, names, zipped=True, on_broken=cfg.on_broken, stamp=stamp)
    return _from_files(cfg, files, labels, num_classes)


def _zip_labels(path: str, archive: zipfile.ZipFile, names: list[str]) -> list[int] | None:
    where = f"data.path: dataset.json in {path}"
    try:
        data = json.loads(_read_member(archive, archive.getinfo("dataset.json"), MAX_JSON))
    except Exception as error:  # RecursionError included: brackets in brackets without end
        raise ConfigError(f"{where} cannot be read ({_reason(error)})") from error
    pairs: Any = data.get("labels") if isinstance(data, dict) else 0
    if pairs is None:
        return None
    try:
        by_name = {str(name): label for name, label in pairs}
    except (TypeError, ValueError):
        raise ConfigError(f'{where} must read {{"labels": [["name.png", 3], ...]}} or {{"labels": null}}') from None
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise ConfigError(f"{where} gives no label for {_show(missing)}; add it, or write null for all labels")
    labels = [by_name[name] for name in names]
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < MAX_CLASSES), None)
    if wrong is not None:
        raise ConfigError(f"{where}: labels must be whole numbers 0 to {MAX_CLASSES - 1}, not {str(wrong)[:50]!r}")
    return labels


def npz(cfg: Any) -> Dataset | vectors.Vectors:
    """An array `images` (or arr_0), uint8, NHWC or NCHW or NHW, and optional integer `labels` (or arr_1) (N,).

    Or an array `vectors` of floats: see vectors.from_arrays.
    """
    path = _given_path(cfg, folder=False)
    try:
        arrays = _npz_arrays(path, cfg.memory_gb * 2**30)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"data.path: {path} cannot be read as an npz file ({_reason(error)})") from error
    if arrays["vectors"] is not None:
        return vectors.from_arrays(cfg, path, arrays)
    images, labels = arrays["images"], arrays["labels"]
    if images is None:
        raise ConfigError(
            f"data.path: {path} holds no array named `images`, `arr_0` or `vectors`; save one: np.savez(..., images=x)"
        )
    if images.ndim == 3:
        images = images[..., None]
    channels_last = images.ndim == 4 and images.shape[3] in (1, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or not (channels_last or images.shape[1] in (1, 3)):
        raise ConfigError(
            f"data.path: images in {path} are {images.dtype} {images.shape}; they must be uint8, (N, H, W, C) or "
            "(N, C, H, W), with 1 or 3 channels"
        )
    if images.size == 0:
        raise ConfigError(f"data.path: images in {path} are empty, {images.shape}; give at least one")
    num_classes = 0
    if labels is not None:
        if (
            labels.shape != (len(images),)
            or labels.dtype.kind not in "iu"
            or labels.min() < 0
            or labels.max() >= MAX_CLASSES
        ):
            raise ConfigError(
                f"data.path: labels in {path} are {labels.dtype} {labels.shape}; they must be integers "
                f"0 to {MAX_CLASSES - 1}, ({len(images)},)"
            )
        labels, num_classes = labels.astype(np.int64), int(labels.max()) + 1
    return _in_memory(
        cfg, torch.from_numpy(images.transpose(0, 3, 1, 2) if channels_last else images), labels, num_classes
    )


# Array -> its other name in files of other programs
NPZ_ARRAYS = {"images": "arr_0", "labels": "arr_1", "vectors": "", "conditions": "", "low": "", "high": ""}


def _npz_arrays(path: str, limit: float) -> dict[str, np.ndarray | None]:
    """The arrays of NPZ_ARRAYS, each None if absent. Never unpickles; nothing over `limit` bytes is unpacked."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        names = {name: next((n for n in (name, other) if n in sizes), None) for name, other in NPZ_ARRAYS.items()}
        total = sum(sizes[name] for name in names.values() if name)
        if total > limit:
            raise ConfigError(
                f"data.memory_gb: {path} unpacks to {total / 2**30:.1f} GB; raise data.memory_gb, or keep the images "
                "in a folder or a zip, which are read piece by piece"
            )
        return {
            key: None if name is None else _read_npy(archive, f"{name}.npy", int(limit)) for key, name in names.items()
        }


def _read_npy(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    return np.load(io.BytesIO(_read_member(archive, archive.getinfo(name), limit)), allow_pickle=False)


# name -> function: what data.name can be
DATASETS = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet9": imagenet9,
    "folder": folder,
    "zip": zip_,
    "npz": npz,
}
