"""What a config asks of sampling: noise levels and solver."""

from __future__ import annotations

from config import Config
from sampler import karras_sigmas, levels


def lowest_level(cfg: Config) -> float:
    """The lowest noise level that the network is trained for: sigma_min, or TCM's t'."""
    return getattr(cfg.objective, "t_prime", cfg.network.sigma_min)


def plan(cfg: Config, steps: int = 1) -> tuple[list[float], str]:
    """(noise levels, solver) that a config samples by: `steps` evaluations, or Heun's for a diffusion model."""
    low, high, s = lowest_level(cfg), cfg.network.sigma_max, cfg.sample
    if s.solver == "heun" or (s.solver == "auto" and cfg.objective.name in ("edm", "trigflow")):
        return karras_sigmas(s.heun_steps, low, high).tolist(), "heun"
    return levels(steps, high, low, s.sigmas), "multistep"
