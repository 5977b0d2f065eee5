"""PD: progressive distillation, halving the steps stage by stage (Salimans & Ho 2022, 2202.00512)."""

from __future__ import annotations

import copy

import torch

from objectives.common import Model, Output, append_dims, by_level
from objectives.ct import snr_weight
from objectives.draws import Draws, wide
from objectives.losses import l2


class ProgressiveDistillation(torch.nn.Module):
    """The student's one Euler step on a grid of N intervals matches the teacher's two; then it becomes the teacher.

    N falls from `N` to 1 by halves in equal parts of the run. Call `after_step` after every optimizer step.
    """

    scheduled = True  # what a step computes depends on the run's length

    def __init__(
        self,
        teacher: torch.nn.Module,  # a denoiser; the student of each stage takes its place
        total_steps: int,  # K
        N: int = 512,  # intervals of the student's first grid, a power of two
        weighting: str = "truncated-snr",  # 2202.00512 sec. 4
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
    ):
        super().__init__()
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.total_steps, self.N, self.weighting, self.sigma_data = total_steps, N, weighting, sigma_data
        self.low, self.high, self.rho = sigma_min ** (1 / rho), sigma_max ** (1 / rho), rho

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds: on a fine grid the target divides the teacher's rounding by a short step."""
        return self.intervals(step) <= 8

    def intervals(self, step: int) -> int:
        """The student's grid at step k."""
        stages = self.N.bit_length()  # N, N/2, ..., 1
        stage = min(step * stages // self.total_steps, stages - 1)
        return self.N >> stage

    def sigma(self, place: torch.Tensor) -> torch.Tensor:
        """Noise level at `place` in [0, 1] of the Karras grid, 0 at sigma_max (B,)."""
        return (self.high + place * (self.low - self.high)) ** self.rho

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        index: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; index (B,) int64, the interval counted from sigma_max, and noise may be given."""
        draws = draws or Draws.fresh(x)
        N = self.intervals(step)
        if index is None:
            index = draws.integers(N, (len(x),))
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        t, half, end = (self.sigma((index.to(wide(x.device)) + part) / N) for part in (0, 0.5, 1))
        x_t = x + append_dims(t, x) * noise
        with torch.no_grad():
            D_t = self.teacher(x_t, t.to(x.dtype), **conditions)
            x_half = x_t + append_dims((half - t) / t, x) * (x_t - D_t)
            D_half = self.teacher(x_half, half.to(x.dtype), **conditions)
            # The D whose one step from t ends where the two do, x_t - t (x_end - x_t) / (end - t), without its small
            # differences: the two steps' D, weighted.
            target = torch.lerp(D_t, D_half, append_dims(t * (end - half) / (half * (end - t)), x))
        D = model(x_t, t.to(x.dtype), **conditions)
        loss = snr_weight(self.weighting, t.to(x.dtype), self.sigma_data) * l2(D, target)
        return Output(loss, {"N": N, **by_level(loss, t)})

    @torch.no_grad()
    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """At the end of a stage the student becomes the teacher."""
        if self.intervals(step + 1) != self.intervals(step):
            own = self.teacher.state_dict()  # it may have an augmentation map, which without labels does nothing
            for name, value in model.state_dict().items():
                own[name].copy_(value)
