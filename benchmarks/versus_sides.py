"""What a side of benchmarks/versus.py is: a loss, one-step samples, and imports from somebody else's checkout."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, checkout

import config
import networks

SHAPE = {"resolution": 8, "channels": 1, "label_dim": 0, "augment_dim": 0}


@dataclass
class Method:
    """What a side brings: a loss, something after each optimizer step, and one-step samples from noise z ~ N(0, 1)."""

    net: torch.nn.Module  # trained, and averaged
    loss: Callable[[torch.Tensor, int], torch.Tensor]  # (x, step) -> scalar
    sample: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # (average of net, z) -> clean data
    after: Callable[[int], None] = lambda step: None


def network(**settings: Any) -> Any:
    """The default run's network with other settings; the same weights every time."""
    torch.manual_seed(0)
    cfg = config.load(ROOT / "config.yml").network.model_copy(update=settings)
    return networks.build(cfg.model_dump(), **SHAPE)


def ours(
    objective: torch.nn.Module,
    model: torch.nn.Module,
    sample: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],  # (average of model, z) -> clean data
) -> Method:
    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return objective(model, x, step=step).loss.mean()

    def after(step: int) -> None:
        if hasattr(objective, "after_step"):
            objective.after_step(model, step=step)

    both = torch.nn.ModuleList([model, objective])  # sCT's weighting is trained too
    return Method(both, loss, lambda average, z: sample(average[0], z), after)


@contextmanager
def imported(folder: Path, *missing: str, **names: Any) -> Iterator[None]:
    """Imports find the checkout in `folder`; modules that are not needed here, and hard to install, are empty ones."""
    if not folder.exists():
        raise config.ConfigError(f"{folder}: there is no such checkout; the head of benchmarks/versus.py tells which")
    with checkout(folder):
        for name in missing:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(names)
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """Losses that keep the state of CUDA's generator keep the CPU's."""
    real = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    try:
        yield
    finally:
        torch.cuda.get_rng_state, torch.cuda.set_rng_state = real
