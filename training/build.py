"""What a config describes, built: the objective."""

from __future__ import annotations

import math

import torch

from config import Config, ConfigError
from objectives import losses
from objectives.cd import ConsistencyDistillation
from objectives.cmt import MidTraining
from objectives.ct import ConsistencyTraining
from objectives.ect import EasyConsistencyTuning
from objectives.edm import EDM
from objectives.ict import ImprovedConsistencyTraining
from objectives.pd import ProgressiveDistillation
from objectives.scm import ContinuousConsistency
from objectives.tcm import TruncatedConsistency


def build(cfg: Config, model: torch.nn.Module, teacher: torch.nn.Module | None = None) -> torch.nn.Module:
    """The objective that `cfg` asks for, on `model`'s noise levels; `teacher` is the model of objective.teacher.

    Raises losses.WeightsMissing where LPIPS has no VGG weights.
    """
    o, n, steps, batch = cfg.objective, cfg.network, cfg.train.steps, cfg.train.batch_size
    levels = {"sigma_min": n.sigma_min, "sigma_max": n.sigma_max}
    device = next(model.parameters()).device
    if o.name in ("ct", "cd", "ict", "cmt"):
        metric = getattr(o, "metric", "pseudo_huber")
        distance = losses.build(metric, o.huber_c, getattr(o, "lpips_weights", None), device, resize=o.name != "cmt")

    match o.name:
        case "edm" | "trigflow":  # one loss in two clocks: only the preconditioning and P_mean, P_std differ
            return EDM(o.P_mean, o.P_std, n.sigma_data)
        case "ct":
            grid = {**levels, "sigma_data": n.sigma_data}
            return ConsistencyTraining(model, steps, distance, o.s0, o.s1, o.mu0, o.weighting, **grid)
        case "cd":
            grid = {**levels, "sigma_data": n.sigma_data}
            how = (o.N, o.mu, o.solver, o.guidance, o.weighting)
            return ConsistencyDistillation(model, teacher, distance, *how, **grid)
        case "ict":
            return ImprovedConsistencyTraining(steps, distance, o.s0, o.s1, o.P_mean, o.P_std, **levels)
        case "ect":
            steps_per_stage = o.double_kimg * 1000 / batch if o.double_kimg else math.inf
            return EasyConsistencyTuning(steps_per_stage, o.q, o.mapping, o.P_mean, o.P_std, o.huber_c)
        case "sct" | "scd":
            return ContinuousConsistency(
                n.sigma_data, o.P_mean, o.P_std, o.warmup, o.c, teacher, getattr(o, "guidance", None)
            )
        case "tcm":
            how = (o.t_prime, o.q, o.boundary_share, o.boundary_weight, o.df, o.scale, o.huber_c)
            return TruncatedConsistency(teacher, *how, sigma_max=n.sigma_max)
        case "cmt":
            return MidTraining(teacher, distance, o.steps, **levels)
        case "pd":
            for name in ("precond", "c_noise"):  # the student will take the teacher's place
                there, here = (getattr(m, name, None) for m in (teacher, model))
                if there != here:
                    raise ConfigError(
                        f"network.{name}: is {here}, and objective.teacher's is {there}; pd needs the same"
                    )
            return ProgressiveDistillation(teacher, steps, o.N, o.weighting, **levels, sigma_data=n.sigma_data)
    raise AssertionError(f"config.py let through objective.name {o.name!r}")
