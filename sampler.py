"""Noise in, data out: pure functions of a model, starting noise and noise levels.

`model(x, sigma, **conditions)` maps a batch of any shape and its noise levels (B,) to clean data.
"""

from __future__ import annotations

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
    sigmas: Sequence[float],  # descending noise levels, the first where z starts; one level is one-step sampling
    noise_at: NoiseAt | None = None,  # i >= 1 -> (B, ...) N(0, 1) injected before evaluation i; None: torch's generator
    sigma_min: float = 0.002,
    **conditions: torch.Tensor | None,
) -> torch.Tensor:
    """Clean data in len(sigmas) evaluations: x <- D(x + sqrt(s^2 - sigma_min^2) z; s) (2303.01469 alg. 1)."""
    x = model(sigmas[0] * z, _level(sigmas[0], z), **conditions)
    for i, sigma in enumerate(sigmas[1:], start=1):
        noise = torch.randn_like(z) if noise_at is None else noise_at(i)
        x = x + max(sigma**2 - sigma_min**2, 0) ** 0.5 * noise
        x = model(x, _level(sigma, z), **conditions)
    return x


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


def _level(sigma: float, z: torch.Tensor) -> torch.Tensor:
    return torch.full((len(z),), float(sigma), dtype=z.dtype, device=z.device)


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


def search_levels(
    score: Callable[[list[float]], float],  # noise levels -> what is to be low, as the FID of samples drawn by them
    steps: int,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    tolerance: float = 0.1,  # of ln sigma
) -> Iterator[tuple[list[float], float]]:
    """The best levels of 2, 3, ... `steps` evaluations and their scores (2303.01469 sec. 5).

    Greedy: each keeps the levels before it and finds one more, by golden-section search over ln sigma between sigma_min
    and the level before. The best level tried is taken, so noise in the scores cannot lose it. Levels have three
    significant digits.
    """
    found = [float(sigma_max)]
    while len(found) < steps:
        tried: dict[float, float] = {}

        def at(log_sigma: float, found: list[float] = found, tried: dict[float, float] = tried) -> float:
            sigma = float(f"{math.exp(log_sigma):.3g}")
            if sigma not in tried:
                tried[sigma] = score([*found, sigma])
            return tried[sigma]

        golden_section(at, math.log(sigma_min), math.log(found[-1]), tolerance)
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


def guided(model: Model, w: float | None) -> Model:
    """Classifier-free guidance of a diffusion model, D_null + w (D - D_null) (2207.12598); None or 1: the model itself.

    The null is the model without labels, which network.label_dropout has taught it.
    """
    if w is None or w == 1:
        return model

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        D = model(x, sigma, **conditions)
        D_null = model(x, sigma, **{**conditions, "class_labels": None})
        return D_null + w * (D - D_null)

    return denoiser
