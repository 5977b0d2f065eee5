"""Step counts, EMA rates, the pairing t -> r and noise-level distributions, as pure functions.

sigma is the noise level of x_sigma = x + sigma z (the papers' t in the EDM family), k the current step, K the run's.
"""

from __future__ import annotations

import math

import torch

# CT (Song et al. 2023, 2303.01469) ------------------------------------------------------------------------------------


def ct_levels(k: int, K: int, s0: int, s1: int) -> int:
    """N(k): noise levels in the grid at step k, from s0 at the start to s1 + 1 at the end (2303.01469 app. C)."""
    square = k / K * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(math.ceil(math.sqrt(square) - 1), 1) + 1


def ct_target_decay(levels: int, s0: int, mu0: float) -> float:
    """mu(k): decay of the CT target network for a grid of `levels` = N(k) noise levels (2303.01469 app. C).

    The paper's exponent divides by N - 1, the number of intervals.
    """
    return math.exp(s0 * math.log(mu0) / (levels - 1))


# iCT (Song & Dhariwal 2023, 2310.14189) -------------------------------------------------------------------------------


def ict_levels(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1: doubles at equal intervals K' of the run (2310.14189 eq. 11)."""
    interval = math.floor(K / (math.log2(s1 // s0) + 1))
    return min(s0 * 2 ** (k // max(interval, 1)), s1) + 1


def ict_index_probabilities(sigmas: torch.Tensor, P_mean: float, P_std: float) -> torch.Tensor:
    """p(i) of the pair (sigma_i, sigma_{i+1}) for ascending sigmas (N,): (N-1,), summing to 1 (2310.14189 eq. 10).

    The log-normal's mass between neighbouring levels: N(P_mean, P_std^2) of ln sigma, discretised.
    """
    cdf = torch.erf((sigmas.log() - P_mean) / (math.sqrt(2) * P_std))
    mass = cdf[1:] - cdf[:-1]
    return mass / mass.sum()


# ECT (Geng et al. 2024, 2406.14548) -----------------------------------------------------------------------------------


def ect_pair(
    t: torch.Tensor,  # (B,) the student's noise level
    stage: float,  # a: how often delta t has shrunk so far; 0 at the start
    q: float = 2.0,  # factor by which it shrinks per stage
    mapping: str = "sigmoid",  # n(t) = 1 + k sigmoid(-b t), or "const": n(t) = 1
    k: float = 8.0,
    b: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, t - r), (B,) each; r(t) = max(0, t (1 - q^-(stage+1) n(t))) is the target's noise level.

    2406.14548 sec. 3.2, app. A. In float32, where t - r would cancel, the gap comes first and r = t - gap.
    """
    n = 1 + k * torch.sigmoid(-b * t) if mapping == "sigmoid" else torch.ones_like(t)
    share = n / q ** (stage + 1)
    if t.dtype == torch.float64:
        r = (t * (1 - share)).clamp(min=0)
        return r, t - r
    gap = t * share.clamp(max=1)
    return t - gap, gap


def ect_r(t: torch.Tensor, stage: float, q: float = 2.0, mapping: str = "sigmoid") -> torch.Tensor:
    """r(t) of `ect_pair`."""
    return ect_pair(t, stage, q, mapping)[0]


# TCM (Lee et al. 2024, 2410.14895) ------------------------------------------------------------------------------------


def truncated_student_t(df: float, scale: float, low: float, high: float, points: int = 4097) -> torch.Tensor:
    """Quantiles of ln t, Student-t with mean 0 truncated to low <= t <= high: float64 (points,), evenly spaced in p.

    Draw by interpolating between them at a uniform place (2410.14895 sec. 4.2).
    """
    from scipy.stats import t  # here: the other schedules need torch alone

    law = t(df, scale=scale)
    first, last = law.cdf([math.log(low), math.log(high)])
    return torch.from_numpy(law.ppf(torch.linspace(first, last, points, dtype=torch.float64).numpy()))


# Flow maps: times 0 <= r <= t <= 1, z_t = (1 - t) x + t noise ---------------------------------------------------------


def time_pair(
    t: torch.Tensor,  # (B,) drawn on its own
    r: torch.Tensor,  # (B,) drawn on its own
    equal: torch.Tensor,  # (B,) bool: rows whose r becomes t
    sampler: str = "v1",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, r) of MeanFlow, r <= t, (B,) each.

    v0, the paper's (2505.13447 sec. 4.3): the larger is t, the smaller r, then r = t in the rows `equal`.
    v1, the released CIFAR-10 code's: r = t in those rows, then r = min(t, r), so more rows than `equal` have r = t.
    """
    if sampler == "v0":
        t, r = torch.maximum(t, r), torch.minimum(t, r)
    r = torch.where(equal, t, r)
    return t, torch.minimum(t, r)


def soflow_rho(k: int, K: int, rho: tuple[float, float], schedule: str = "exponential") -> float:
    """rho(k), the share of the way from t to r at which l lies: from rho[0] at step 0 to rho[1] at K (2512.15657)."""
    first, last = rho
    done = min(k / K, 1.0)
    if schedule == "exponential":
        return first * (last / first) ** done
    if schedule == "linear":
        return first + (last - first) * done
    if schedule == "cosine":
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
    return last  # constant


def soflow_guidance(t: torch.Tensor, fade: float = 0.8, k: float = 0.025) -> torch.Tensor:
    """g(t) (B,), by which SoFlow's guidance is multiplied: 1 up to t = fade, then smoothly down to 0 at t = 1.

    1 - exp(-k a / (1 - a)), a = (1 - t)/(1 - fade), as in the code of 2512.15657. fade = 1: 1 everywhere.
    """
    if fade >= 1:
        return torch.ones_like(t)
    a = ((1 - t) / (1 - fade)).clamp(0, 1 - 1e-6)
    return torch.where(t <= fade, 1.0, -torch.expm1(-k * a / (1 - a)))
