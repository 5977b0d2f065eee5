"""Vectors: samples that are floats of any shape, with or without conditions; and their files.

    dataset = data.load(cfg.data)  # a VectorSet where data.path is an npz with an array `vectors`
    codec = dataset.codec(cfg)  # their normalisation

Actions, points and signals are all vectors here; a policy is a model of actions conditioned on states.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from config import ConfigError
from objectives.draws import key
from sources import facts
from sources.codecs import VectorCodec


@dataclass
class VectorSet:
    """A dataset of floats in memory; what images.ImageSet is for images."""

    name: str
    values: torch.Tensor  # float32 (N, *shape), in the data's own units
    conditions: torch.Tensor | None = None  # float32 (N, K), in their own units
    low: torch.Tensor | None = None  # float32 (*shape): the range that samples must not leave, as a robot's torque
    high: torch.Tensor | None = None
    path: str | None = None  # where they were read
    files = None  # nothing is read later: see data.batches

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.values.shape[1:])

    @property
    def condition_dim(self) -> int:
        """K; 0 without conditions."""
        return 0 if self.conditions is None else self.conditions.shape[1]

    def to(self, device: torch.device | str) -> "VectorSet":
        """The same dataset on `device`."""
        conditions = None if self.conditions is None else self.conditions.to(device)
        return replace(self, values=self.values.to(device), conditions=conditions)

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (B, *shape) and conditions (B, K) or None, for int64 (B,) indices."""
        indices = indices.to(self.values.device, non_blocking=True)
        return self.values[indices], None if self.conditions is None else self.conditions[indices]

    def codec(self, cfg: Any) -> VectorCodec:
        """The normalisation of these vectors that a Config asks for: its network.sigma_data and data.bounds."""
        how = (cfg.network.sigma_data, cfg.data.bounds)
        codec = VectorCodec.fit(self.values, self.conditions, *how, self.low, self.high)
        codec.facts = facts.identity(self.facts())
        return codec

    def facts(self) -> dict[str, Any]:
        """What was read: as images.ImageSet.facts; the size is that of a vector."""
        return {
            "name": self.name,
            "from": self.path or self.name,
            "count": len(self),
            "size": list(self.shape),
            "channels": None,
            "resize": None,
            "classes": None,
            "left_out": {},
            "given": f"conditions of {self.condition_dim}" if self.condition_dim else "no conditions",
            "fingerprint": facts.of_tensors(self.values, self.conditions),
        }

    def said(self) -> list[str]:
        """The line that a run begins with."""
        return [facts.told(self.facts(), "vectors")]

    def draw_given(self, seed: int, indices: Sequence[int]) -> torch.Tensor | None:
        """A row of the training set's conditions for each sample, (len(indices), K); by (seed, index) alone."""
        if self.conditions is None:
            return None
        return self.conditions[torch.tensor([key(seed, "condition", int(i)) % len(self) for i in indices])]


def from_arrays(cfg: Any, path: str, arrays: dict[str, np.ndarray | None]) -> VectorSet:
    """The dataset in an npz's arrays: `vectors` (N, ...) of floats and, where they are there, `conditions` (N, K) of
    floats, `low` and `high` (...), the range of the vectors' elements.
    cfg: the config's `data` section. Raises ConfigError.
    """
    for option in ("resolution", "channels"):
        if getattr(cfg, option) is not None:
            raise ConfigError(f"data.{option}: is for images, and {path} holds vectors; set it to null")
    if cfg.flip or cfg.augment:
        raise ConfigError(f"data.{'flip' if cfg.flip else 'augment'}: is for images, and {path} holds vectors")
    found = [(name, arrays[name]) for name in ("vectors", "conditions", "low", "high")]
    values, conditions, low, high = (None if a is None else _floats(f"{name} in {path}", a) for name, a in found)
    shape = tuple(values.shape)
    if values.ndim < 2 or values.numel() == 0:
        raise ConfigError(f"data.path: vectors in {path} are {shape}; they must be (N, D), or (N, ...), N > 0")
    n, shape = shape[0], shape[1:]
    if conditions is not None and (conditions.ndim != 2 or len(conditions) != n or not conditions.numel()):
        raise ConfigError(f"data.path: conditions in {path} are {tuple(conditions.shape)}; they must be ({n}, K)")
    if cfg.conditional and conditions is None:
        raise ConfigError(
            f"data.conditional: {path} has no array `conditions` (N, K); add it, or set data.conditional: false"
        )
    dataset = VectorSet(cfg.name, values, conditions if cfg.conditional else None, low, high, path)
    if cfg.bounds is None:
        return dataset
    if low is None or high is None:
        raise ConfigError(f"data.bounds: {cfg.bounds} needs arrays `low` and `high` in {path}, {shape} each")
    if low.shape != shape or high.shape != shape or not (low < high).all():
        raise ConfigError(
            f"data.path: low and high in {path} are {tuple(low.shape)} and {tuple(high.shape)}; they must be {shape}, "
            "and low below high"
        )
    slack = 1e-5 * (high - low)  # a rounding error is no mistake
    outside = ((values < low - slack) | (values > high + slack)).flatten(1).any(1).nonzero()
    if len(outside):
        raise ConfigError(f"data.path: row {int(outside[0])} of vectors in {path} is outside of low and high")
    return dataset


def _floats(where: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind != "f":
        raise ConfigError(f"data.path: {where} are {array.dtype} {array.shape}; they must be floats")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(array.astype(np.float32))
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        row = f" in row {int(bad[0][0])}" if tensor.ndim else ""
        raise ConfigError(f"data.path: {where} are not finite in float32{row}; remove what is not")
    return tensor


def write(samples: torch.Tensor, conditions: torch.Tensor | None, file: BinaryIO) -> None:
    """An npz with `vectors` and, where there are any, `conditions`: what data.name: npz reads."""
    arrays = {"vectors": samples} if conditions is None else {"vectors": samples, "conditions": conditions}
    np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in arrays.items()})


def read_conditions(path: str, dim: int) -> torch.Tensor:
    """float32 (M, dim) of an npy, or of the array `conditions` in an npz. Raises ConfigError."""
    try:
        array = np.load(Path(path), allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array as arrays:
                array = arrays["conditions"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--conditions: {path} cannot be read as an npy, or an npz's `conditions` ({why})") from None
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim or not len(array):
        raise ConfigError(f"--conditions: {path} holds {array.dtype} {array.shape}; this model needs floats (M, {dim})")
    if not np.isfinite(array).all():
        raise ConfigError(f"--conditions: {path} holds numbers that are not finite")
    return torch.from_numpy(array.astype(np.float32))
