"""What a side of benchmarks/versus.py is: a loss, one-step samples, imports from a checkout; and how it is trained."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import checkout

import config
import data
import networks
from ema import EMA
from objectives.draws import key
from sources.images import ImageSet
from training.step import learning_rate


@dataclass
class Case:
    """What both sides of a pair are given."""

    folder: Path  # of the checkouts
    steps: int  # of the run,
    batch: int  # of so many images each
    cfg: config.Config  # its data, network and metrics
    dataset: ImageSet
    starts: Path  # models that both sides start from are kept as STARTS-NAME.pt


@dataclass
class Method:
    """What a side brings: a loss, something after each optimizer step, and one-step samples from noise z ~ N(0, 1)."""

    net: torch.nn.Module  # trained, and averaged
    loss: Callable[[torch.Tensor, int], torch.Tensor]  # (x, step) -> scalar
    sample: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # (average of net, z) -> clean data
    after: Callable[[int], None] = lambda step: None


def network(case: Case, **settings: Any) -> Any:
    """The config's network with other settings; the same weights every time."""
    torch.manual_seed(0)
    shape = {"resolution": case.dataset.resolution, "channels": case.dataset.channels}
    return networks.build(case.cfg.network.model_copy(update=settings).model_dump(), **shape)


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


def step_by_step(method: Method, case: Case, lr: float, seed: int) -> Iterator[EMA]:
    """Train by RAdam, a step at a time: yields the average after each."""
    cfg, steps = case.cfg.train, case.steps
    cfg.lr, cfg.steps, cfg.lr_warmup, cfg.lr_decay = lr, steps, steps // 20, "cosine"
    optimizer = torch.optim.RAdam(method.net.parameters(), lr=lr)
    average = EMA(method.net, 0.999, 0.05)
    batches = data.batches(case.dataset, seed, case.batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        torch.manual_seed(key(seed, "versus", step))
        np.random.seed(key(seed, "versus", step) % 2**32)  # some originals draw times by it
        optimizer.zero_grad()
        method.loss(data.to_float(next(batches)[0]), step).backward()
        optimizer.step()
        method.after(step)
        average.update(method.net, step + 1)
        yield average


def trained(method: Method, case: Case, lr: float, seed: int) -> tuple[torch.nn.Module, float]:
    """(average, seconds) of the whole run."""
    started = time.perf_counter()
    *_, average = step_by_step(method, case, lr, seed)
    return average.module, time.perf_counter() - started


def start(case: Case, name: str, build: Callable[[Case], Method], steps: int, lr: float) -> dict[str, torch.Tensor]:
    """Weights of our average after such a run of seed 0, which both sides start from; trained once and kept."""
    path = case.starts.with_name(f"{case.starts.name}-{name}.pt")
    if not path.exists():
        longer = replace(case, steps=steps, cfg=case.cfg.model_copy(deep=True))
        average, _ = trained(build(longer), longer, lr, 0)
        torch.save(average[0].state_dict(), path)
    return torch.load(path, weights_only=True)
