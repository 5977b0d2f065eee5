"""ECT: easy consistency tuning (Geng et al. 2024, 2406.14548)."""

from __future__ import annotations

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
    replayed,
    rng_state,
    step_between,
)
from objectives.draws import Draws, wide
from objectives.losses import pseudo_huber
from objectives.schedules import ect_pair


class EasyConsistencyTuning(torch.nn.Module):
    """loss = (sqrt(|D_t - sg D_r|^2 + c^2) - c) / (t - r): the gap t - r closes as the stages go by.

    weighting "c_out" divides by c_out(t)^2 = (t sd)^2 / (t^2 + sd^2) instead, as ECT's ImageNet branch does.

    Where r = 0 the target is the data itself, so the run starts close to diffusion training.
    """

    def __init__(
        self,
        steps_per_stage: float,  # the stage grows by one every so many steps; math.inf: constant at 0
        q: float = 2.0,  # delta t shrinks by this factor per stage
        mapping: str = "sigmoid",  # n(t), see schedules.ect_pair
        P_mean: float = -1.1,  # mean of ln t
        P_std: float = 2.0,  # its standard deviation
        huber_c: float = 0.0,  # c of the pseudo-Huber distance
        difference: str = "auto",  # how D_t - D_r is taken, see common.forward_mode
        weighting: str = "gap",  # 1 / (t - r), or "c_out": 1 / c_out(t)^2
        sigma_data: float = 0.5,  # standard deviation of the data, for c_out
    ):
        super().__init__()
        self.steps_per_stage, self.q, self.mapping = steps_per_stage, q, mapping
        self.P_mean, self.P_std, self.huber_c, self.difference = P_mean, P_std, huber_c, difference
        self.weighting, self.sigma_data = weighting, sigma_data

    def stage(self, step: int) -> int:
        """a(k); it stops growing where t and r are 2^-20 apart, before a float32 network sees them as one."""
        last = max(int(20 / math.log2(self.q)) - 1, 0)
        return min(int(step // self.steps_per_stage), last)

    def gap(self, step: int) -> float:
        """(t - r) / t over n(t), for the largest t."""
        return self.q ** -(self.stage(step) + 1)

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds in this stage; see common.half_holds."""
        return half_holds(model, self.difference, self.gap(step))

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; noise levels t (B,) and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        if t is None:
            # float64, because t - r is a small difference of large numbers
            t = (self.P_mean + self.P_std * draws.normal((len(x),)).to(wide(x.device))).exp()
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        r, gap = ect_pair(t, self.stage(step), self.q, self.mapping)

        dropout = rng_state(x.device)
        D_t = model(x + append_dims(t, x) * noise, t, **conditions)
        with torch.no_grad(), replayed(dropout, x.device):
            at = torch.where(r > 0, r, t)  # ln 0 is no noise label; these rows take the data below
            if forward_mode(model, self.difference, self.gap(step)):
                step_down = step_between(model, x, noise, t, at, gap, **conditions)
            else:
                step_down = D_t - model(x + append_dims(at, x) * noise, at, **conditions)
            step_down = torch.where(append_dims(r, x) > 0, step_down, D_t - x)
        c_out = t * self.sigma_data / (t**2 + self.sigma_data**2).sqrt()
        size = gap if self.weighting == "gap" else c_out**2
        loss = pseudo_huber(held(step_down, D_t), x.new_zeros(()), self.huber_c) / size
        log = {"stage": self.stage(step), "gap": (gap / t).mean()}
        return Output(loss, {**log, **by_level(loss, t)})
