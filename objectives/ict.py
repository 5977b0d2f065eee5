"""iCT: improved consistency training (Song & Dhariwal 2023, 2310.14189)."""

from __future__ import annotations

import functools

import torch

from objectives.common import (
    Model,
    Output,
    append_dims,
    by_level,
    forward_mode,
    half_holds,
    held,
    replayed,
    rng_state,
    step_between,
)
from objectives.draws import Draws, home, wide
from objectives.losses import Distance, pseudo_huber
from objectives.schedules import ict_index_probabilities, ict_levels
from sampler import karras_sigmas


class ImprovedConsistencyTraining(torch.nn.Module):
    """loss = d(D(x + s_{i+1} z; s_{i+1}), sg D(x + s_i z; s_i)) / (s_{i+1} - s_i), i log-normally weighted.

    No EMA target: the target is the student itself, with the same dropout mask.
    """

    scheduled = True  # what a step computes depends on the run's length

    def __init__(
        self,
        total_steps: int,  # K
        distance: Distance = pseudo_huber,  # on the whole sample, c = 0.00054 sqrt(d)
        s0: int = 10,  # N(0) - 1
        s1: int = 1280,  # N(K) - 1
        P_mean: float = -1.1,  # mean of ln sigma of the pairs
        P_std: float = 2.0,  # its standard deviation
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        difference: str = "auto",  # how the two outputs' difference is taken, see common.forward_mode
    ):
        super().__init__()
        self.total_steps, self.distance = total_steps, distance
        self.s0, self.s1, self.P_mean, self.P_std = s0, s1, P_mean, P_std
        self.sigma_min, self.sigma_max, self.difference = sigma_min, sigma_max, difference
        self.grid = functools.lru_cache(maxsize=2)(self._grid)  # it changes only when N doubles

    def levels(self, step: int) -> int:
        """N(k)."""
        return ict_levels(min(step, self.total_steps), self.total_steps, self.s0, self.s1)

    def gap(self, N: int) -> float:
        """(s_{i+1} - s_i) / s_{i+1} of the highest pair on a Karras grid of N levels, rho 7."""
        return 7 * (1 - (self.sigma_min / self.sigma_max) ** (1 / 7)) / (N - 1)

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds on this grid; see common.half_holds."""
        return half_holds(model, self.difference, self.gap(self.levels(step)))

    def _grid(self, N: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ascending noise levels (N,) and the cumulative probabilities of their pairs (N-1,), `wide`."""
        sigmas = karras_sigmas(N, self.sigma_min, self.sigma_max, device=home(device)).flip(0)
        cumulative = ict_index_probabilities(sigmas, self.P_mean, self.P_std).cumsum(0)
        return sigmas.to(wide(device)).to(device), cumulative.to(wide(device)).to(device)

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        index: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; index (B,) int64, i of the pair, 0 at sigma_min, and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        N = self.levels(step)
        sigmas, cumulative = self.grid(N, x.device)
        if index is None:
            u = draws.uniform((len(x),), cumulative.dtype)
            index = torch.searchsorted(cumulative, u, right=True).clamp(max=N - 2)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        low, high = sigmas[index].to(x.dtype), sigmas[index + 1].to(x.dtype)

        dropout = rng_state(x.device)
        D = model(x + append_dims(high, x) * noise, high, **conditions)
        with torch.no_grad(), replayed(dropout, x.device):
            if forward_mode(model, self.difference, self.gap(N)):
                step_down = step_between(model, x, noise, high, low, high - low, **conditions)
            else:
                step_down = D - model(x + append_dims(low, x) * noise, low, **conditions)
        loss = self.distance(held(step_down, D), x.new_zeros(())) / (high - low)
        return Output(loss, {"N": N, **by_level(loss, high)})
