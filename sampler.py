"""Noise in, data out: pure functions of a model, starting noise and noise levels.

`model(x, sigma, **conditions)` maps a batch of any shape and its noise levels (B,) to clean data: x = data + sigma
noise, the clock "sigma". A flow map `model(z, t, r, **conditions)` gives the average velocity from time t to r (B,):
z = (1 - t) data + t noise, the clock "time". `to_data` makes of it a model of clean data, `model(z, t, **conditions)`,
for what is written for these: `multistep` and editing, told the clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

Model = Callable[..., torch.Tensor]
NoiseAt = Callable[[int], torch.Tensor]


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho): float64 (n,).

    2206.00364 eq. 5. n >= 2.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device=device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def multistep(
    model: Model,
    z: torch.Tensor,  # (B, ...) N(0, 1)
    levels: Sequence[float],  # descending sigmas or times, the first where z starts; one level is one-step sampling
    noise_at: NoiseAt | None = None,  # i >= 1 -> (B, ...) N(0, 1) injected before evaluation i; None: torch's generator
    sigma_min: float = 0.002,  # of the clock "sigma"
    clock: str = "sigma",  # or "time"
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """Clean data in len(levels) evaluations: x <- D(x + sqrt(s^2 - sigma_min^2) z; s) (2303.01469 alg. 1).

    In the clock "time": x <- D((1 - t) x + t z; t).
    """
    x = model(levels[0] * z, _level(levels[0], z), **conditions)
    for i, level in enumerate(levels[1:], start=1):
        noise = torch.randn_like(z) if noise_at is None else noise_at(i)
        of_data, of_noise = shares(level, clock)
        if clock == "sigma":
            of_noise = max(level**2 - sigma_min**2, 0) ** 0.5
        x = model(of_data * x + of_noise * noise, _level(level, z), **conditions)
    return x


def shares(level: float, clock: str) -> tuple[float, float]:
    """(a, b) of a data + b noise at a level: (1, sigma), or (1 - t, t) in the clock "time"."""
    return (1.0, level) if clock == "sigma" else (1.0 - level, level)


def to_data(flow_map: Model) -> Model:
    """A flow map as a model of clean data in the clock "time": x = z - t u(z, t, 0)."""

    def model(z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        return z - t.reshape(-1, *[1] * (z.ndim - 1)) * flow_map(z, t, torch.zeros_like(t), **conditions)

    return model


def jumps(
    model: Model,  # a flow map
    z: torch.Tensor,  # (B, ...) N(0, 1)
    times: Sequence[float],  # descending from 1; where each evaluation starts, the last of which ends at 0
    noise_at: NoiseAt | None = None,  # as for multistep; None: no noise is added
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """Clean data in len(times) evaluations: z <- z - (t - r) u(z, t, r), from each time t to the next (2505.13447).

    With noise_at: to the data, and back to the next time with new noise (2512.15657).
    """
    if noise_at is not None:
        return multistep(to_data(model), z, times, noise_at, clock="time", **conditions)
    z = times[0] * z
    for t, r in itertools.pairwise([*times, 0.0]):
        z = z - (t - r) * model(z, _level(t, z), _level(r, z), **conditions)
    return z


def heun(
    model: Model,
    z: torch.Tensor,  # (B, ...) N(0, 1)
    sigmas: Sequence[float],  # descending noise levels, without the final 0
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """The probability-flow ODE by Heun's method in 2 len(sigmas) - 1 evaluations (2206.00364 alg. 1, no churn)."""
    x = sigmas[0] * z
    for sigma, lower in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        slope = (x - model(x, _level(sigma, z), **conditions)) / sigma
        ahead = x + (lower - sigma) * slope
        if lower > 0:  # the last step, to zero, is Euler's
            slope_ahead = (ahead - model(ahead, _level(lower, z), **conditions)) / lower
            ahead = x + (lower - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def flow_heun(
    model: Model,  # a flow map, of which u(z, t, t) is the velocity at t
    z: torch.Tensor,  # (B, ...) N(0, 1)
    times: Sequence[float],  # descending from 1, without the final 0
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """dz/dt = u(z, t, t) by Heun's method in 2 len(times) - 1 evaluations: `heun` in the clock "time"."""
    z = times[0] * z
    for t, r in itertools.pairwise([*times, 0.0]):
        slope = model(z, _level(t, z), _level(t, z), **conditions)
        ahead = z + (r - t) * slope
        if r > 0:  # the last step, to zero, is Euler's
            slope_ahead = model(ahead, _level(r, z), _level(r, z), **conditions)
            ahead = z + (r - t) * (slope + slope_ahead) / 2
        z = ahead
    return z


def dpm_solver_trajectory(
    model: Model,
    x: torch.Tensor,  # (B, ...) at noise level sigma_max
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    **conditions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The probability-flow ODE by multistep DPM-Solver++ of order 3, even in ln sigma (2211.01095 app. B, alg. 2).

    The order rises from 1 and falls to 1 again at the end ("lower_order_final"): 1, 2, 3, ..., 3, 2, 1. Returns the
    points it visits (steps, B, ...), their noise levels (steps,) descending, float64, and its end (B, ...).
    """
    h = math.log(sigma_max / sigma_min) / steps
    sigmas = [sigma_max * math.exp(-h * i) for i in range(steps)]
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    points, D = [], []  # D: of the last three points, newest first
    for i, sigma in enumerate(sigmas):
        points.append(x)
        D = [model(x, _level(sigma, x), **conditions), *D[:2]]
        order = min(i + 1, 3, steps - i)
        x = math.exp(-h) * x - phi_1 * D[0]
        if order == 2:
            x = x - 0.5 * phi_1 * (D[0] - D[1])
        elif order == 3:
            first, bend = D[0] - D[1], D[0] - 2 * D[1] + D[2]
            x = x + phi_2 * (first + bend / 2) - phi_3 * bend / 2
    return torch.stack(points), torch.tensor(sigmas, dtype=torch.float64), x


def _level(level: float, z: torch.Tensor) -> torch.Tensor:
    return torch.full((len(z),), float(level), dtype=z.dtype, device=z.device)


def levels(
    steps: int,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    given: Sequence[float] | None = None,  # a config's sample.sigmas
) -> list[float]:
    """Noise levels for multistep sampling in `steps` evaluations, descending.

    The first `steps` of `given` where it has so many; else, for two steps, sigma_max and 0.821 (the second level of
    iCT and ECT on CIFAR-10, 2310.14189), and for others equal steps through the Karras grid.
    """
    if given is not None and steps <= len(given):
        return list(given[:steps])
    if steps == 1:
        return [sigma_max]
    if steps == 2 and sigma_min < 0.821 < sigma_max:
        return [sigma_max, 0.821]
    return karras_sigmas(steps + 1, sigma_min, sigma_max)[:-1].tolist()


def times(
    steps: int,
    given: Sequence[float] | None = None,  # a config's sample.times
) -> list[float]:
    """Times for `steps` evaluations of a flow map: the first of `given` where it has so many, else even from 1."""
    if given is not None and steps <= len(given):
        return list(given[:steps])
    return [1 - i / steps for i in range(steps)]


TOLERANCE = {"sigma": 0.1, "time": 0.02}  # to which a level is searched, of ln sigma or of t


def search_levels(
    score: Callable[[list[float]], float],  # levels -> what is to be low, as the FID of samples drawn by them
    steps: int,
    highest: float = 80.0,
    lowest: float = 0.002,
    tolerance: float | None = None,  # None: TOLERANCE
    clock: str = "sigma",  # or "time"
) -> Iterator[tuple[list[float], float]]:
    """The best levels of 2, 3, ... `steps` evaluations and their scores (2303.01469 sec. 5).

    Greedy: each keeps the levels before it and finds one more, by golden-section search over ln sigma, or over t,
    between the lowest and the level before. The best level tried is taken, so noise in the scores cannot lose it.
    Levels have three significant digits.
    """
    place, level_at = (math.log, math.exp) if clock == "sigma" else (float, float)
    found = [float(highest)]
    while len(found) < steps:
        tried: dict[float, float] = {}

        def at(where: float, found: list[float] = found, tried: dict[float, float] = tried) -> float:
            level = float(f"{level_at(where):.3g}")
            if level not in tried:
                tried[level] = score([*found, level])
            return tried[level]

        golden_section(at, place(lowest), place(found[-1]), tolerance or TOLERANCE[clock])
        best = min(tried, key=tried.__getitem__)
        found = [*found, best]
        yield found, tried[best]


def golden_section(f: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Where f, which falls and then rises between low and high, is lowest, to within `tolerance`; one call a round."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = f(left), f(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = f(right)
    return (low + high) / 2


def evaluations(model: Model, w: float | None) -> int:
    """How often `guided` evaluates the network for one call: twice where it mixes, and else once."""
    return 1 if getattr(model, "guidance_inputs", False) or w is None or w == 1 else 2


def guided(model: Model, w: float | torch.Tensor | None, interval: Sequence[float] | None = None) -> Model:
    """Classifier-free guidance: D_null + w (D - D_null) (2207.12598), or velocities so; None or 1: the model itself.

    w: one number, or one a sample (B,). The null is the model without labels, which network.label_dropout has taught
    it. A network that is told its guidance (guidance_inputs) is told w and the interval of t, and is evaluated once.
    """
    if getattr(model, "guidance_inputs", False):
        return _told(model, w, interval)
    if not isinstance(w, torch.Tensor) and evaluations(model, w) == 1:
        return model

    def mixed(x: torch.Tensor, *levels: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        own = model(x, *levels, **conditions)
        null = model(x, *levels, **{**conditions, "class_labels": None})
        weight = w.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(w, torch.Tensor) else w
        return null + weight * (own - null)

    return mixed


def _told(model: Model, w: float | None, interval: Sequence[float] | None) -> Model:
    if w is None and interval is None:
        return model

    def told(z: torch.Tensor, t: torch.Tensor, *r: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        if w is not None:
            conditions["guidance"] = torch.as_tensor(w).to(t).expand(len(t))
        if interval is not None:
            conditions["interval"] = t.new_tensor(interval).expand(len(t), 2)
        return model(z, t, *r, **conditions)

    return told
