"""What a config and a seed ask of sampling: noise levels, solver, classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from config import Config
from objectives.draws import key
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


def draw_labels(seed: int, indices: Sequence[int], class_counts: Sequence[int]) -> torch.Tensor:
    """Class of each sample, int64 (len(indices),), as often as in the training set; depends on (seed, index) alone."""
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    uniform = [key(seed, "label", int(i)) / 2**63 for i in indices]
    return torch.searchsorted(shares, torch.tensor(uniform, dtype=torch.float64) * shares[-1], right=True)
