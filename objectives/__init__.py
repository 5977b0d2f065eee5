"""Training objectives: one file a method, one class each, all called alike.

    out = objective(model, x, step=k, draws=draws, **conditions)    # out.loss: scalar, out.log: name -> scalar
    objective.after_step(model, step=k)                             # only where a method has one (the CT target)

`model(x, sigma, **conditions)` is any module from a batch of any shape and its noise levels (B,) to clean data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

import losses
from objectives.common import Output as Output
from objectives.ct import ConsistencyTraining
from objectives.ect import EasyConsistencyTuning
from objectives.edm import EDM
from objectives.ict import ImprovedConsistencyTraining

if TYPE_CHECKING:
    from config import Config


def build(cfg: Config, model: torch.nn.Module) -> torch.nn.Module:
    """The objective that `cfg` asks for, on `model`'s noise levels. Raises losses.WeightsMissing for LPIPS."""
    o = cfg.objective
    levels = {"sigma_min": cfg.network.sigma_min, "sigma_max": cfg.network.sigma_max}
    if o.name == "edm":
        return EDM(o.P_mean, o.P_std, cfg.network.sigma_data)
    if o.name == "ct":
        device = next(model.parameters()).device
        distance = losses.build(o.metric, o.huber_c, o.lpips_weights, device)
        return ConsistencyTraining(
            model,
            cfg.train.steps,
            distance,
            o.s0,
            o.s1,
            o.mu0,
            o.weighting,
            **levels,
            sigma_data=cfg.network.sigma_data,
        )
    if o.name == "ict":
        distance = losses.build("pseudo_huber", o.huber_c)
        return ImprovedConsistencyTraining(cfg.train.steps, distance, o.s0, o.s1, o.P_mean, o.P_std, **levels)
    if o.name == "ect":
        steps = o.double_kimg * 1000 / cfg.train.batch_size if o.double_kimg else math.inf
        return EasyConsistencyTuning(steps, o.q, o.mapping, o.P_mean, o.P_std, o.huber_c)
    raise AssertionError(f"config.py let through objective.name {o.name!r}")
