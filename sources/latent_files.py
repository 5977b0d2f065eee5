"""Where latents lie in files, safetensors and EDM2's zip: rows that are read in place, through memory maps."""

import functools
import io
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config import ConfigError
from sources.files import reason, show

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "F64": np.float64}  # small tensors, which are read whole
BYTES = {
    **{name: d.itemsize for name, d in DTYPES.items()},
    **{name: np.dtype(d).itemsize for name, d in WHOLE.items()},
}


@dataclass
class LatentFiles:
    """Rows of latents where they lie in files. Picklable, safe to fork."""

    paths: list[str]
    stamps: list[tuple[int, int]]  # time and size of each: never read a replaced one through an old map
    which: np.ndarray  # int32 (N,), the file of each row
    starts: np.ndarray  # int64 (parts, N), where each part of a row begins in it
    part: tuple[int, int, int]  # channels, height and width of a part
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.which)

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, parts x channels, height, width), as they are stored, and their int64 indices (B,)."""
        size = int(np.prod(self.part)) * self.dtype.itemsize
        rows = np.empty((len(indices), len(self.starts), size), np.uint8)
        for row, index in enumerate(indices):
            file = _mapped(self.paths[self.which[index]], self.stamps[self.which[index]])
            for part, start in enumerate(self.starts[:, index].tolist()):
                rows[row, part] = file[start : start + size]
        channels, height, width = self.part
        values = torch.from_numpy(rows.reshape(-1)).view(self.dtype)
        return values.view(len(indices), len(self.starts) * channels, height, width), torch.tensor(indices)

    __getitems__ = read  # for DataLoader workers


@functools.lru_cache(maxsize=4096)
def _mapped(path: str, stamp: tuple[int, int]) -> np.memmap:
    return np.memmap(path, np.uint8, mode="r")


def stamp(path: str) -> tuple[int, int]:
    """When a file was written, and its size."""
    info = os.stat(path)
    return info.st_mtime_ns, info.st_size


def header(path: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its tensors begin. Raises ConfigError, also where it is cut off."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 * 2**20):
                raise ValueError("its first bytes are no length of a header")
            tensors = json.loads(file.read(length))
        held = [tensor for name, tensor in tensors.items() if name != "__metadata__"]
        for tensor in held:
            (start, stop), wide = tensor["data_offsets"], BYTES.get(tensor["dtype"])
            if not 0 <= start <= stop or (wide and math.prod(tensor["shape"]) * wide != stop - start):
                raise ValueError("its header has tensors of another size than their place")
        whole = 8 + length + max(tensor["data_offsets"][1] for tensor in held)
    except Exception as error:
        raise ConfigError(
            f"data.path: {path} holds no latents: no file of encode.py, zip of EDM2 or safetensors ({reason(error)})"
        ) from None
    if size != whole:
        raise ConfigError(
            f"data.path: {path} is cut off or damaged: {size:,} bytes, {whole:,} by its header; copy it again"
        )
    return tensors, 8 + length


def small(path: str, tensors: dict[str, Any], base: int, name: str) -> np.ndarray:
    """A tensor of integers or float64 that is read whole."""
    start, stop = tensors[name]["data_offsets"]
    if tensors[name]["dtype"] not in WHOLE:
        raise ConfigError(f"data.path: {name} in {path} are {tensors[name]['dtype']}; they must be I64")
    with open(path, "rb") as file:
        file.seek(base + start)
        return np.frombuffer(file.read(stop - start), WHOLE[tensors[name]["dtype"]]).copy()


def npy_starts(path: str, members: list[zipfile.ZipInfo]) -> tuple[np.ndarray, tuple[int, ...], torch.dtype]:
    """Where the numbers of each member begin, int64 (N,), the shape of all and their dtype. Raises ConfigError."""
    file = np.memmap(path, np.uint8, mode="r")
    headers = np.array([m.header_offset for m in members], np.int64)
    if headers.max() + 30 > len(file):
        raise ConfigError(f"data.path: {path} is damaged: its list of contents points beyond its end; copy it again")
    lengths = [file[headers + at].astype(np.int64) | file[headers + at + 1].astype(np.int64) << 8 for at in (26, 28)]
    starts = headers + 30 + lengths[0] + lengths[1]  # a local header, the name, and what is beside it
    first, name = int(starts[0]), show(members[0].filename)
    try:
        content = io.BytesIO(file[first : first + members[0].file_size].tobytes())
        np.lib.format.read_magic(content)
        shape, fortran, kind = np.lib.format.read_array_header_1_0(content)
        begin = file[first : first + content.tell()]
        dtype = {"<f4": torch.float32, "<f2": torch.float16}[kind.str]
        assert not fortran and len(shape) == 3 and shape[0] % 2 == 0 and shape[1] == shape[2]
    except Exception as error:
        wanted = "a float32 or float16 array (2 c, r, r), the mean and the deviation"
        raise ConfigError(f"data.path: {name} in {path} is not {wanted} ({reason(error)})") from None
    size = len(begin) + int(np.prod(shape)) * dtype.itemsize
    for start in range(0, len(members), 4096):
        own = slice(start, start + 4096)
        fits = np.array([m.file_size == size for m in members[own]]) & (starts[own] + size <= len(file))
        fits[fits] = (file[starts[own][fits, None] + np.arange(len(begin))] == begin).all(1)
        if not fits.all():
            odd = show(members[start + int((~fits).argmax())].filename)
            raise ConfigError(f"data.path: {odd} in {path} is no array like {name}; make the zip again")
    return starts + len(begin), shape, dtype
