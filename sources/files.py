"""Images in files: decoded in memory, never extracted, kept decoded where that is slow."""

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
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from config import ConfigError

log = logging.getLogger(__name__)

# Only decoders that stay in memory: PIL's EPS reader, for one, starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
MAX_PIXELS = 100_000_000  # of one image: more is a decompression bomb or a scan nobody trains on
MAX_FILE = 256 * 2**20  # bytes of one image file
HEADER_SECONDS = 20  # spent at most on headers before step 1
CACHE_SECONDS = 5  # sets that take longer to decode are kept, decoded, under data.dir

# Broken files are reported here, one line each, not by PIL.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class BrokenImage(Exception):
    """One image that cannot be read, and why."""

    setting, verb = "path", "cannot be read"
    advice = "mend or remove it"
    kind = "broken"  # what it is counted as where it is left out


class UnlikeOthers(BrokenImage):
    """One image of another size, or in colour among grey ones, where no setting says what to do with it."""

    verb = "is unlike the others"

    def __init__(self, setting: str, why: str, advice: str, kind: str):
        super().__init__(why)
        self.setting, self.advice, self.kind = setting, advice, kind


@dataclass
class Files:
    """Images in a folder or a zip archive, decoded, cropped and resized one by one. Picklable, safe to fork."""

    path: str  # the folder or the archive
    names: Sequence[str]  # relative to it, with forward slashes
    zipped: bool
    on_broken: str = "skip"  # or "fail"
    resolution: int = 0  # pixels per side
    channels: int = 0
    resized: bool = True  # False: data.resolution is unset, and an image of another size is an error
    recoloured: bool = True  # False: data.channels is unset, and a colour image among grey ones is an error
    white: int | None = None  # data.white_level
    stamp: tuple[int, int] = (0, 0)  # the archive's time and size: never read a replaced one through an old index
    left_out: Counter[str] = field(default_factory=Counter)  # how many files were left out, by reason
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of some images, as they are
    deep: bool = False  # whether any of those have 16 bits

    def archive(self) -> zipfile.ZipFile:
        """The open archive."""
        return _archive(self.path, self.stamp, os.getpid())

    def stream(self, index: int) -> IO[bytes]:
        """The file, to be read; errors are whatever the disk or the archive raises."""
        if self.zipped:
            return open_member(self.archive(), self.archive().getinfo(self.names[index]), MAX_FILE)
        return open(os.path.join(self.path, self.names[index]), "rb")

    def size(self, index: int) -> int:
        """Bytes of a file in a folder; 0 where it is gone."""
        try:
            return os.stat(os.path.join(self.path, self.names[index])).st_size
        except OSError:
            return 0

    def states(self) -> Iterator[bytes]:
        """What is another where the files are others: their names and, in a folder, sizes and times."""
        for name in self.names:
            yield os.fsencode(name) + b"\0"
            if not self.zipped:
                info = os.stat(os.path.join(self.path, name))
                yield repr((info.st_size, info.st_mtime_ns)).encode()

    def open(self, index: int, header: bool = False) -> Image.Image:
        """The image, its header read and checked; of no use but for that where only the header is read.

        Raises BrokenImage.
        """
        try:
            with self.stream(index) as file:
                if header:
                    image = Image.open(file, formats=FORMATS)
                else:
                    data = file.read(MAX_FILE + 1)
                    if len(data) > MAX_FILE:
                        raise BrokenImage(f"the file is larger than {MAX_FILE >> 20} MiB")
                    image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # a hostile file can raise anything from a decoder
            raise BrokenImage(reason(error)) from error
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImage(f"{image.width} x {image.height} pixels are too many: a decompression bomb?")
        return image

    def compare(self, image: Image.Image) -> None:
        """Raise UnlikeOthers for an image that would need a setting."""
        r = self.resolution
        if not self.resized and image.size != (r, r):
            why = f"it is {image.width} x {image.height} pixels, others are {r} x {r}"
            advice = f"set data.resolution (for example {r}), and all are cropped and resized to it"
            raise UnlikeOthers("resolution", why, advice, "of another size")
        if not self.recoloured and self.channels == 1 and image.mode not in GREY_MODES:
            why, advice = "it has colours, others are grey", "set data.channels: 1 or 3"
            raise UnlikeOthers("channels", why, advice, "in colour among grey ones")

    def decode(self, index: int) -> np.ndarray:
        """uint8 (C, R, R). Raises BrokenImage."""
        image = self.open(index)
        self.compare(image)
        try:
            ImageOps.exif_transpose(image, in_place=True)
            array = np.array(square(_plain_mode(image, self.channels, self.white), self.resolution))
        except BrokenImage:
            raise
        except Exception as error:
            raise BrokenImage(reason(error)) from error
        return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]

    def broken(self, index: int, error: BrokenImage) -> str:
        """The one line about a broken image; raised as a ConfigError where the config says so."""
        line = f"data.{error.setting}: {show(self.names[index])} in {self.path} {error.verb} ({error})"
        if self.on_broken == "fail":
            raise ConfigError(f"{line}; {error.advice}, or set data.on_broken: skip")
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


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> IO[bytes]:
    """A member, to be read. Raises BrokenImage where it is encrypted, oddly compressed, or over `limit` bytes."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BrokenImage("its compression is not one of stored and deflated")  # the others unpack without a bound
    if info.flag_bits & 1:
        raise BrokenImage("it is encrypted")
    if info.file_size > limit:
        raise BrokenImage(f"it unpacks to more than {limit >> 20} MiB")
    return archive.open(info)


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes; errors as open_member's."""
    with open_member(archive, info, limit) as member:
        return member.read(limit + 1)


# Pixels: what every source of images goes through -------------------------------------------------------------------


def square(image: Image.Image, resolution: int | None) -> Image.Image:
    """The central square, at `resolution` pixels by PIL's Lanczos filter, antialiased. None: cropped only."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:
        image = image.crop((left, top, left + side, top + side))
    if resolution in (None, side):
        return image
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def _eight_bits(image: Image.Image, white: int | None) -> Image.Image:
    """Grey of up to 16 bits scaled to 8, from 0 to `white`; None: from the lowest to the highest value of its kind."""
    values = np.asarray(image).astype(np.float64)  # PIL's own conversion would clip 16 bits, not scale them
    bits, negative, signed = (_tag(image, number, usual) for number, usual in ((258, 16), (262, 1), (339, 1)))
    if bits > 16 and (values.min() < 0 or values.max() > 65535):
        raise BrokenImage(f"its pixels are integers of {bits} bits; save it with 8 or 16 bits")
    if signed == 2 and bits == 16 and white is None:
        values += 32768
    top = white or (2**bits - 1 if bits < 16 else 65535)
    scaled = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    # PIL turns white-is-zero TIFFs itself where they have up to 8 bits
    return Image.fromarray(255 - scaled if negative == 0 else scaled)


def _tag(image: Image.Image, number: int, usual: int) -> int:
    """A TIFF's tag, the first of several; `usual` where there is none."""
    value = getattr(image, "tag_v2", {}).get(number, usual)
    return int(value[0] if isinstance(value, tuple) else value)


def _plain_mode(image: Image.Image, channels: int, white: int | None = None) -> Image.Image:
    """Any PIL mode to L or RGB: 16 bits are scaled to 8, transparent pixels are laid on white."""
    if image.mode == "F":
        raise BrokenImage("its pixels are floats; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image, white)
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


# All of them at once -------------------------------------------------------------------------------------------------


def not_square(where: str, width: int, height: int) -> ConfigError:
    """The error for images, of any source, whose size no setting says."""
    return ConfigError(
        f"data.resolution: the images in {where} are {width} x {height} pixels, not square; "
        "set data.resolution (for example 64), and all are cropped and resized to it"
    )


def settle(files: Files, resolution: int | None, channels: int | None) -> None:
    """Give `files` a size and channels. None: those of the first image; 3 if one of 64 images has colour, else 1.

    Raises ConfigError where no image can be read, or the first is not square and no resolution is given.
    """
    files.resized, files.recoloured = resolution is not None, channels is not None
    count = len(files.names)
    seen = []
    for index in dict.fromkeys([*range(0, count, max(1, count // 64)), *range(count)]):
        try:
            seen.append(files.open(index, header=True))
        except BrokenImage as error:
            files.broken(index, error)  # raises where broken images are fatal; named when it is read otherwise
        if len(seen) >= 64:
            break
    if not seen:
        raise ConfigError(f"data.path: none of the {count} images in {files.path} can be read")
    width, height = seen[0].size
    files.sizes = tuple(image.size for image in seen)
    files.deep = any(image.mode.startswith("I") for image in seen)
    if resolution is None and width != height:
        raise not_square(files.path, width, height)
    files.resolution = resolution or width
    files.channels = channels or (3 if any(image.mode not in GREY_MODES for image in seen) else 1)


def check_headers(files: Files) -> None:
    """Look at the headers of images that are decoded later, as far as HEADER_SECONDS go; count what is broken.

    Raises ConfigError where broken images are fatal.
    """
    started, count = time.monotonic(), len(files.names)

    def fault(index: int) -> BrokenImage | None:
        try:
            files.compare(files.open(index, header=True))
        except BrokenImage as error:
            return error
        return None

    bar = tqdm(desc="reading headers", total=count, unit="image", disable=None, delay=2)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
        for start in range(0, count, 1024):
            if time.monotonic() - started > HEADER_SECONDS:
                return
            piece = range(start, min(start + 1024, count))
            for index, error in zip(piece, pool.map(fault, piece), strict=True):
                if error:
                    files.broken(index, error)  # raises, or it is named when it is read
                    files.left_out[error.kind] += 1
            bar.update(len(piece))


def decoded(files: Files, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images uint8 (N, C, R, R) and the indices int64 (N,) of those that could be read; `folder` keeps a cache."""
    cache = _cache_path(folder, files)
    if found := _read_cache(cache, files):
        images, kept, left_out = found
        files.left_out.update(left_out)
        return images, kept
    started = time.monotonic()
    count = len(files.names)
    images = np.empty((count, files.channels, files.resolution, files.resolution), np.uint8)

    def decode(index: int) -> BrokenImage | None:
        try:
            images[index] = files.decode(index)
        except BrokenImage as error:
            return error
        return None

    kept, left_out = [], Counter[str]()
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
                    left_out[error.kind] += 1
            bar.update(len(piece))
    if not kept:
        raise ConfigError(f"data.path: none of the {count} images in {files.path} can be read")
    images, indices = images if len(kept) == count else images[kept], np.array(kept, np.int64)
    if time.monotonic() - started > CACHE_SECONDS:
        keep(cache, "the decoded images", images=images, kept=indices, left_out=json.dumps(left_out))
    files.left_out.update(left_out)
    return torch.from_numpy(images), torch.from_numpy(indices)


def _cache_path(folder: str, files: Files) -> Path:
    """Named by all that decides the decoded pixels: the files' states, resolution and channels."""
    digest = hashlib.blake2b(digest_size=12)
    made = (2, os.path.abspath(files.path), files.stamp, files.resolution, files.channels, files.white)
    digest.update(repr(made).encode())
    for state in files.states():
        digest.update(state)
    return Path(folder) / "cache" / f"decoded-{files.resolution}x{files.channels}-{digest.hexdigest()}.npz"


def _read_cache(cache: Path, files: Files) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]] | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, kept = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["kept"])
            left_out = json.loads(str(arrays["left_out"]))
    except Exception:  # absent, or damaged: decode again
        return None
    return None if files.on_broken == "fail" and len(kept) < len(files.names) else (images, kept, left_out)


def keep(cache: Path, what: str, **arrays: Any) -> None:
    """Write an npz of what costs time to find out again, whole or not at all; a failure is a warning about `what`."""
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, cache)
    except OSError as error:  # a full disk costs the next start its time, nothing else
        with contextlib.suppress(OSError):
            partial.unlink()
        log.warning("data.dir: %s could not be kept in %s (%s)", what, cache.parent, reason(error))
