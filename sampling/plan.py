"""What a config asks of sampling: the levels (noise levels, or times of a flow map) and the solver."""

from __future__ import annotations

import sampler
from config import Config

LEVELS = {"sigma": "sigmas", "time": "times"}  # clock -> what its levels are called in options, settings and files


def clock(cfg: Config) -> str:
    """What the network is told: "sigma", a noise level, or "time", a flow map's two times (see sampler)."""
    return "sigma" if cfg.network.times is None else "time"


def lowest_level(cfg: Config) -> float:
    """The lowest level that the network is trained for: sigma_min, or TCM's t'; time 0."""
    return getattr(cfg.objective, "t_prime", cfg.network.sigma_min) if clock(cfg) == "sigma" else 0.0


def highest_level(cfg: Config) -> float:
    """The level where sampling starts: sigma_max; time 1."""
    return cfg.network.sigma_max if clock(cfg) == "sigma" else 1.0


def plan(cfg: Config, steps: int = 1) -> tuple[list[float], str]:
    """(levels, solver) that a config samples by: `steps` evaluations, or Heun's for a diffusion or flow model."""
    low, high, s, solver = lowest_level(cfg), highest_level(cfg), cfg.sample, _solver(cfg)
    if clock(cfg) == "time":
        return (sampler.times(s.heun_steps) if solver == "heun" else sampler.times(steps, s.times)), solver
    if solver == "heun":
        return sampler.karras_sigmas(s.heun_steps, low, high).tolist(), solver
    return sampler.levels(steps, high, low, s.sigmas), solver


def _solver(cfg: Config) -> str:
    """sample.solver, or what auto stands for: the papers' own."""
    if cfg.sample.solver != "auto":
        return cfg.sample.solver
    if cfg.network.times == "t" or cfg.objective.name in ("edm", "trigflow"):
        return "heun"
    if clock(cfg) == "sigma":
        return "multistep"
    return "renoise" if cfg.objective.name == "soflow" else "jumps"
