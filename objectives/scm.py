"""sCM: continuous-time consistency, trained (sCT) or distilled (sCD) (Lu & Song 2024, 2410.11081 alg. 1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from objectives.common import Model, Output, append_dims, by_level, held, replayed, rng_state, taught
from objectives.draws import Draws

# torch scripts its own forward-mode rules when they are first used, and warns of it.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


class AdaptiveWeight(torch.nn.Module):
    """w(t): a learned scalar function of t, zero at the start; linear in Fourier features (2410.11081 sec. 4.2)."""

    def __init__(self, features: int = 128):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.linear = torch.nn.Linear(features, 1, bias=False)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t (B,) in radians -> (B,)."""
        features = (t[:, None].to(self.phases.dtype) * self.frequencies + self.phases).cos() * math.sqrt(2)
        return self.linear((features / math.sqrt(len(self.phases))).to(self.linear.weight.dtype)).squeeze(1)


class ContinuousConsistency(torch.nn.Module):
    """loss = e^w(t)/d |F(x_t/sd, t) - sg F - g|^2 - w(t), in TrigFlow: x_t = cos(t) x + sin(t) z, z ~ N(0, sd^2).

    g is the normalised tangent, from a forward-mode derivative of the network along the ODE. Without a teacher the
    ODE's slope is that of the pair (x, z): sCT; with one it is the teacher's: sCD, and of a pair [w_min, w_max] as
    guidance each sample's w is drawn from U[w_min, w_max], guides the teacher and is told to the student (2310.04378).

    FACM's anchor (2507.03738) adds flow matching of the same slope, by the same network told -t: F(x_t/sd, -t).
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        P_mean: float = -1.0,  # mean of ln(sigma), sigma = sd tan(t)
        P_std: float = 1.4,  # its standard deviation
        warmup: int = 10_000,  # H: steps over which the tangent's second half grows in; r = min(1, k/H)
        c: float = 0.1,  # normalisation g / (|g| + c)
        teacher: torch.nn.Module | None = None,  # a denoiser, in eval mode
        guidance: float | Sequence[float] | None = None,  # w of the teacher's guidance, or a pair; None: as it is
        weight: torch.nn.Module | None = None,  # w(t); None: AdaptiveWeight
        anchor: float = 0.0,  # weight of FACM's flow-matching loss; 0: none
    ):
        super().__init__()
        self.sigma_data, self.P_mean, self.P_std = sigma_data, P_mean, P_std
        self.warmup, self.c, self.guidance, self.anchor = warmup, c, guidance, anchor
        self.teacher = teacher.requires_grad_(False) if teacher is not None else None
        self.weight = weight or AdaptiveWeight()

    def forward(
        self, model: Model, x: torch.Tensor, step: int = 0, draws: Draws | None = None,
        t: torch.Tensor | None = None, noise: torch.Tensor | None = None, **conditions: torch.Tensor | None,
    ) -> Output:  # fmt: skip
        """x (B, ...) clean data; angles t (B,) in (0, pi/2), noise (B, ...) ~ N(0, 1) and, of a pair, guidance (B,) may
        be given."""
        draws, sd = draws or Draws.fresh(x), self.sigma_data
        if t is None:
            sigma = (self.P_mean + self.P_std * draws.normal((len(x),), x.dtype)).exp()
            t = torch.atan(sigma / sd)
        if noise is None:
            noise = draws.normal(x.shape, x.dtype)
        conditions = {**draws.told(self.guidance, x.dtype), **conditions}
        cos, sin = append_dims(t.cos(), x), append_dims(t.sin(), x)
        x_t = cos * x + sin * sd * noise
        dxdt = cos * sd * noise - sin * x if self.teacher is None else self.teacher_slope(x_t, t, conditions)

        dropout = rng_state(x.device)
        F = network(model, x_t / sd, t, sd, conditions)
        with torch.no_grad(), replayed(dropout, x.device):
            _, g = self.tangent(model, x_t, t, dxdt, min(1.0, step / max(self.warmup, 1)), conditions)
        norm = g.reshape(len(g), -1).norm(dim=1)
        g = g / append_dims(norm + self.c, x)

        w = self.weight(t).to(x.dtype)
        square = held(-g, F).square().reshape(len(x), -1).mean(1)
        loss = w.exp() * square - w
        log = {"tangent_norm": norm.mean(), "w": w.mean(), "square": square.mean(), **by_level(loss, sd * t.tan())}
        if self.anchor:
            with replayed(dropout, x.device):
                flow = anchor_loss(network(model, x_t / sd, -t, sd, conditions), dxdt / sd)
            loss, log["anchor"] = loss + self.anchor * flow, flow.mean()
        return Output(loss, log)

    def teacher_slope(self, x_t: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
        """dx/dt = sd F_teacher, from the teacher's denoiser: (cos(t) x_t - D) / sin(t)."""
        cos, sin = append_dims(t.cos(), x_t), append_dims(t.sin(), x_t)
        teacher, conditions = taught(self.teacher, self.guidance, conditions)
        with torch.no_grad():
            D = teacher(x_t / cos, self.sigma_data * t.tan(), **conditions)
        return (cos * x_t - D) / sin

    def tangent(
        self,
        model: Model,
        x_t: torch.Tensor,
        t: torch.Tensor,
        dxdt: torch.Tensor,
        r: float,
        conditions: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(F^-, g before normalisation), g = -cos^2(t) (sd F^- - dx/dt) - r cos(t) sin(t) (x_t + sd dF^-/dt).

        cos(t) sin(t) goes into the derivative's direction, so that nothing overflows near t = pi/2 (sec. 4.1).
        """
        sd, cos, sin = self.sigma_data, append_dims(t.cos(), x_t), append_dims(t.sin(), x_t)
        direction = (cos * sin * dxdt / sd, t.cos() * t.sin())
        F, cos_sin_dFdt = network_along(model, x_t / sd, t, *direction, sd, conditions)
        return F, -(cos**2) * (sd * F - dxdt) - r * (cos * sin * x_t + sd * cos_sin_dFdt)


def anchor_loss(F: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """FACM's flow-matching loss (B,): mean square plus 1 - cosine over the channels (2507.03738's code)."""
    F, slope = (v.reshape(len(v), v.shape[1] if v.ndim > 1 else 1, -1) for v in (F, slope))
    cosine = torch.nn.functional.cosine_similarity(F, slope, dim=1)
    return (F - slope).square().mean((1, 2)) + (1 - cosine).mean(1)


def in_edm_clock(u: torch.Tensor, t: torch.Tensor, sd: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, sigma) of the same point in EDM's clock, u = x_t / sd (B, ...), t (B,)."""
    return u * sd / append_dims(t.cos(), u), sd * t.tan()


def from_denoiser(u: torch.Tensor, t: torch.Tensor, D: torch.Tensor, sd: float) -> torch.Tensor:
    """F(u, t) of TrigFlow, told from its denoiser's output D."""
    return (append_dims(t.cos(), u) * sd * u - D) / (append_dims(t.sin(), u) * sd)


def has_raw(model: Model) -> bool:
    """Whether the model gives F itself."""
    return hasattr(model, "raw") and getattr(model, "precond", "trigflow") == "trigflow"


def network(model: Model, u: torch.Tensor, t: torch.Tensor, sd: float, conditions: dict) -> torch.Tensor:
    """F(u, t) of TrigFlow, u = x_t / sd (B, ...), t (B,): the model's raw output, or F told from its denoiser D."""
    x, sigma = in_edm_clock(u, t, sd)
    if has_raw(model):
        return model.raw(x, sigma, **conditions).to(u.dtype)
    return from_denoiser(u, t, model(x, sigma, **conditions), sd)


def network_along(
    model: Model, u: torch.Tensor, t: torch.Tensor, du: torch.Tensor, dt: torch.Tensor, sd: float, conditions: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """(F, its derivative along (du, dt)) at (u, t), without gradient, by one pass in forward mode."""
    if not hasattr(model, "jvp"):
        return torch.func.jvp(lambda u, t: network(model, u, t, sd, conditions), (u, t), (du, dt))
    place, direction = torch.func.jvp(lambda u, t: in_edm_clock(u, t, sd), (u, t), (du, dt))
    if has_raw(model):
        F, dF = model.jvp(*place, *direction, raw=True, **conditions)
        return F.to(u.dtype), dF.to(u.dtype)
    D, dD = model.jvp(*place, *direction, **conditions)
    return torch.func.jvp(lambda u, t, D: from_denoiser(u, t, D, sd), (u, t, D), (du, dt, dD))
