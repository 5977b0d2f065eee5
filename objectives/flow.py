"""Flow matching on the linear path z_t = (1 - t) x + t noise (2210.02747): a velocity, the start of every flow map."""

from __future__ import annotations

import torch

from objectives.common import Model, Output, append_dims, by_time, replayed
from objectives.draws import Draws
from objectives.losses import l2


class FlowMatching(torch.nn.Module):
    """loss = |u(z_t, t, t) - (noise - x)|^2, the mean over a sample's elements; t logit-normal (2403.03206 app. B)."""

    def __init__(
        self,
        P_mean: float = 0.0,  # mean of ln(t / (1 - t))
        P_std: float = 1.0,  # its standard deviation
    ):
        super().__init__()
        self.P_mean, self.P_std = P_mean, P_std

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; times t (B,) in [0, 1] and noise (B, ...) may be given."""
        draws = draws or Draws.fresh(x)
        if t is None:
            t = logit_normal(draws, self.P_mean, self.P_std, x.dtype)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        z, v = on_path(x, noise, t)
        loss = l2(model(z, t, t, **conditions), v)
        return Output(loss, by_time(loss, t))


def logit_normal(draws: Draws, mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    """Times (B,) in [0, 1] whose ln(t / (1 - t)) is N(mean, std^2)."""
    return torch.sigmoid(mean + std * draws.normal((draws.count,), dtype))


def on_path(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(z_t, v): the point (1 - t) x + t noise and its velocity noise - x; (B, ...), t (B,)."""
    t = append_dims(t, x)
    return (1 - t) * x + t * noise, noise - x


def velocity(teacher: Model, z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
    """A trained model's velocity at z (B, ...) and times t (B,): a flow map's u(z, t, t), or the same of a denoiser.

    z / (1 - t) has the noise level t / (1 - t), so v = (z - D(z / (1 - t); t / (1 - t))) / t; t stays where the
    denoiser was trained, below sigma_max, and where the difference does not round.
    """
    if getattr(teacher, "clock", "sigma") == "time":
        return teacher(z, t, t, **conditions)
    highest = getattr(teacher, "sigma_max", 80.0)
    t = t.clamp(1e-4, highest / (1 + highest))
    D = teacher(z / append_dims(1 - t, z), t / (1 - t), **conditions)
    return (z - D) / append_dims(t, z)


def without(
    conditions: dict[str, torch.Tensor | None], dropped: torch.Tensor | None = None
) -> dict[str, torch.Tensor | None]:
    """The conditions with the null label in the rows `dropped` (B,), bool; None: in all. ValueError without labels."""
    labels = conditions.get("class_labels")
    if labels is None:
        raise ValueError("guidance needs class_labels: a conditional data set")
    return {**conditions, "class_labels": None if dropped is None else labels * ~dropped[:, None]}


def of_rows(conditions: dict[str, torch.Tensor | None], rows: slice | torch.Tensor) -> dict[str, torch.Tensor | None]:
    """The conditions of some rows."""
    return {name: None if value is None else value[rows] for name, value in conditions.items()}


def ask(
    dropout: tuple[torch.Tensor, torch.Tensor | None], model: Model, z: torch.Tensor, *times: torch.Tensor,
    **conditions: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """model(z, *times, **conditions) by the masks that follow from the generators' state `dropout`."""
    with replayed(dropout, z.device):
        return model(z, *times, **conditions)
