"""Averaged weights: what is sampled, scored and published."""

from __future__ import annotations

import copy
import math

import torch


def decay_from_half_life(half_life: float, batch_size: int) -> float:
    """Decay per step whose weight halves every `half_life` images (2206.00364 app. F)."""
    return 0.5 ** (batch_size / half_life)


def warmed_up(decay: float, step: int, ratio: float) -> float:
    """The decay used at step >= 1: its half-life is held to at most `ratio` x the steps so far (2206.00364 app. F).

    Without it a short run's average still holds the initialisation. ratio 0 turns it off; EDM uses 0.05.
    """
    if ratio <= 0 or decay <= 0:
        return decay
    half_life = min(-math.log(2) / math.log(decay), max(step, 1) * ratio)
    return 0.5 ** (1 / half_life)


class EMA:
    """An exponential moving average of a module: `self.module` is a frozen copy in eval mode."""

    def __init__(
        self,
        model: torch.nn.Module,
        decay: float,  # per optimizer step: average <- decay average + (1 - decay) weights
        warmup: float = 0.0,  # see warmed_up
    ):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.module.autocast = None  # sampled in float32, as generate.py will
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1. Buffers are copied."""
        weight = 1 - warmed_up(self.decay, step, self.warmup)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
