"""iMF, improved MeanFlow: a regression on the velocity, along a predicted tangent (Geng et al. 2025, 2512.02012)."""

from __future__ import annotations

import torch

from objectives.common import Model, Output, along_map, append_dims, by_time, passes_alone, replayed, rng_state
from objectives.draws import Draws
from objectives.flow import logit_normal, of_rows, on_path, without
from objectives.losses import adaptive
from objectives.schedules import time_pair

Conditions = dict[str, torch.Tensor | None]


class ImprovedMeanFlow(torch.nn.Module):
    """loss = l_u / sg(l_u + eps)^p + l_v / sg(l_v + eps)^p, sums over a sample's elements:
    l_u = |u + (t - r) sg(du/dt) - v|^2, l_v = |v_head - v|^2.

    du/dt is along (v_predicted, 1, 0) in (z, t, r), where v_predicted is the second head at r = t, without gradient. A
    network with one head predicts u(z, t, t) instead and has no second term (the paper's boundary form).

    Guided, v becomes v + (1 - 1/w) (v_predicted - v_predicted of the null label) where t lies in [t_min, t_max]; w,
    t_min and t_max are drawn and told to the network, so that sampling can choose them; labels are dropped here.
    """

    rows_differ = True  # the first rows of a batch may need fewer passes

    def __init__(
        self,
        P_mean: float = -0.4,  # mean of ln(t / (1 - t)), of both times
        P_std: float = 1.0,  # its standard deviation
        equal_share: float = 0.5,  # of the global batch, its first rows, has r = t
        p: float = 1.0,  # power of the adaptive weights
        eps: float = 0.01,
        guidance: float | None = None,  # the largest w: w = guidance^U(0, 1); None: not guided
        label_dropout: float = 0.1,  # share of labels dropped where guided
    ):
        super().__init__()
        self.P_mean, self.P_std, self.equal_share, self.p, self.eps = P_mean, P_std, equal_share, p, eps
        self.guidance, self.label_dropout = guidance, label_dropout

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, r: torch.Tensor | None = None, noise: torch.Tensor | None = None,
        **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; times r <= t (B,) in [0, 1], both, and noise (B, ...) may be given."""
        draws, first = draws or Draws.fresh(x), 0
        if t is None:
            first = draws.first(int(self.equal_share * draws.total))
            t, r = (logit_normal(draws, self.P_mean, self.P_std, x.dtype) for _ in range(2))
            t, r = time_pair(t, r, torch.arange(len(x), device=x.device) < first, "v0")
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        z, v = on_path(x, noise, t)
        labelled, told = conditions, {}
        if self.guidance is not None:
            dropped = draws.dropped(self.label_dropout)
            told = self.draw_guidance(draws, t, r)
            conditions = {**without(labelled, dropped), **told}
        first = first if passes_alone(model, conditions) else 0
        rest = slice(first, None)  # the rows where r may differ from t

        dropout = rng_state(x.device)
        two = hasattr(model, "both") and getattr(model, "heads", 2) == 2
        u, head = model.both(z, t, r, **conditions) if two else (model(z, t, r, **conditions), None)
        with torch.no_grad():
            dudt = torch.zeros_like(v)
            if self.guidance is not None:
                v, tangent = self.guided(model, z, v, t, dropped, labelled, told, dropout)
            elif first < len(x):
                tangent = torch.zeros_like(v)
                tangent[rest] = predicted(dropout, model, z[rest], t[rest], of_rows(conditions, rest))
            if first < len(x):  # where r = t, du/dt is multiplied by 0
                along = [values[rest] for values in (z, t, r, tangent, torch.ones_like(t), torch.zeros_like(r))]
                with replayed(dropout, x.device):
                    _, dudt[rest] = along_map(model, *along, **of_rows(conditions, rest))
        square = (u + append_dims(t - r, x) * dudt - v).square().reshape(len(x), -1)
        loss = adaptive(square.sum(1), self.p, self.eps)
        log = {"square_u": square.mean(), **by_time(square.mean(1), t)}
        if head is not None:
            square_v = (head - v).square().reshape(len(x), -1)
            loss = loss + adaptive(square_v.sum(1), self.p, self.eps)
            log["square_v"] = square_v.mean()
        return Output(loss, log)

    def draw_guidance(self, draws: Draws, t: torch.Tensor, r: torch.Tensor) -> Conditions:
        """What the network is told: w (B,) and the interval (B, 2), the whole of [0, 1] in rows with r = t."""
        w = self.guidance ** draws.uniform(t.shape).to(t.dtype)
        low, high = (draws.uniform(t.shape).to(t.dtype) / 2 for _ in range(2))
        ends = torch.stack([low, high + 0.5], dim=1)
        return {"guidance": w, "interval": torch.where((r == t)[:, None], whole(t), ends)}

    def guided(
        self, model: Model, z: torch.Tensor, v: torch.Tensor, t: torch.Tensor, dropped: torch.Tensor,
        labelled: Conditions, told: Conditions, dropout: tuple[torch.Tensor, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(v guided where the label is kept, the predicted velocity at the kept label): (B, ...) each."""
        low, high = told["interval"].unbind(1)
        w = torch.where((t >= low) & (t <= high), told["guidance"], 1.0)
        own = predicted(dropout, model, z, t, {**labelled, "guidance": w, "interval": whole(t)})
        unguided = {**without(labelled), "guidance": torch.ones_like(w), "interval": whole(t)}
        null = predicted(dropout, model, z, t, unguided)
        mixed = v + append_dims(1 - 1 / w, z) * (own - null)
        return torch.where(append_dims(dropped, z).bool(), v, mixed), own


def whole(t: torch.Tensor) -> torch.Tensor:
    """The interval [0, 1] of every row: (B, 2)."""
    return torch.stack([torch.zeros_like(t), torch.ones_like(t)], dim=1)


def predicted(
    dropout: tuple[torch.Tensor, torch.Tensor | None],
    model: Model,
    z: torch.Tensor,
    t: torch.Tensor,
    conditions: Conditions,
) -> torch.Tensor:
    """The network's own velocity (B, ...): its second head at r = t, or u(z, t, t) where it has one head."""
    with replayed(dropout, z.device):
        if hasattr(model, "both") and getattr(model, "heads", 2) == 2:
            return model.both(z, t, t, **conditions)[1]
        return model(z, t, t, **conditions)
