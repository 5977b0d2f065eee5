"""How a run does: samples of its averaged weights as a grid, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config, printable
from metrics.common import progress
from metrics.scores import ScoreError
from networks import Preconditioner
from sampling.drawing import Drawing
from sampling.plan import plan
from sampling.samples import samples_of
from training.devices import rank_and_world
from training.logs import RunLog


def own_batches(
    count: int, batch: int, make: Callable[[int, int], torch.Tensor], what: str = "sampling"
) -> torch.Tensor | None:
    """(count, ...) on the CPU with this rank's batches in their place, by make(start, stop); None: it has none.

    They are every world-th batch of one process: so its samples bit for bit. what: the progress bar's name.
    """
    (rank, world), made = rank_and_world(), None
    starts = range(rank * batch, count, world * batch)
    with progress(what, len(starts), "batch", shown=rank == 0) as bar:
        for start in starts:
            own = slice(start, min(start + batch, count))
            values = make(own.start, own.stop)
            made = values.new_empty(count, *values.shape[1:]) if made is None else made
            made[own] = values
            bar.update()
    return made


@dataclass
class Share:
    """A rank's share of `count` samples, and what rank 0 does with all of them."""

    samples: torch.Tensor | None  # (count, ...) on the CPU, of which this rank has drawn its batches; None: it has none
    count: int
    batch: int  # samples drawn at a time
    show: Callable[[torch.Tensor], Any]


class Evaluation:
    """The first samples of the run's seed, drawn as generate.py would: in float32, by all ranks; rank 0 shows them."""

    def __init__(self, cfg: Config, dataset: object, model: Preconditioner, folder: Path, log: RunLog, batch: int):
        self.cfg, self.dataset, self.model, self.folder, self.log = cfg, dataset, model, folder, log
        self.samples = samples_of(model.codec)
        self.batch = min(256, batch)  # what training has memory for; the same for any number of ranks

    def drawing(self, given: torch.Tensor | None, count: int) -> Drawing:
        """The first `count` samples of the run's seed."""
        how = (self.batch, self.cfg.sample.guidance, self.cfg.sample.interval)
        return Drawing(self.model, self.cfg.run.seed, count, *plan(self.cfg), given, *how)

    def draw(self, drawing: Drawing) -> torch.Tensor | None:
        """uint8 images or vectors in their own units (drawing.num, ...): this rank's, as own_batches."""
        return own_batches(drawing.num, self.batch, drawing.draw)

    def write_grid(self, step: int) -> Share:
        """A grid of samples as a file, and in TensorBoard where it is a picture."""
        count = self.cfg.sample.grid
        given = self.samples.given_for_grid(self.dataset, self.cfg.run.seed, count)

        def show(samples: torch.Tensor) -> None:
            path = self.folder / "samples" / f"step-{step:08d}"
            path, picture = self.samples.write_grid(samples, given, path)
            classes = self.classes_shown(given)
            if picture is not None:
                self.log.picture(step, picture, classes)
            self.log.say(f"samples: {path}{f' ({classes})' if classes else ''}")

        return Share(self.draw(self.drawing(given, count)), count, self.batch, show)

    def classes_shown(self, given: torch.Tensor | None) -> str:
        """Which class a grid's columns are of; "" where they are of none."""
        names = getattr(self.model.codec, "classes", None)
        if given is None or not names:
            return ""
        shown = [names[i] for i in dict.fromkeys(given.tolist())]
        more = f" and {len(shown) - 20:,} more" if len(shown) > 20 else ""
        how = "columns" if 1 < len(names) <= 20 else "classes in turn"
        return printable(f"{how}: {', '.join(shown[:20])}{more}")

    def score(self, step: int) -> Share:
        """The scores of samples; one that cannot be had is said, and loses nothing."""
        count = self.samples.to_score(self.cfg.metrics.num, self.dataset)
        given = self.dataset.draw_given(self.cfg.run.seed, range(count))
        drawing = self.drawing(given, count)

        def show(samples: torch.Tensor) -> dict[str, float] | None:
            device = next(self.model.parameters()).device
            try:
                scores = self.samples.score(samples, given, self.dataset, self.cfg, device, self.log.say)
            except ScoreError as error:
                self.log.say(f"no score: {error}")
                return None
            said = self.samples.describe(scores, self.cfg, count, self.dataset, drawing)
            self.log.score(step, scores, f"score at {drawing.nfe} NFE: {said}")
            return scores

        return Share(self.draw(drawing), count, self.batch, show)
