"""Averaged weights: what is sampled, scored and published.

python ema.py rebuild RUN --std 0.05    makes, after a run with ema.std, the average of any other length
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Sequence

import torch


def decay_from_half_life(half_life: float, batch_size: int) -> float:
    """Decay per step whose weight halves every `half_life` images (2206.00364 app. F)."""
    return 0.5 ** (batch_size / half_life)


def warmed_up(decay: float, step: int, ratio: float) -> float:
    """The decay used at step >= 1: its half-life is held to at most `ratio` x the steps so far (2206.00364 app. F).

    Without it a short run's average still holds the initialisation. ratio 0 turns it off; EDM uses 0.05.
    """
    if ratio <= 0 or decay <= 0:
        return decay
    half_life = min(-math.log(2) / math.log(decay), max(step, 1) * ratio)
    return 0.5 ** (1 / half_life)


class EMA:
    """A moving average of a module: `self.module` is a frozen copy in eval mode.

    Exponential where `decay` is given; where `std` is, its weight over the past is a power of time, whatever the run's
    length (2312.02696 sec. 3.1).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        decay: float | None = None,  # per optimizer step: average <- decay average + (1 - decay) weights
        warmup: float = 0.0,  # see warmed_up
        std: float | None = None,  # instead of decay: the average's width as a share of the run, see power_exponent
    ):
        if (decay is None) == (std is None):
            raise ValueError("give either decay or std")
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.module.autocast = None  # sampled in float32, as generate.py will
        self.decay, self.warmup, self.std = decay, warmup, std

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1. Buffers are copied."""
        decay = warmed_up(self.decay, step, self.warmup) if self.std is None else power_decay(self.std, step, 1)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


# ----------------------------------------------------------------------------
# Power-function averages, and others made of them after the run (2312.02696 sec. 3, app. C)


def power_exponent(std: float) -> float:
    """gamma of the average whose weights t^gamma, t in (0, T], have standard deviation std T (eq. 126).

    std in (0, 0.288): from 12^-1/2 on, where gamma is 0, there is none. Raises ValueError.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"std is {std}; it must lie between 0 and 0.288")
    # std^2 = (g + 1) / ((g + 2)^2 (g + 3)) is a cubic; Newton's steps come down to its largest root from above.
    t = std**-2
    gamma = math.sqrt(t)
    for _ in range(100):
        value = ((gamma + 7) * gamma + 16 - t) * gamma + 12 - t
        step = value / ((3 * gamma + 14) * gamma + 16 - t)
        gamma -= step
        if abs(step) < 1e-15 * gamma:
            break
    return gamma


def power_decay(std: float, nimg: float, batch: float) -> float:
    """The decay of the step after which `nimg` images have been seen, `batch` of them in it (eq. 127).

    0 at the first step: nothing of the initialisation stays.
    """
    return (1 - batch / nimg) ** (power_exponent(std) + 1)


def rebuild_weights(
    nimg: Sequence[float], std: Sequence[float], target_nimg: float, target_std: float
) -> tuple[torch.Tensor, float]:
    """(coefficients, distance) of the sum of snapshots that is nearest to another average (2312.02696 app. C.3).

    Snapshot i is the average of width std[i] after nimg[i] images, of N; the target's width is target_std, after
    target_nimg. Coefficients are float64 (N,), their sum 1. The distance of the sum's weights over the past from the
    target's is relative (L2 norms): below 0.1 with tens of snapshots of two widths. ValueError for a width that no
    average has, and for two snapshots alike.
    """
    times, end = torch.tensor(nimg, dtype=torch.float64), torch.tensor([target_nimg], dtype=torch.float64)
    gammas, gamma = (torch.tensor([power_exponent(s) for s in some], dtype=end.dtype) for some in (std, [target_std]))
    among, with_target = _overlap(times, gammas, times, gammas), _overlap(times, gammas, end, gamma)
    try:
        weights = torch.linalg.solve(among, with_target)
    except torch.linalg.LinAlgError:
        raise ValueError("two of the snapshots are the same") from None
    weights = weights / weights.sum()
    square = _overlap(end, gamma, end, gamma)
    missed = (weights.T @ among @ weights - 2 * weights.T @ with_target + square) / square
    return weights.flatten(), missed.clamp(min=0).sqrt().item()


def _overlap(t: torch.Tensor, g: torch.Tensor, u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Inner products (N, M) of the averages that end at t (N,) and u (M,), with exponents g and h (eq. 151)."""
    t, g = t[:, None], g[:, None]
    # The integral to the earlier end of (g + 1) (h + 1) s^(g + h) / (t^(g + 1) u^(h + 1))
    ratio = torch.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / torch.maximum(t, u)


# ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command, checkpoints/averages.py: found by name, so that who imports this file imports torch alone."""
    return importlib.import_module("checkpoints.averages").main(argv)


if __name__ == "__main__":
    sys.exit(main())
