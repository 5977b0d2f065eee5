"""One optimizer step, top to bottom: passes, gradient, ranks, clipping, optimizer, averages; and what it moves."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from config import Config, ConfigError, Train, in_steps
from ema import EMA, decay_from_half_life
from networks import Wrapper
from objectives.draws import Draws, key
from training.devices import rank_and_world, talk
from training.flat import FlatParameters
from training.muon import Muon, matrices_last


def learning_rate(step: int, cfg: Train) -> float:
    """Learning rate of step k, counted from 0: a linear rise, then held, or falling.

    EDM2's inverse_sqrt counts the steps before this one, so a first step that rises has rate 0 (2312.02696 eq. 67).
    """
    if cfg.lr_decay == "inverse_sqrt":
        warmup = in_steps(cfg.lr_warmup, cfg.steps, whole=False)
        rise = min(step / warmup, 1.0) if warmup else 1.0
        return cfg.lr * rise / math.sqrt(max(step / cfg.lr_decay_batches, 1.0))
    warmup = in_steps(cfg.lr_warmup, cfg.steps)
    rise = min((step + 1) / warmup, 1.0) if warmup else 1.0
    done = min(step / cfg.steps, 1.0)
    fall = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.lr_decay]
    return cfg.lr * rise * fall


def split_batch(batch_size: int, microbatch: int | None, ranks: int) -> tuple[int, int]:
    """(samples per rank, samples per pass) of a global batch. Raises ConfigError where it does not divide."""
    if batch_size % ranks:
        raise ConfigError(f"train.batch_size: {batch_size} does not divide over {ranks} devices")
    local = batch_size // ranks
    part = min(microbatch or local, local)
    if local % part:
        raise ConfigError(f"train.microbatch: {part} does not divide the {local} images of each device")
    return local, part


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # inside the network; others: as the weights are


class TrainingStep:
    """All that an optimizer step moves (network, objective, averages, optimizer), and the step: call it with a batch.

    What runs in which dtype: weights, gradient, optimizer and averages are float32 (float64 for precision fp64). Inside
    the network autocast takes bf16 or fp16, as `precision` says, for convolutions, attention and their norms; the noise
    and class embedding and the layers that hand it to the blocks stay float32, as in EDM. Preconditioning, differences
    of outputs, losses and norms are float32. A float32 product is float32, not TF32, unless train.tf32 asks for it.
    Where precision is chosen by `auto`, a step that half precision would get wrong (objective.in_half) is float32.
    """

    def __init__(self, cfg: Config, codec: torch.nn.Module, model: Wrapper, objective: torch.nn.Module, precision: str):
        self.cfg, self.codec, self.model, self.objective, self.precision = cfg, codec, model, objective, precision
        self.step = 0  # optimizer steps done
        self.whole = True  # False while an update moves the state: then it is of no step
        self.rank, self.world = rank_and_world()
        self.device = next(model.parameters()).device
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        asked = None if cfg.train.microbatch == "auto" else cfg.train.microbatch  # diagnose.find_microbatch finds out
        self.local_batch, self.microbatch = split_batch(cfg.train.batch_size, asked, self.world)
        self.group_size = getattr(objective, "group_size", 1)
        if self.microbatch % self.group_size:
            raise ConfigError(
                f"train.batch_size: a pass of {self.microbatch} images on each of {self.world} devices is no multiple "
                f"of the {self.group_size} that objective {cfg.objective.name} takes together"
            )
        decays = cfg.ema.decay or []
        if cfg.ema.half_life_kimg:
            decays = [decay_from_half_life(kimg * 1000, cfg.train.batch_size) for kimg in cfg.ema.half_life_kimg]
        self.emas = [EMA(model, decay, cfg.ema.warmup) for decay in decays]
        self.emas += [EMA(model, std=std) for std in cfg.ema.std or []]
        self.forced = [module for module in model.modules() if hasattr(module, "force_weights")]  # EDM2's network
        for network in self.forced:
            network.forcing = False  # not in each pass: once a step, so that microbatches change nothing
        parameters = [p for m in (model, objective) for p in m.parameters() if p.requires_grad]
        self.flat = FlatParameters(matrices_last(parameters) if cfg.train.optimizer == "muon" else parameters)
        self.gradient = self.flat.gradient
        self.optimizer = build_optimizer(cfg.train, self.flat)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        parts = [model, *objective.modules()]
        self.networks = [m for m in parts if getattr(m, "autocast", None)]  # in half precision
        self.sums: dict[str, Any] = defaultdict(float)  # since the last log; tensors stay on the device
        self.counts: dict[str, Any] = defaultdict(float)  # of the sums that are not over steps
        self.logged = 0  # the step of the last log
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)  # steps with a non-finite gradient
        self.streak = torch.zeros_like(self.skipped)  # of them, those in a row up to now

    def __call__(self, values: torch.Tensor, given: torch.Tensor | None) -> None:
        """One optimizer step on this rank's values (B, ...) and what is given with them, labels or conditions."""
        for network in self.forced:
            network.force_weights()
        self.backward(values, given)
        if self.world > 1:
            talk(dist.all_reduce, self.gradient)
            self.gradient /= self.world
        self.whole = False
        self.update(learning_rate(self.step, self.cfg.train))
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(self.model, step=self.step)
        for ema in self.emas:
            ema.update(self.model, self.step + 1)
        self.step += 1
        self.whole = True

    def backward(self, values: torch.Tensor, given: torch.Tensor | None) -> None:
        """The gradient of this rank's batch, in microbatches."""
        starts = range(0, self.local_batch, self.microbatch)
        self.gradient.zero_()
        in_half = getattr(self.objective, "in_half", lambda step, model: True)
        half = self.cfg.train.precision != "auto" or in_half(self.step, self.model)
        for network in self.networks:
            network.autocast = HALF[self.precision] if half else None
        for start in starts:
            part = slice(start, start + self.microbatch)
            x, conditions, draws = self.prepare(values[part], None if given is None else given[part], start)
            if self.cfg.train.compile == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()  # no output of the pass before is needed any more
            out = self.objective(self.model, x, step=self.step, draws=draws, **conditions)
            loss = out.loss.mean()
            self.scaler.scale(loss / len(starts)).backward()
            self.gradient[0] += 0 * loss.detach()  # a bad loss makes a bad step, whatever its gradient
            self.add_to_log({"loss": loss, **out.log}, 1 / len(starts))

    def prepare(
        self, values: torch.Tensor, given: torch.Tensor | None, start: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Draws]:
        """What the model sees, conditions and draws for rows `start`... of this rank's batch, on the device."""
        first, total = self.rank * self.local_batch + start, self.cfg.train.batch_size
        draws, augmenting, dropping = (
            Draws(key(self.cfg.run.seed, stream, self.step), len(values), first, total, self.device)
            for stream in ("objective", "augment", "dropout")
        )
        values = values.to(self.device, non_blocking=True)
        given = None if given is None else given.to(self.device, non_blocking=True)
        x, conditions = self.codec.to_model(values, given, augmenting, self.dtype)
        rows = (len(x),)
        if getattr(self.model.model, "dropout", 0):  # every pass of the step drops the same units
            conditions["dropout_keys"] = dropping.integers(2**31, rows)
        if (share := getattr(self.cfg.network, "label_dropout", 0)) and "class_labels" in conditions:
            conditions["class_labels"] *= (dropping.uniform(rows) >= share)[:, None]
        return x, conditions, draws

    def update(self, lr: float) -> None:
        """Clip and step the optimizer. A non-finite gradient is counted and moves no weight, without a wait for it."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite()
        self.skipped += ~finite
        self.streak += 1
        self.streak *= ~finite
        self.add_to_log({"grad_norm": norm, "lr": lr})
        if self.cfg.train.grad_clip:
            self.gradient *= (self.cfg.train.grad_clip / norm).clamp(max=1)
        self.gradient.masked_fill_(~finite, 0)
        for group in self.optimizer.param_groups:  # a rate of 0 holds the weights still
            if torch.is_tensor(group["lr"]):
                group["lr"].copy_(lr * finite)
            else:
                group["lr"] = lr * float(finite)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def add_to_log(self, values: dict[str, Any], weight: float = 1.0) -> None:
        """Add to the sums that the next log entry averages; tensors are not read here."""
        for name, value in values.items():
            if isinstance(value, tuple):  # (sum, count) of a part of the batch
                value, count = value
                self.counts[name] += count
            else:
                value = weight * value
            self.sums[name] += value.detach() if torch.is_tensor(value) else value

    def means(self) -> dict[str, float]:
        """What was added to the log, averaged over the steps since the last call; it waits for the device."""
        steps = self.step - self.logged
        means = {name: float(total) / max(float(self.counts.get(name, steps)), 1) for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        self.logged = self.step
        return {**means, "skipped_steps": int(self.skipped)}

    def state(self) -> dict[str, Any]:
        """All that a step needs to go on. Draws and data order are functions of (seed, step): no generator is here."""
        own = self.optimizer.state[self.flat.vector]
        return {
            "step": self.step,
            "microbatch": self.microbatch,
            "model": self.model.state_dict(),
            "ema": [ema.module.state_dict() for ema in self.emas],
            "objective": self.objective.state_dict(),
            "optimizer": {k: self.flat.split(v) if v.shape == self.gradient.shape else v for k, v in own.items()},
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
            "streak": int(self.streak),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a state. How the optimizer works (fused, capturable) is this device's choice, not the state's."""
        self.model.load_state_dict(state["model"])
        for ema, weights in zip(self.emas, state["ema"], strict=True):
            ema.module.load_state_dict(weights)
        self.objective.load_state_dict(state["objective"])
        own = {name: self.flat.join(v) if isinstance(v, list) else v for name, v in state["optimizer"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})
        if state["scaler"]:  # none where another device, which needed none, wrote it
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state.get("skipped", 0))
        self.streak.fill_(state.get("streak", 0))
        self.step = self.logged = state["step"]
        if self.cfg.train.microbatch == "auto":  # what was found holds: the sums' order is part of a run's numbers
            self.microbatch = math.gcd(self.local_batch, state.get("microbatch", self.local_batch))


def build_optimizer(cfg: Train, flat: FlatParameters) -> torch.optim.Optimizer:
    """The optimizer of all parameters as one vector."""
    vector = flat.vector
    on_gpu = vector.device.type == "cuda"
    # On a GPU the rate is a tensor, so that a bad step can be masked there without waiting for the result.
    lr = torch.tensor(cfg.lr, device=vector.device) if on_gpu else cfg.lr
    options = {"lr": lr, "betas": tuple(cfg.betas), "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "muon":
        return Muon(flat, capturable=on_gpu, **options)
    if cfg.optimizer == "radam":
        return torch.optim.RAdam([vector], **options, foreach=True, capturable=on_gpu)
    adam = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return adam([vector], **options, fused=True)
