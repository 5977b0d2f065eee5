"""What every objective shares: the form of its result, the shape of sigma, and one dropout mask for two passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Model = Callable[..., torch.Tensor]  # model(x, sigma, **conditions) -> clean data of x's shape


@dataclass
class Output:
    """What an objective returns."""

    loss: torch.Tensor  # (B,), one value a sample; the caller takes the mean
    # Name -> scalar for the curves, or (sum, count) of a mean over part of the batch.
    log: dict[str, torch.Tensor | float | tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def append_dims(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """v (B,) shaped to broadcast over x (B, ...), in x's dtype."""
    return v.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


LEVELS = (0.0, 0.1, 1.0, 10.0, float("inf"))  # bins of sigma for the curves


def by_level(loss: torch.Tensor, sigma: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The loss (B,) in bins of the noise level (B,), as (sum, count): which levels learn, and which do not."""
    bins = {}
    for low, high in itertools.pairwise(LEVELS):
        inside = (sigma >= low) & (sigma < high)
        bins[f"loss_by_sigma/{low:g}-{high:g}"] = loss.detach().where(inside, 0).sum(), inside.sum()
    return bins


def rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the generators that dropout on `device` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replayed(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw again what was drawn since `state` was taken, then go on as if nothing had been drawn twice.

    The two passes of a consistency step must drop the same units (2310.14189 sec. 3.3): otherwise the loss is mostly
    the difference between two masks.
    """
    cpu, cuda = rng_state(device)
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    yield
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
