"""The original ECT code as a training step of our trainer: `quality.py --original`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from originals import ect

import config
from objectives.draws import key
from training.devices import set_arithmetic
from training.step import TrainingStep, learning_rate


class OriginalECT(TrainingStep):
    """Its network, loss, RAdam and arithmetic (float32, eager); from us the start, batches, rate, averages and scores.

    Weights are copied into our network of the same names after every step, so that all else sees them there.
    """

    def __init__(self, path: Path, cfg: config.Config, codec: Any, model: Any, objective: Any, precision: str):
        super().__init__(cfg, codec, model, objective, precision)
        if cfg.objective.name != "ect":
            raise config.ConfigError(f"--original: objective {cfg.objective.name}: name rows of ECT alone with --only")
        shape = (codec.network_shape["channels"], codec.network_shape["resolution"])
        self.original = ect(path, cfg, shape, self.device)
        self.original.average = lambda: None  # ours, so that both sides' are as long
        theirs = dict(self.original.network.model.named_parameters())
        self.pairs = [theirs[name] for name, _ in model.model.named_parameters()], list(model.model.parameters())
        self.give_weights()

    def __call__(self, values: torch.Tensor, given: torch.Tensor | None) -> None:
        """One optimizer step of theirs."""
        torch.manual_seed(key(self.cfg.run.seed, "original", self.step))
        x, _, _ = self.prepare(values, given, 0)
        rate = learning_rate(self.step, self.cfg.train)
        for group in self.original.optimizer.param_groups:
            group["lr"] = rate
        self.original.schedule(self.objective.stage(self.step))
        set_arithmetic(self.original.tf32)
        self.whole = False
        self.add_to_log({"loss": self.original.step(x), "lr": rate})
        set_arithmetic(self.cfg.train.tf32)
        with torch.no_grad():
            torch._foreach_copy_(self.pairs[1], self.pairs[0])
        for ema in self.emas:
            ema.update(self.model, self.step + 1)
        self.step += 1
        self.whole = True

    @torch.no_grad()
    def give_weights(self) -> None:
        """Ours to theirs."""
        torch._foreach_copy_(*self.pairs)

    def state(self) -> dict[str, Any]:
        """Ours, with their optimizer's."""
        return {**super().state(), "original": self.original.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on."""
        super().load_state(state)
        self.original.optimizer.load_state_dict(state["original"])
        self.give_weights()
