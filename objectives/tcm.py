"""TCM: the second, truncated stage of a consistency model (Lee et al. 2024, 2410.14895)."""

from __future__ import annotations

import torch

from objectives.common import Model, Output, by_level, like, replayed, rng_state
from objectives.draws import Draws
from objectives.losses import pseudo_huber
from objectives.schedules import ect_r, truncated_student_t


class TruncatedConsistency(torch.nn.Module):
    """Trains only noise levels t >= t'; below t' the frozen first stage is the model, and gives the targets there.

    loss = consistency over t drawn in [t', sigma_max] + boundary_weight x the same at t = t', whose r lies below t'.
    """

    def __init__(
        self,
        stage1: torch.nn.Module,  # a finished consistency model
        t_prime: float = 1.0,  # t', where the second stage begins
        q: float = 1000.0,  # r = t (1 - n(t) / q), n(t) = 1 + 8 sigmoid(-t)
        boundary_share: float = 0.25,  # of the batch, at t = t'
        boundary_weight: float = 0.1,
        df: float = 0.01,  # ln t is Student-t with this many degrees of freedom,
        scale: float = 0.2,  # this scale, and mean 0, truncated to [t', sigma_max]
        huber_c: float = 0.0,
        sigma_max: float = 80.0,
    ):
        super().__init__()
        self.stage1 = stage1.requires_grad_(False)
        self.t_prime, self.q, self.huber_c = t_prime, q, huber_c
        self.boundary_share, self.boundary_weight = boundary_share, boundary_weight
        self.register_buffer("ln_t", truncated_student_t(df, scale, t_prime, sigma_max), persistent=False)

    def draw_t(self, draws: Draws, count: int) -> torch.Tensor:
        """t (B,) float64: t' for each sample with probability boundary_share, else from the distribution."""
        place = draws.uniform((count,), torch.float64) * (len(self.ln_t) - 1)
        low = place.long()
        ln_t = torch.lerp(self.ln_t[low], self.ln_t[low + 1], place - low)
        at_boundary = draws.uniform((count,)) < self.boundary_share
        return torch.where(at_boundary, self.t_prime, ln_t.exp())

    def forward(
        self,
        model: Model,
        x: torch.Tensor,
        step: int = 0,
        draws: Draws | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **conditions: torch.Tensor | None,
    ) -> Output:
        """x (B, ...) clean data; noise levels t >= t' (B,) and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        every_t = t
        if t is None:
            every_t = self.draw_t(draws.whole(), draws.total)  # of the global batch, for what is counted there
            t = draws.own(every_t)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        r = ect_r(t, 0, self.q)

        dropout = rng_state(x.device)
        D_t = model(x + like(t, x) * noise, t, **conditions)
        x_r = x + like(r, x) * noise
        with torch.no_grad():
            with replayed(dropout, x.device):
                D_r = model(x_r, r, **conditions)
            below = like(r, x) < self.t_prime
            target = torch.where(below, self.stage1(x_r, r, **conditions), D_r)
        loss = pseudo_huber(D_t, target, self.huber_c) / (t - r)
        boundary, every_boundary = t <= self.t_prime, every_t <= self.t_prime
        main, edge = mean_where(loss, ~boundary, ~every_boundary), mean_where(loss, boundary, every_boundary)
        log = {"main": main, "boundary": edge, "gap": ((t - r) / t).mean(), **by_level(loss, t)}
        return Output(main + self.boundary_weight * edge, log)


def mean_where(values: torch.Tensor, chosen: torch.Tensor, every_chosen: torch.Tensor) -> torch.Tensor:
    """Of the chosen values (B,) of a part of the batch: what averages over equal parts to the mean over every chosen.

    0 where none is chosen in the global batch.
    """
    return (values * chosen).mean() / every_chosen.to(values.dtype).mean().clamp(min=1 / len(every_chosen))
