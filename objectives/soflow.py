"""SoFlow: solution flow models, a flow map trained without a forward-mode pass (Luo et al. 2025, 2512.15657)."""

from __future__ import annotations

import math

import torch

from objectives.common import (
    Model,
    Output,
    along_map,
    append_dims,
    by_time,
    forward_mode,
    passes_alone,
    replayed,
    rng_state,
)
from objectives.draws import Draws, wide
from objectives.flow import ask, logit_normal, of_rows, on_path, without
from objectives.losses import adaptive
from objectives.schedules import soflow_guidance, soflow_rho

LEAST = 1e-4  # the smallest t, t - r and t - l


class SoFlow(torch.nn.Module):
    """The solution f(z, t, r) = z + (r - t) u(z, t, r) is the same from t and from l, a little nearer to r.

    loss = -mean(u(z_t, t, r) q) w, with the gradient of q's square but for a factor; w = sg(mean q^2 + eps)^-p and
    q = sg[(f(z_t, t, r) - f(z_l, l, r)) / (t - l)], z_l = z_t + (l - t) v; the paper's s is r. Its value means nothing:
    log_q2 tells how it learns. The first int(velocity_share x batch) rows of the global batch have r = t and learn the
    velocity instead: mean (u - v)^2 / sg(mean (u - v)^2 + eps)^p.

    Guided, v becomes m [v + g(t) (w - 1) (v - u(z, t, t | null))] + (1 - m) u(z, t, t | label), and labels are dropped
    here.
    """

    scheduled = True  # what a step computes depends on the run's length
    rows_differ = True  # the first rows of a batch may need fewer passes

    def __init__(
        self,
        total_steps: int,  # K
        rho: tuple[float, float] = (1.0, 0.0003125),  # l = t + (r - t) rho(k): rho at the first and the last step
        schedule: str = "exponential",  # of rho between them, see schedules.soflow_rho
        P_mean_t: float = -0.9,  # mean of ln(t / (1 - t)),
        P_std_t: float = 1.6,  # its standard deviation,
        P_mean_r: float = -4.0,  # the same of r,
        P_std_r: float = 1.6,
        P_mean_v: float = -0.9,  # and of t in the velocity part
        P_std_v: float = 1.6,
        velocity_share: float = 0.0,  # of the batch
        p: float = 0.75,  # power of the adaptive weights
        eps: float = 1e-3,
        difference: str = "auto",  # how u_t - u_l is taken, see common.forward_mode
        guidance: float | None = None,  # w; None: not guided
        mix: float = 0.25,  # m
        fade: float = 0.8,  # t above which guidance falls to 0, see schedules.soflow_guidance
        label_dropout: float = 0.1,  # share of labels dropped where guided
    ):
        super().__init__()
        self.total_steps, self.rho_ends, self.schedule, self.difference = total_steps, tuple(rho), schedule, difference
        self.P_mean_t, self.P_std_t, self.P_mean_r, self.P_std_r = P_mean_t, P_std_t, P_mean_r, P_std_r
        self.P_mean_v, self.P_std_v, self.velocity_share = P_mean_v, P_std_v, velocity_share
        self.p, self.eps = p, eps
        self.guidance, self.mix, self.fade, self.label_dropout = guidance, mix, fade, label_dropout

    def rho(self, step: int) -> float:
        """rho(k)."""
        return soflow_rho(step, self.total_steps, self.rho_ends, self.schedule)

    def stage(self, step: int) -> int:
        """How often rho has halved."""
        return round(-math.log2(self.rho(step)))

    def draw_times(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(t, r, n): times (B,), `wide` as t - l is small; the first n rows are the velocity part's, where r = t."""
        dtype, n = wide(draws.device), draws.first(int(self.velocity_share * draws.total))
        t = logit_normal(draws, self.P_mean_t, self.P_std_t, dtype).clamp(min=LEAST)
        r = torch.minimum(logit_normal(draws, self.P_mean_r, self.P_std_r, dtype), t - LEAST)
        if self.velocity_share:
            t[:n] = r[:n] = logit_normal(draws, self.P_mean_v, self.P_std_v, dtype)[:n]
        return t, r, n

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, r: torch.Tensor | None = None, noise: torch.Tensor | None = None,
        **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; times r <= t (B,), both, and noise (B, ...) may be given; r = t: the velocity part."""
        draws, first = draws or Draws.fresh(x), 0
        if t is None:
            t, r, first = self.draw_times(draws)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        z, v = on_path(x, noise, t)
        dropped, labelled = None, conditions
        if self.guidance is not None:
            dropped = draws.uniform((len(x),)) < self.label_dropout
            conditions = without(labelled, dropped)
        rest = slice(first if passes_alone(model, conditions) else 0, None)  # the rows where r may differ from t

        dropout = rng_state(x.device)
        u = model(z, t, r, **conditions)
        with torch.no_grad():
            if self.guidance is not None:
                v = self.guided(model, z, v, t, u.detach(), dropped, labelled, dropout, rest)
            q = v - u
            if rest.start < len(x):
                there = [values[rest] for values in (z, v, t, r, u)]
                q[rest] = self.quotient(model, *there, self.rho(step), dropout, of_rows(conditions, rest))
        alike = r >= t
        square = torch.where(append_dims(alike, x).bool(), u - v, q).square().reshape(len(x), -1).mean(1)
        consistency = -(u * q).reshape(len(x), -1).mean(1) * (square.detach() + self.eps) ** -self.p
        loss = torch.where(alike, adaptive(square, self.p, self.eps), consistency)

        square = square.detach()
        parts = {"log_q2": (square.log(), ~alike)}
        if self.velocity_share:
            parts["velocity"] = square, alike
        log = {name: (values.where(rows, 0).sum(), rows.sum()) for name, (values, rows) in parts.items()}
        return Output(loss, {"rho": self.rho(step), **log, **by_time(square, t)})

    def quotient(
        self, model: Model, z: torch.Tensor, v: torch.Tensor, t: torch.Tensor, r: torch.Tensor, u: torch.Tensor,
        rho: float, dropout: tuple[torch.Tensor, torch.Tensor | None],
        conditions: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:  # fmt: skip
        """q (B, ...) = (f_t - f_l) / (t - l), as v - u_t - (l - r) (u_t - u_l) / (t - l), where nothing else cancels.

        In forward mode (u_t - u_l) / (t - l) is the derivative of u along (v, 1, 0), halfway between t and l.
        """
        gap = ((t - r) * rho).clamp(min=LEAST)  # t - l
        with replayed(dropout, z.device):
            if forward_mode(model, self.difference, rho):
                middle = z - append_dims(gap / 2, z) * v
                direction = (v, torch.ones_like(t), torch.zeros_like(t))
                _, slope = along_map(model, middle, (t - gap / 2).clamp(min=0), r, *direction, **conditions)
            else:
                u_l = model(z - append_dims(gap, z) * v, (t - gap).clamp(min=0), r, **conditions)
                slope = (u - u_l) / append_dims(gap, z)
        return v - u - append_dims(t - r - gap, z) * slope

    def guided(
        self, model: Model, z: torch.Tensor, v: torch.Tensor, t: torch.Tensor, u: torch.Tensor, dropped: torch.Tensor,
        labelled: dict[str, torch.Tensor | None], dropout: tuple[torch.Tensor, torch.Tensor | None], rest: slice,
    ) -> torch.Tensor:  # fmt: skip
        """v (B, ...) guided where the label is kept; u (B, ...) is u(z, t, t) in the rows before those of `rest`."""
        null = ask(dropout, model, z, t, t, **without(labelled))
        strength = append_dims(soflow_guidance(t, self.fade) * (self.guidance - 1), z)
        mixed = v + strength * (v - null)
        if self.mix != 1:
            own = u.clone()
            if rest.start < len(z):
                own[rest] = ask(dropout, model, z[rest], t[rest], t[rest], **of_rows(labelled, rest))
            mixed = self.mix * mixed + (1 - self.mix) * own
        return torch.where(append_dims(dropped, z).bool(), v, mixed)
