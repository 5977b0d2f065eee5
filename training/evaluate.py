"""How a run does: samples of its averaged weights as a grid, and their scores."""

from __future__ import annotations

from pathlib import Path

import torch

from config import Config
from metrics.scores import ScoreError
from networks import Preconditioner
from sampling.drawing import Drawing
from sampling.plan import plan
from sampling.samples import samples_of
from training.logs import RunLog


class Evaluation:
    """Draws the first samples of the run's seed, as generate.py would; rank 0 does it."""

    def __init__(self, cfg: Config, dataset: object, model: Preconditioner, folder: Path, log: RunLog, batch: int):
        self.cfg, self.dataset, self.model, self.folder, self.log = cfg, dataset, model, folder, log
        self.samples = samples_of(model.codec)
        self.batch = min(256, batch)  # what training has memory for

    def draw(self, given: torch.Tensor | None, count: int) -> torch.Tensor:
        """The first `count` samples, on the CPU: uint8 images, or vectors in their own units."""
        what = (self.model, self.cfg.run.seed, count, *plan(self.cfg), given, self.batch, self.cfg.sample.guidance)
        return Drawing(*what).draw(0, count)

    def write_grid(self, step: int) -> None:
        """A grid of samples as a file, and in TensorBoard where it is a picture."""
        count = self.cfg.sample.grid
        given = self.samples.given_for_grid(self.dataset, self.cfg.run.seed, count)
        path = self.folder / "samples" / f"step-{step:08d}"
        path, picture = self.samples.write_grid(self.draw(given, count), given, path)
        if picture is not None:
            self.log.picture(step, picture)
        self.log.say(f"samples: {path}")

    def score(self, step: int) -> dict[str, float] | None:
        """The scores of samples; one that cannot be had is said, and loses nothing."""
        count = self.samples.to_score(self.cfg.metrics.num, self.dataset)
        given = self.dataset.draw_given(self.cfg.run.seed, range(count))
        try:
            what = (self.draw(given, count), given, self.dataset, self.cfg, next(self.model.parameters()).device)
            scores = self.samples.score(*what, self.log.say)
        except ScoreError as error:
            self.log.say(f"no score: {error}")
            return None
        self.log.curves(step, scores)
        self.log.say(f"score: {self.samples.describe(scores, self.cfg, count)}")
        return scores
