"""What objectives share: their result, one dropout mask for two passes, and small differences of two outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sampler import guided

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


def by_time(value: torch.Tensor, t: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a flow map's curves show (B,) in quarters of the time t (B,), as (sum, count)."""
    quarter = (4 * t).long().clamp(0, 3)
    inside = [(f"loss_by_t/{i / 4:g}-{(i + 1) / 4:g}", quarter == i) for i in range(4)]
    return {name: (value.detach().where(rows, 0).sum(), rows.sum()) for name, rows in inside}


def rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the generators that dropout on `device` draws from."""
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    """Take the generators of `device` back to a state of `rng_state`."""
    torch.set_rng_state(state[0])
    if device.type == "mps":
        torch.mps.set_rng_state(state[1])
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replayed(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw again what was drawn since `state` was taken, then go on as if nothing had been drawn twice.

    The two passes of a consistency step must drop the same units (2310.14189 sec. 3.3): otherwise the loss is mostly
    the difference between two masks.
    """
    now = rng_state(device)
    set_rng_state(state, device)
    yield
    set_rng_state(now, device)


def along(
    model: Model,
    x: torch.Tensor,
    sigma: torch.Tensor,
    dx: torch.Tensor,
    dsigma: torch.Tensor,
    **conditions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(D, its derivative along (dx, dsigma)) at x (B, ...) and sigma (B,), without gradient; by forward mode.

    A networks.Preconditioner has its own way, compiled where training compiles; any other module is traced as it is.
    """
    with torch.no_grad():
        if hasattr(model, "jvp"):
            return model.jvp(x, sigma, dx, dsigma, **conditions)
        return torch.func.jvp(lambda x, sigma: model(x, sigma, **conditions), (x, sigma), (dx, dsigma))


def along_map(
    model: Model,
    z: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    dz: torch.Tensor,
    dt: torch.Tensor,
    dr: torch.Tensor,
    **conditions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, its derivative along (dz, dt, dr)) of a flow map at z (B, ...), t and r (B,): `along`, with two times."""
    with torch.no_grad():
        if hasattr(model, "jvp"):
            return model.jvp(z, t, r, dz, dt, dr, **conditions)
        return torch.func.jvp(lambda z, t, r: model(z, t, r, **conditions), (z, t, r), (dz, dt, dr))


def taught(
    teacher: Model, w: float | Sequence[float] | None, conditions: dict[str, torch.Tensor | None]
) -> tuple[Model, dict[str, torch.Tensor | None]]:
    """The teacher guided by w, or by the `guidance` (B,) that the student is told, and the conditions that it takes."""
    return guided(teacher, conditions.get("guidance", w)), {k: v for k, v in conditions.items() if k != "guidance"}


def passes_alone(model: Model, conditions: dict[str, torch.Tensor | None]) -> bool:
    """Whether some rows of a batch may pass the network without the others and drop the same units as with them: their
    masks follow from keys, or the network has no dropout."""
    return "dropout_keys" in conditions or getattr(getattr(model, "model", None), "dropout", None) == 0


@contextmanager
def in_float32(*models: Model) -> Iterator[None]:
    """Within this context networks.Wrappers compute in their weights' dtype, not in half precision."""
    before = {model: model.autocast for model in models if hasattr(model, "autocast")}
    for model in before:
        model.autocast = None
    yield
    for model, dtype in before.items():
        model.autocast = dtype


DIFFERENCES = ("auto", "two_passes", "forward_mode")


def forward_mode(model: Model, difference: str, gap: float) -> bool:
    """Whether D_t - D_r is taken in forward mode, as the setting `difference` says, for a gap (t - r) / t.

    auto: where the network computes in half precision, whose rounding would drown the difference of two outputs, and
    the midpoint is `near` enough.
    """
    if difference != "auto":
        return difference == "forward_mode"
    return getattr(model, "autocast", None) is not None and near(model, gap)


WIDE = 1 / 16  # (t - r) / t above which half precision tells two outputs apart


def near(model: Model, gap: float) -> bool:
    """Whether the midpoint's error, of third order in the gap (t - r) / t, is below that of half precision.

    Within the gap the noise embedding must not turn by more than 1/8 radian: Fourier features of scale 16 turn fast.
    """
    return gap <= WIDE and gap * getattr(model, "turn", 0.25) <= 1 / 8


def half_holds(model: Model, difference: str, gap: float) -> bool:
    """Whether the setting `difference` has a form that is right in half precision for a gap (t - r) / t."""
    return gap > WIDE or (difference != "two_passes" and near(model, gap))


def step_between(
    model: Model,
    x: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    gap: torch.Tensor,  # t - r (B,), by one who knows it better than by subtracting
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """D(x + t z; t) - D(x + r z; r) (B, ...) as (t - r) dD/ds at the midpoint s = (t + r) / 2; without gradient.

    Its relative error is that of the arithmetic, however small t - r; the midpoint's own is of third order in t - r.
    """
    middle = (t + r) / 2
    _, slope = along(model, x + append_dims(middle, x) * noise, middle, noise, torch.ones_like(middle), **conditions)
    return append_dims(gap, x) * slope


def held(value: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient of D: a difference D - sg[.] whose value is known better than D rounds."""
    return value + (D - D.detach())
