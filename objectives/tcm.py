"""TCM: the second, truncated stage of a consistency model (Lee et al. 2024, 2410.14895)."""

from __future__ import annotations

import functools
import math

import torch

from objectives.common import (
    Model,
    Output,
    append_dims,
    by_level,
    forward_mode,
    half_holds,
    held,
    in_float32,
    passes_alone,
    replayed,
    rng_state,
    step_between,
)
from objectives.draws import Draws, wide
from objectives.losses import pseudo_huber
from objectives.schedules import ect_pair, truncated_student_t


class TruncatedConsistency(torch.nn.Module):
    """Trains only noise levels t >= t'; below t' the frozen first stage is the model, and gives the targets there.

    The mean of the loss is that of consistency over t drawn in [t', sigma_max], plus boundary_weight x that of the rows
    at t = t', whose r lies below t'. A fixed share of the global batch, spread evenly over it, sits at t'.
    """

    def __init__(
        self,
        stage1: torch.nn.Module,  # a finished consistency model
        t_prime: float = 1.0,  # t', where the second stage begins
        q: float = 1000.0,  # r = t (1 - n(t) / q), n(t) = 1 + 8 sigmoid(-t)
        boundary_share: float = 0.25,  # of the batch, at t = t': int(share x batch) rows
        boundary_weight: float = 0.1,
        df: float = 0.01,  # ln t is Student-t with this many degrees of freedom,
        scale: float = 0.2,  # this scale, and mean 0, truncated to [t', sigma_max]
        huber_c: float = 0.0,
        sigma_max: float = 80.0,
        weighting: str = "gap",  # 1 / (t - r); or "c_out": 1 / c_out(t)^2, as on ImageNet
        sigma_data: float = 0.5,
        difference: str = "auto",  # how the student's D_t - D_r is taken, see common.forward_mode
    ):
        super().__init__()
        self.stage1 = stage1.requires_grad_(False).train()  # it drops by the student's masks, as in the original
        self.t_prime, self.q, self.huber_c = t_prime, q, huber_c
        self.boundary_share, self.boundary_weight = boundary_share, boundary_weight
        self.weighting, self.sigma_data, self.difference = weighting, sigma_data, difference
        self.gap = float(ect_pair(torch.tensor(t_prime), 0, q)[1]) / t_prime  # (t - r) / t at t', where it is widest
        self.crossing = crossing_share(t_prime, q, df, scale, sigma_max)
        quantiles = truncated_student_t(df, scale, t_prime, sigma_max)
        self.ln_t = functools.lru_cache(maxsize=2)(lambda device: quantiles.to(wide(device)).to(device))

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds; see common.half_holds."""
        return half_holds(model, self.difference, self.gap)

    def draw_t(self, draws: Draws) -> torch.Tensor:
        """t (B,), `wide`: t' in int(boundary_share x total) rows of the global batch, else from the distribution."""
        quantiles = self.ln_t(draws.device)
        place = draws.uniform((draws.count,), quantiles.dtype) * (len(quantiles) - 1)
        low = place.long()
        ln_t = torch.lerp(quantiles[low], quantiles[low + 1], place - low)
        row = torch.arange(draws.start, draws.start + draws.count, device=place.device)
        edges = int(self.boundary_share * draws.total)
        at_boundary = (row + 1) * edges // draws.total > row * edges // draws.total
        return torch.where(at_boundary, self.t_prime, ln_t.exp())

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; noise levels t >= t' (B,) and noise (B, ...) may be given."""
        draws, given = draws or Draws.fresh(x), t
        if t is None:
            t = self.draw_t(draws)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        r, gap = ect_pair(t, 0, self.q)

        dropout = rng_state(x.device)
        D_t = model(x + append_dims(t, x) * noise, t, **conditions)
        x_r = x + append_dims(r, x) * noise
        with torch.no_grad():
            if forward_mode(model, self.difference, self.gap):
                whole = given is not None or not passes_alone(model, conditions)
                low, high = (len(x), 0) if whole else self.shares(draws)
                step_down = self.narrow_step(model, x, noise, (t, r, gap), (low, high), dropout, conditions)
            else:
                with replayed(dropout, x.device):
                    D_r = model(x_r, r, **conditions)
                with replayed(dropout, x.device):
                    D_stage1 = self.stage1(x_r, r, **conditions)
                step_down = D_t - torch.where(append_dims(r, x) < self.t_prime, D_stage1, D_r)
        c_out = t * self.sigma_data / (t**2 + self.sigma_data**2).sqrt()
        size = gap if self.weighting == "gap" else c_out**2
        loss = pseudo_huber(held(step_down, D_t), x.new_zeros(()), self.huber_c) / size

        boundary = t - self.t_prime < 2e-8  # the original adds 1e-8, which float32 would lose
        edges = int(self.boundary_share * draws.total) if given is None else boundary.sum()
        rows = draws.total if given is None else len(t)
        parts = {"main": (loss.detach() * ~boundary, ~boundary), "boundary": (loss.detach() * boundary, boundary)}
        log = {name: (values.sum(), chosen.sum()) for name, (values, chosen) in parts.items()}
        # Each part's own mean, whatever its share of the batch
        of_main, of_boundary = rows / max(rows - edges, 1), self.boundary_weight * rows / max(edges, 1)
        loss = loss * torch.where(boundary, of_boundary, of_main)
        return Output(loss, {**log, "gap": (gap / t).mean(), **by_level(loss, t)})

    def shares(self, draws: Draws) -> tuple[int, int]:
        """(a, b): of these rows, ordered by r, none from place a on has r below t', and all before b have.

        Known without a look at the device. The rows at t' have a fixed number; of others so many have as chance has it,
        more than these about once in 10^8 steps.
        """
        edges = int(self.boundary_share * draws.total)
        last = draws.start + draws.count
        sure = last * edges // draws.total - draws.start * edges // draws.total
        mean = self.crossing * (draws.count - sure)
        return min(sure + math.ceil(mean + 6 * math.sqrt(mean + 1) + 2), draws.count), sure

    def narrow_step(
        self, model: Model, x: torch.Tensor, noise: torch.Tensor, levels: tuple[torch.Tensor, ...],
        shares: tuple[int, int], dropout: tuple[torch.Tensor, torch.Tensor | None],
        conditions: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:  # fmt: skip
        """D_t less its target (B, ...) where they are near, right in half precision too; `levels` are t, r and t - r.

        Above t' it is the student's derivative. Where the target is the frozen stage's, two networks at almost one
        point, both compute these rows in float32.
        """
        order = levels[1].argsort(stable=True)
        crossing, above = order[: shares[0]], order[shares[1] :]
        step_down = torch.zeros_like(x)

        def of(rows: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
            given = {name: None if value is None else value[rows] for name, value in conditions.items()}
            return [value[rows] for value in (x, noise, *levels)], given

        if len(above):
            values, given = of(above)
            with replayed(dropout, x.device):
                step_down[above] = step_between(model, *values, **given)
        (x, noise, t, r, _), given = of(crossing)
        with in_float32(model, self.stage1):
            with replayed(dropout, x.device):
                D_t = model(x + append_dims(t, x) * noise, t, **given)
            with replayed(dropout, x.device):
                D_r = self.stage1(x + append_dims(r, x) * noise, r, **given)
        step_down[crossing] = torch.where(append_dims(r, x) < self.t_prime, D_t - D_r, step_down[crossing])
        return step_down


def crossing_share(t_prime: float, q: float, df: float, scale: float, sigma_max: float) -> float:
    """The share of noise levels drawn above t' whose r lies below it."""
    from scipy.stats import t  # here: what only draws noise levels needs torch alone

    edge = t_prime
    for _ in range(50):  # t with r(t) = t'
        edge = t_prime / (1 - (1 + 8 / (1 + math.exp(edge))) / q)
    low, middle, high = t(df, scale=scale).cdf([math.log(v) for v in (t_prime, min(edge, sigma_max), sigma_max)])
    return float((middle - low) / (high - low))
