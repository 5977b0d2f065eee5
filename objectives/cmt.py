"""CMT: mid-training on the teacher's trajectories, between the teacher and ECT (Hu et al. 2025, 2509.24526)."""

from __future__ import annotations

import torch

from objectives.common import Model, Output, by_level
from objectives.draws import Draws
from objectives.losses import Distance
from sampler import dpm_solver_trajectory


class MidTraining(torch.nn.Module):
    """Every point of the teacher's trajectory from noise is mapped onto the trajectory's own end.

    A batch of B images starts B / steps trajectories at y + sigma_max z, of `steps` points each; the other images rest.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,  # a denoiser, in eval mode
        distance: Distance,  # (B, ...), (B, ...) -> (B,)
        steps: int = 16,  # of DPM-Solver++, in ln sigma
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.distance, self.steps, self.sigma_min, self.sigma_max = distance, steps, sigma_min, sigma_max
        self.group_size = steps  # a pass holds whole trajectories

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data, B a multiple of `steps`; noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        rows = slice(0, len(x), self.steps)
        start = x[rows] + self.sigma_max * noise[rows]
        with torch.no_grad():  # the teacher is told nothing, as in the original
            points, sigmas, end = dpm_solver_trajectory(self.teacher, start, self.steps, self.sigma_min, self.sigma_max)
        keys = conditions.pop("dropout_keys", None)  # of points: image i's goes to point i % steps of its trajectory
        many = {n: v[rows].repeat(self.steps, *[1] * (v.ndim - 1)) for n, v in conditions.items() if v is not None}
        sigma = sigmas.to(x.dtype).to(x.device, non_blocking=True).repeat_interleave(len(start))
        masks = {} if keys is None else {"dropout_keys": keys.view(-1, self.steps).T.flatten()}
        D = model(points.flatten(0, 1), sigma, **many, **masks)
        target = end.repeat(self.steps, *[1] * (x.ndim - 1))
        loss = self.distance(D, target)
        return Output(loss, by_level(loss, sigma))
