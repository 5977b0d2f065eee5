"""Images in a folder or a zip: found, decoded in memory, never extracted, kept decoded where that is slow."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from config import ConfigError

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

    def open(self, index: int) -> Image.Image:
        """The image, its header read and checked. Raises BrokenImage."""
        name = self.names[index]
        try:
            if self.zipped:
                archive = _archive(self.path, self.stamp, os.getpid())
                data = read_member(archive, archive.getinfo(name), MAX_FILE)
            else:
                with open(os.path.join(self.path, name), "rb") as file:
                    data = file.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise BrokenImage(f"the file is larger than {MAX_FILE >> 20} MiB")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # a hostile file can raise anything from a decoder
            raise BrokenImage(reason(error)) from error
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImage(f"{image.width} x {image.height} pixels are too many: a decompression bomb?")
        return image

    def decode(self, index: int) -> np.ndarray:
        """uint8 (C, R, R). Raises BrokenImage; ConfigError where the image is unlike the others."""
        image = self.open(index)
        name, r = show(self.names[index]), self.resolution
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
            raise BrokenImage(reason(error)) from error
        return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]

    def broken(self, index: int, error: BrokenImage) -> str:
        """The one line about a broken image; raised as a ConfigError where the config says so."""
        line = f"data.path: {show(self.names[index])} in {self.path} cannot be read ({error})"
        if self.on_broken == "fail":
            raise ConfigError(f"{line}; mend or remove it, or set data.on_broken: skip")
        return line

    def read(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images uint8 (B, C, R, R), the indices int64 (B,) that they are, one line for each broken file.

        In the place of a broken image stands the next good one, so that every rank, run and resumed run agrees.
        """
        images = np.empty((len(indices), self.channels, self.resolution, self.resolution), np.uint8)
        used, lines = [], []
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


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
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


def show(name: str) -> str:
    """A file name fit for a message of one line."""
    return name if name.isprintable() else ascii(name)


def reason(error: Exception) -> str:
    """What an error says, fit for a message of one line."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        text = f"not an image of a known kind: {', '.join(FORMATS)}"
    return show(text)


# What lies in a folder or an archive ---------------------------------------------------------------------------------


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix[1:].lower() in SUFFIXES


def entries(root: str, below: str = "") -> list[os.DirEntry[str]]:
    """What lies in root/below and is not hidden, sorted by name. Raises ConfigError."""
    try:
        found = [entry for entry in os.scandir(os.path.join(root, below)) if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"data.path: {root}: {show(below or '.')} cannot be listed ({error.strerror})") from error
    return sorted(found, key=lambda entry: entry.name)


def walk(root: str, below: str = "") -> Iterator[str]:
    """Relative names of the images under root, sorted. Links to files are followed, links to folders are not."""
    for entry in entries(root, below):
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk(root, name)
        elif _is_image(name) and entry.is_file():  # not a pipe or a device, which could be read for ever
            yield name


def in_zip(path: str, on_broken: str) -> tuple[Files, list[int] | None]:
    """The images in an archive, sorted by name, and their labels where it holds a dataset.json. Raises ConfigError."""
    try:
        info = os.stat(path)
        stamp = (info.st_mtime_ns, info.st_size)
        archive = _archive(path, stamp, os.getpid())
        every_name = archive.namelist()
    except Exception as error:
        raise ConfigError(f"data.path: {path} cannot be read as a zip archive ({reason(error)})") from error
    for name in every_name:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise ConfigError(f"data.path: {path} is refused: its member {show(name)!r} points outside the archive")
    names = sorted({name for name in every_name if _is_image(name)})
    labels = _zip_labels(path, archive, names) if "dataset.json" in every_name else None
    return Files(path, names, zipped=True, on_broken=on_broken, stamp=stamp), labels


def _zip_labels(path: str, archive: zipfile.ZipFile, names: list[str]) -> list[int] | None:
    where = f"data.path: dataset.json in {path}"
    try:
        data = json.loads(read_member(archive, archive.getinfo("dataset.json"), MAX_JSON))
    except Exception as error:  # RecursionError included: brackets in brackets without end
        raise ConfigError(f"{where} cannot be read ({reason(error)})") from error
    pairs: Any = data.get("labels") if isinstance(data, dict) else 0
    if pairs is None:
        return None
    try:
        by_name = {str(name): label for name, label in pairs}
    except (TypeError, ValueError):
        raise ConfigError(f'{where} must read {{"labels": [["name.png", 3], ...]}} or {{"labels": null}}') from None
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise ConfigError(f"{where} gives no label for {show(missing)}; add it, or write null for all labels")
    labels = [by_name[name] for name in names]
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < MAX_CLASSES), None)
    if wrong is not None:
        raise ConfigError(f"{where}: labels must be whole numbers 0 to {MAX_CLASSES - 1}, not {str(wrong)[:50]!r}")
    return labels


# All of them at once -------------------------------------------------------------------------------------------------


def settle(files: Files, resolution: int | None, channels: int | None) -> None:
    """Give `files` a size and channels. None: those of the first image; 3 if one of 64 images has colour, else 1.

    Raises ConfigError where no image can be read, or the first is not square and no resolution is given.
    """
    files.resized, files.recoloured = resolution is not None, channels is not None
    count = len(files.names)
    seen = []  # (size, whether it has colour)
    for index in dict.fromkeys([*range(0, count, max(1, count // 64)), *range(count)]):
        try:
            image = files.open(index)
        except BrokenImage as error:
            files.broken(index, error)  # raises where broken images are fatal; named when it is read otherwise
            continue
        seen.append((image.size, image.mode not in GREY_MODES))
        if len(seen) >= 64 or (resolution and channels):
            break
    if not seen:
        raise ConfigError(f"data.path: none of the {count} images in {files.path} can be read")
    width, height = seen[0][0]
    if resolution is None and width != height:
        raise ConfigError(
            f"data.resolution: the images in {files.path} are {width} x {height} pixels, not square; "
            "set data.resolution (for example 64), and all are cropped and resized to it"
        )
    files.resolution = resolution or width
    files.channels = channels or (3 if any(colour for _, colour in seen) else 1)


def decoded(files: Files, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images uint8 (N, C, R, R) and the indices int64 (N,) of those that could be read; `folder` keeps a cache."""
    cache = _cache_path(folder, files)
    if found := _read_cache(cache, files):
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
    bar = tqdm(desc="decoding", total=count, unit="image", disable=None, delay=2)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
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


def _cache_path(folder: str, files: Files) -> Path:
    """Named by all that decides the decoded pixels: the files' names, sizes and times, resolution and channels."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((1, os.path.abspath(files.path), files.stamp, files.resolution, files.channels)).encode())
    for name in files.names:
        digest.update(os.fsencode(name) + b"\0")
        if not files.zipped:
            info = os.stat(os.path.join(files.path, name))
            digest.update(repr((info.st_size, info.st_mtime_ns)).encode())
    return Path(folder) / "cache" / f"decoded-{files.resolution}x{files.channels}-{digest.hexdigest()}.npz"


def _read_cache(cache: Path, files: Files) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, kept = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["kept"])
    except Exception:  # absent, or damaged: decode again
        return None
    return None if files.on_broken == "fail" and len(kept) < len(files.names) else (images, kept)


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
        log.warning("data.dir: the decoded images could not be kept in %s (%s)", cache.parent, reason(error))
