"""CT: consistency training with an EMA target (Song et al. 2023, 2303.01469 alg. 3)."""

from __future__ import annotations

import copy

import torch

from objectives.common import Model, Output, append_dims, by_level, replayed, rng_state
from objectives.draws import Draws, home, wide
from objectives.losses import Distance
from objectives.schedules import ct_levels, ct_target_decay
from sampler import karras_sigmas


def snr_weight(name: str, sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """lambda as a function of the student's signal-to-noise ratio sigma^-2; `uniform`, 1, is the paper's (B,)."""
    snr = sigma**-2
    return {
        "uniform": torch.ones_like(snr),
        "snr": snr,
        "snr+1": snr + 1,
        "karras": snr + sigma_data**-2,
        "truncated-snr": snr.clamp(min=1),
    }[name]


class ConsistencyTraining(torch.nn.Module):
    """loss = lambda d(D(x + s_{n+1} z; s_{n+1}), sg D_target(x + s_n z; s_n)), n uniform on a grid of N(k) levels.

    The target is a moving average of the student with decay mu(k); call `after_step` after every optimizer step.
    """

    scheduled = True  # what a step computes depends on the run's length

    def __init__(
        self,
        model: torch.nn.Module,  # the student; its copy becomes the target
        total_steps: int,  # K
        distance: Distance,  # (B, ...), (B, ...) -> (B,)
        s0: int = 2,  # N(0)
        s1: int = 150,  # N(K) is s1 + 1
        mu0: float = 0.9,  # the target's decay while the grid is s0
        weighting: str = "uniform",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        self.target = copy.deepcopy(model).requires_grad_(False)
        self.distance = distance
        self.total_steps, self.s0, self.s1, self.mu0 = total_steps, s0, s1, mu0
        self.weighting, self.sigma_data = weighting, sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def in_half(self, step: int, model: Model) -> bool:
        """Whether the pair is far enough apart for half precision. No forward mode here: two networks are compared."""
        return self.levels(step) <= 32

    def levels(self, step: int) -> int:
        """N(k)."""
        return ct_levels(min(step, self.total_steps), self.total_steps, self.s0, self.s1)

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        index: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; index (B,) int64, n of the pair, 0 at sigma_min, and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        N = self.levels(step)
        sigmas = karras_sigmas(N, self.sigma_min, self.sigma_max, device=home(x.device)).flip(0)
        sigmas = sigmas.to(wide(x.device)).to(x.device)
        if index is None:
            index = draws.integers(N - 1, (len(x),))
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        low, high = sigmas[index].to(x.dtype), sigmas[index + 1].to(x.dtype)
        x_high = x + append_dims(high, x) * noise

        dropout = rng_state(x.device)
        D = model(x_high, high, **conditions)
        with torch.no_grad():
            x_low = self.lower_point(x_high, high, low, x, noise, conditions)
            with replayed(dropout, x.device):
                D_target = self.target(x_low, low, **conditions)
        loss = snr_weight(self.weighting, high, self.sigma_data) * self.distance(D, D_target)
        return Output(loss, {"N": N, "mu": self.target_decay(step), **by_level(loss, high)})

    def lower_point(
        self,
        x_high: torch.Tensor,
        high: torch.Tensor,
        low: torch.Tensor,
        x: torch.Tensor,
        noise: torch.Tensor,
        conditions: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """x_n, where the target looks: the same noise at the lower level. CD asks its teacher instead."""
        return x + append_dims(low, x) * noise

    def target_decay(self, step: int) -> float:
        """mu(k)."""
        return ct_target_decay(self.levels(step), self.s0, self.mu0)

    @torch.no_grad()
    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """target <- mu(k) target + (1 - mu(k)) student."""
        target, student = list(self.target.parameters()), list(model.parameters())
        torch._foreach_lerp_(target, student, 1 - self.target_decay(step))
