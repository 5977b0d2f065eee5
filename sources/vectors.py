"""Vectors: samples that are floats of any shape, their conditions, their normalisation, and a score.

    dataset = data.load(cfg.data)  # a Vectors where data.path is an npz with an array `vectors`
    scaling = Scaling.fit(dataset, sigma_data=0.5)
    x = scaling.normalise(dataset.values)  # mean 0 and standard deviation sigma_data in every element
    dataset.values == scaling.restore(x)

Actions, points and signals are all vectors here; a policy is a model of actions conditioned on states.
"""

from __future__ import annotations

import copy
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from config import ConfigError
from objectives.draws import key

SQUASHED = 0.999  # tanh reaches its bounds only at infinity: data nearer than this to them are moved here
SCORED = 2000  # most vectors in a score: its time grows with their number's cube


@dataclass
class Vectors:
    """A dataset of floats in memory; what data.Dataset is for images."""

    name: str
    values: torch.Tensor  # float32 (N, *shape), in the data's own units
    conditions: torch.Tensor | None = None  # float32 (N, K), in their own units
    low: torch.Tensor | None = None  # float32 (*shape): the range that samples must not leave, as a robot's torque
    high: torch.Tensor | None = None
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

    def to(self, device: torch.device | str) -> Vectors:
        """The same dataset on `device`."""
        conditions = None if self.conditions is None else self.conditions.to(device)
        return replace(self, values=self.values.to(device), conditions=conditions)

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (B, *shape) and conditions (B, K) or None, for int64 (B,) indices."""
        indices = indices.to(self.values.device, non_blocking=True)
        return self.values[indices], None if self.conditions is None else self.conditions[indices]

    def draw_conditions(self, seed: int, indices: Sequence[int]) -> torch.Tensor | None:
        """A row of the training set's conditions for each sample, (len(indices), K); by (seed, index) alone."""
        if self.conditions is None:
            return None
        return self.conditions[torch.tensor([key(seed, "condition", int(i)) % len(self) for i in indices])]


def from_arrays(cfg: Any, path: str, arrays: dict[str, np.ndarray | None]) -> Vectors:
    """The dataset in an npz's arrays: `vectors` (N, ...) of floats and, where they are there, `conditions` (N, K) of
    floats, `low` and `high` (...), the range of the vectors' elements.

    cfg: the config's `data` section. Raises ConfigError.
    """
    for option in ("resolution", "channels"):
        if getattr(cfg, option) is not None:
            raise ConfigError(f"data.{option}: is for images, and {path} holds vectors; set it to null")
    if cfg.flip or cfg.augment:
        raise ConfigError(f"data.{'flip' if cfg.flip else 'augment'}: is for images, and {path} holds vectors")
    tensors = {name: None if a is None else _floats(f"{name} in {path}", a) for name, a in arrays.items()}
    values, conditions, low, high = (tensors[name] for name in ("vectors", "conditions", "low", "high"))
    if values.ndim < 2 or values.numel() == 0:
        raise ConfigError(f"data.path: vectors in {path} are {_show(values)}; they must be (N, D), or (N, ...), N > 0")
    if conditions is not None and (conditions.ndim != 2 or len(conditions) != len(values) or not conditions.numel()):
        raise ConfigError(f"data.path: conditions in {path} are {_show(conditions)}; they must be ({len(values)}, K)")
    if cfg.conditional and conditions is None:
        raise ConfigError(
            f"data.conditional: {path} has no array `conditions` (N, K); add it, or set data.conditional: false"
        )
    if cfg.bounds is not None:
        _check_bounds(cfg, path, values, low, high)
    return Vectors(cfg.name, values, conditions if cfg.conditional else None, low, high)


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


def _show(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_bounds(
    cfg: Any, path: str, values: torch.Tensor, low: torch.Tensor | None, high: torch.Tensor | None
) -> None:
    if low is None or high is None:
        raise ConfigError(f"data.bounds: {cfg.bounds} needs arrays `low` and `high` in {path}, {_show(values[0])} each")
    if low.shape != values.shape[1:] or high.shape != values.shape[1:] or not (low < high).all():
        raise ConfigError(
            f"data.path: low and high in {path} are {_show(low)} and {_show(high)}; they must be {_show(values[0])}, "
            "and low below high"
        )
    slack = 1e-5 * (high - low)  # a rounding error is no mistake
    outside = ((values < low - slack) | (values > high + slack)).flatten(1).any(1).nonzero()
    if len(outside):
        raise ConfigError(f"data.path: row {int(outside[0])} of vectors in {path} is outside of low and high")


class Scaling(torch.nn.Module):
    """Normalises vectors to mean 0 and standard deviation sigma_data in every element, conditions to 0 and 1, and back.

    bounds: how samples are kept between `low` and `high`: "clamp" cuts them off; "tanh" has the model learn
    atanh of the data, so that every sample is inside and none is cut; None: they may leave.

    It moves with its model (`model.scaling`), but is no part of its weights: `values` goes into the checkpoint apart.
    """

    def __init__(self, sigma_data: float, bounds: str | None = None, **tensors: Any):
        """tensors: mean, std, condition_mean, condition_std, low, high; numbers in any container, or None."""
        super().__init__()
        self.sigma_data, self.bounds = sigma_data, bounds
        for name in ("mean", "std", "condition_mean", "condition_std", "low", "high"):
            given = tensors.get(name)
            tensor = None if given is None else torch.as_tensor(given, dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def fit(cls, dataset: Vectors, sigma_data: float = 0.5, bounds: str | None = None) -> Scaling:
        """The normalisation of a training set. An element that never changes comes back as it was in every sample."""
        limits = {"low": dataset.low, "high": dataset.high} if bounds else {}
        scaling = cls(sigma_data, bounds, **limits)
        for name, values in (("", scaling.open(dataset.values)), ("condition_", dataset.conditions)):
            if values is not None:
                std, mean = torch.std_mean(values.double(), dim=0, correction=0)
                std[std < 1e-6 * mean.abs()] = 0
                setattr(scaling, f"{name}mean", mean.float())
                setattr(scaling, f"{name}std", std.float())
        return scaling

    def values(self) -> dict[str, Any]:
        """What makes the same Scaling again, Scaling(**values), in plain numbers and lists."""
        tensors = {name: None if b is None else b.tolist() for name, b in self._buffers.items()}
        return {"sigma_data": self.sigma_data, "bounds": self.bounds, **tensors}

    def normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Data (B, *shape) in their own units -> what the model sees; in their dtype."""
        return (self.open(values) - self.mean) / nonzero(self.std) * self.sigma_data

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """What the model gives (B, *shape) -> data in their own units, inside the bounds: the inverse."""
        values = x / self.sigma_data * self.std + self.mean
        if self.bounds == "tanh":
            values = (self.low + self.high) / 2 + (self.high - self.low) / 2 * values.tanh()
        # tanh rounds too
        return values if self.bounds is None else torch.maximum(torch.minimum(values, self.high), self.low)

    def condition(self, conditions: torch.Tensor) -> torch.Tensor:
        """Conditions (B, K) in their own units -> what the model sees: mean 0, standard deviation 1."""
        return (conditions - self.condition_mean) / nonzero(self.condition_std)

    def open(self, values: torch.Tensor) -> torch.Tensor:
        """atanh of the values' place between the bounds, for bounds "tanh"; else the values."""
        if self.bounds != "tanh":
            return values
        place = (2 * values - self.low - self.high) / (self.high - self.low)
        return place.clamp(-SQUASHED, SQUASHED).atanh()


def nonzero(std: torch.Tensor) -> torch.Tensor:
    """std with 1 in place of 0, to divide by."""
    return torch.where(std == 0, 1, std)


# A score --------------------------------------------------------------------------------------------------------------


def wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Exact 2-Wasserstein distance of two sets of points of one size, (N, ...) each, in their units.

    The square root of the least mean square distance over all pairings, found by scipy's linear_sum_assignment.
    """
    from scipy.optimize import linear_sum_assignment

    square = torch.cdist(a.double().flatten(1), b.double().flatten(1)).square().cpu().numpy()
    return math.sqrt(square[linear_sum_assignment(square)].mean())


def score(
    samples: torch.Tensor, conditions: torch.Tensor | None, dataset: Vectors, scaling: Scaling
) -> tuple[dict[str, float], int]:
    """{"w2", "w2_of_data"} and the number of vectors compared.

    w2: 2-Wasserstein distance of samples (M, *shape) to as many training vectors, in the data's standard deviations;
    with conditions (M, K), of the pairs of both. w2_of_data: the same of other training vectors, what perfect samples
    would get.
    """
    n = min(len(samples), len(dataset) // 2, SCORED)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 2 * n]
    scaling = copy.deepcopy(scaling).cpu()

    def joint(values: torch.Tensor, conditions: torch.Tensor | None) -> torch.Tensor:
        x = (scaling.normalise(values) / scaling.sigma_data).flatten(1)
        return x if conditions is None else torch.cat([x, scaling.condition(conditions)], 1)

    own = joint(samples[:n], conditions if conditions is None else conditions[:n])
    a, b = joint(*dataset.read(rows)).split(n)
    return {"w2": wasserstein(own, a), "w2_of_data": wasserstein(b, a)}, n


def describe(scores: dict[str, float], num: int) -> str:
    """The scores in words."""
    return (
        f"2-Wasserstein distance {scores['w2']:.4g} ({scores['w2_of_data']:.4g} between two parts of the training set; "
        f"{num:,} vectors, in standard deviations of the data)"
    )


# Files ----------------------------------------------------------------------------------------------------------------


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
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--conditions: {path} cannot be read as an npy, or an npz's `conditions` ({reason})"
        ) from None
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim or not len(array):
        raise ConfigError(f"--conditions: {path} holds {array.dtype} {array.shape}; this model needs floats (M, {dim})")
    if not np.isfinite(array).all():
        raise ConfigError(f"--conditions: {path} holds numbers that are not finite")
    return torch.from_numpy(array.astype(np.float32))
