"""CD: consistency distillation of a diffusion model (Song et al. 2023, 2303.01469 alg. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from objectives.common import Model, Output, append_dims, taught
from objectives.ct import ConsistencyTraining
from objectives.draws import Draws
from objectives.losses import Distance


class ConsistencyDistillation(ConsistencyTraining):
    """CT's loss with x_n from one step of the teacher's ODE from x_{n+1}, a fixed grid and a fixed target decay.

    Of a pair [w_min, w_max] as guidance, each sample's w is drawn from U[w_min, w_max], guides the teacher and is told
    to student and target, so that sampling can choose it in one evaluation (LCM, 2310.04378).
    """

    scheduled = False

    def __init__(
        self,
        model: torch.nn.Module,  # the student; its copy becomes the target
        teacher: torch.nn.Module,  # a denoiser, in eval mode
        distance: Distance,  # (B, ...), (B, ...) -> (B,)
        N: int = 18,  # noise levels in the grid
        mu: float = 0.0,  # decay of the target; 0: it is the student
        solver: str = "heun",  # or "euler"
        guidance: float | Sequence[float] | None = None,  # w of the teacher's guidance, or a pair; None: as it is
        weighting: str = "uniform",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
    ):
        super().__init__(
            model,
            total_steps=1,
            distance=distance,
            weighting=weighting,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
        )
        self.teacher = teacher.requires_grad_(False)
        self.N, self.mu, self.solver, self.guidance = N, mu, solver, guidance

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds; without dropout, which CD's recipes leave out, less far than CT's."""
        return self.N <= 16

    def levels(self, step: int) -> int:
        """N, the same at every step."""
        return self.N

    def target_decay(self, step: int) -> float:
        """mu, the same at every step."""
        return self.mu

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None, **given: torch.Tensor | None
    ) -> Output:
        """As CT's; of a pair as guidance, w (B,) may be given as `guidance`."""
        draws = draws or Draws.fresh(x)
        return super().forward(model, x, step, draws, **{**draws.told(self.guidance, x.dtype), **given})

    def lower_point(
        self,
        x_high: torch.Tensor,
        high: torch.Tensor,
        low: torch.Tensor,
        x: torch.Tensor,
        noise: torch.Tensor,
        conditions: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """One Heun or Euler step of dx/dsigma = (x - D_teacher) / sigma from `high` to `low`."""
        teacher, conditions = taught(self.teacher, self.guidance, conditions)
        high_, low_ = append_dims(high, x), append_dims(low, x)
        slope = (x_high - teacher(x_high, high, **conditions)) / high_
        x_low = x_high + (low_ - high_) * slope
        if self.solver == "euler":
            return x_low
        slope_low = (x_low - teacher(x_low, low, **conditions)) / low_
        return x_high + (low_ - high_) * (slope + slope_low) / 2
