"""MeanFlow: the average velocity between two times (Geng et al. 2025, 2505.13447)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from objectives.common import Model, Output, along_map, append_dims, by_time, passes_alone, replayed, rng_state
from objectives.draws import Draws
from objectives.flow import ask, logit_normal, of_rows, on_path, velocity, without
from objectives.losses import adaptive
from objectives.schedules import time_pair

GAP = 0.01  # of t, over which a difference of outputs stands for du/dt, as in 2509.04394


class MeanFlow(torch.nn.Module):
    """loss = l / sg(l + eps)^p, l = |u(z, t, r) - sg(v - (t - r) du/dt)|^2, the sum over a sample's elements.

    du/dt is the derivative of u along (v, 1, 0) in (z, t, r), by forward mode or as a difference. v is noise - x; with
    a teacher its velocity at z (the distillation of 2507.03738's code). Guided, v becomes w v + (1 - w - kappa) u(z, t,
    t | null) + kappa u(z, t, t | label) inside an interval of t, as target and as direction (sec. 4.2, app. B.3), and
    labels are dropped here: the sampled model is guided already, in one evaluation. Of a pair [w_min, w_max] as
    guidance, each sample's w is drawn from U[w_min, w_max] and told to the network, so that sampling can choose it.
    """

    rows_differ = True  # the first rows of a batch may need fewer passes

    def __init__(
        self,
        sampler: str = "v1",  # of t and r, see schedules.time_pair
        P_mean_t: float = -0.6,  # mean of ln(t / (1 - t)),
        P_std_t: float = 1.6,  # its standard deviation,
        P_mean_r: float = -4.0,  # and the same of r
        P_std_r: float = 1.6,
        ratio: float = 0.75,  # probability that r differs from t
        derivative: str = "forward_mode",  # du/dt, exact; or difference, of u at times at most GAP apart, in one pass
        p: float = 0.75,  # power of the adaptive weight
        eps: float = 1e-3,
        guidance: float | Sequence[float] | None = None,  # w, or a pair, then kappa is 0; None: not guided
        kappa: float = 0.0,  # share of the network's own guided velocity; the effective w is w / (1 - kappa)
        interval: tuple[float, float] = (0.0, 1.0),  # of t, where it is guided
        label_dropout: float = 0.1,  # share of labels dropped where guided
        flow: int = 0,  # first steps, in which r = t in every row: flow matching, without the derivative
        teacher: torch.nn.Module | None = None,  # a denoiser or a flow map, in eval mode
    ):
        super().__init__()
        self.sampler, self.ratio, self.p, self.eps = sampler, ratio, p, eps
        self.P_mean_t, self.P_std_t, self.P_mean_r, self.P_std_r = P_mean_t, P_std_t, P_mean_r, P_std_r
        self.guidance, self.kappa, self.interval, self.label_dropout = guidance, kappa, interval, label_dropout
        self.flow, self.derivative = flow, derivative
        self.teacher = teacher.requires_grad_(False) if teacher is not None else None

    def in_half(self, step: int, model: Model) -> bool:
        """Whether half precision holds: not for a difference of outputs so near each other."""
        return self.derivative == "forward_mode" or step < self.flow

    def draw_times(self, draws: Draws, dtype: torch.dtype, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(t, r, n): times (B,) of which the first n are known to be equal.

        Where labels are dropped, the rows with r = t fill the global batch from its front, as the dropped rows do: so
        these have r = t (Gsunshine/meanflow). Elsewhere they are drawn (Gsunshine/py-meanflow).
        """
        t = logit_normal(draws, self.P_mean_t, self.P_std_t, dtype)
        if step < self.flow:
            return t, t, len(t)
        r = logit_normal(draws, self.P_mean_r, self.P_std_r, dtype)
        front = draws.first(int((1 - self.ratio) * draws.total + 1e-6)) if self.guidance is not None else 0
        if self.guidance is not None:
            equal = torch.arange(len(t), device=t.device) < front
        else:
            equal = draws.uniform(t.shape) < 1 - self.ratio
        return *time_pair(t, r, equal, self.sampler), front

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, r: torch.Tensor | None = None, noise: torch.Tensor | None = None,
        **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; times r <= t (B,) in [0, 1], both, and noise (B, ...) may be given."""
        draws, front = draws or Draws.fresh(x), 0
        if t is None:
            t, r, front = self.draw_times(draws, x.dtype, step)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        z, v = on_path(x, noise, t)
        dropped, labelled, told = torch.zeros_like(t, dtype=torch.bool), conditions, {}
        if self.guidance is not None:
            dropped = draws.dropped(self.label_dropout)
            conditions = without(labelled, dropped)
            told = draws.told(self.guidance, x.dtype)

        dropout = rng_state(x.device)
        u = model(z, t, r, **conditions, **told)
        with torch.no_grad():
            if self.teacher is not None:
                v = velocity(self.teacher, z, t, **conditions)
            if self.guidance is not None:
                v = self.guided(model, z, v, t, dropped, labelled, told, dropout)
            dudt = torch.zeros_like(v)
            if front < len(x):
                rows = rows_to_derive(model, r < t, front) if passes_alone(model, conditions) else slice(None)
                here = [values[rows] for values in (z, t, r, v, u)]
                with replayed(dropout, x.device):
                    dudt[rows] = self.along_path(model, *here, **of_rows({**conditions, **told}, rows))
            target = v - append_dims(t - r, x) * dudt
        square = (u - target).square().reshape(len(x), -1)
        mean = square.mean(1)
        different = (r < t).sum(), torch.ones_like(t).sum()
        phase = {"stage": int(step >= self.flow)} if self.flow else {}
        log = {"square": mean.mean(), "different": different, **phase, **by_time(mean, t)}
        return Output(adaptive(square.sum(1), self.p, self.eps), log)

    def along_path(
        self, model: Model, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, v: torch.Tensor, u: torch.Tensor,
        **conditions: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """du/dt (B, ...) at z (B, ...) and t, r (B,), along (v, 1, 0); u is the model's output there."""
        if self.derivative == "forward_mode":
            return along_map(model, z, t, r, v, torch.ones_like(t), torch.zeros_like(r), **conditions)[1]
        s = torch.maximum(t - GAP, r)
        before = model(z - append_dims(t - s, z) * v, s, r, **conditions)
        return (u - before) / append_dims((t - s).clamp(min=1e-6), z)

    def guided(
        self, model: Model, z: torch.Tensor, v: torch.Tensor, t: torch.Tensor, dropped: torch.Tensor,
        labelled: dict[str, torch.Tensor | None], told: dict[str, torch.Tensor],
        dropout: tuple[torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:  # fmt: skip
        """v (B, ...) guided where t lies in the interval and the label is kept, by teacher's or model's velocities.

        told: w (B,) as `guidance`, where the network is told it; the null label's velocity is the same for every w.
        """

        def own(conditions: dict[str, torch.Tensor | None]) -> torch.Tensor:
            if self.teacher is not None:
                return velocity(self.teacher, z, t, **conditions)
            return ask(dropout, model, z, t, t, **conditions, **told)

        low, high = self.interval
        here = append_dims((t >= low) & (t <= high) & ~dropped, z).bool()
        w = append_dims(told["guidance"], z) if told else self.guidance
        mixed = w * v + (1 - w - self.kappa) * own(without(labelled))
        if self.kappa:
            mixed = mixed + self.kappa * own(labelled)
        return torch.where(here, mixed, v)


def rows_to_derive(model: Model, earlier: torch.Tensor, front: int) -> slice | torch.Tensor:
    """The rows that need du/dt, which is multiplied by t - r: those where `earlier`, r < t (B,); the first `front` are
    not. How many they are, another number in every step, a GPU would have to wait for and compiled code be made for:
    these take all behind the front."""
    if earlier.device.type == "cpu" and getattr(model, "compiled_jvp", None) is None:
        return earlier.nonzero()[:, 0]
    return slice(front, None)
