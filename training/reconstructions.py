"""How an autoencoder does: held-out images beside what it makes of them, and their PSNR."""

from __future__ import annotations

from pathlib import Path

import torch

import data
from config import Config, ConfigError
from metrics import pictures
from metrics.common import fetch
from metrics.scores import psnr
from networks import Autoencoder
from training.devices import rank_and_world
from training.evaluate import Share
from training.logs import RunLog

EVERY = 20  # where objective.held_out names no images, those 19, 39, ... of the training set are kept out of it


def held_out(cfg: Config, dataset: object) -> tuple[object, torch.Tensor, torch.Tensor | None]:
    """(the set with the held-out images, their rows in it, the rows of `dataset` to train on, None for all).

    Raises ConfigError for images of another size, or too few to keep some out.
    """
    path = cfg.objective.held_out
    if path is None:
        places = torch.arange(len(dataset))
        out = places % EVERY == EVERY - 1
        if not out.any():
            what = f"the set has {len(dataset)} images, too few to keep every {EVERY}th out of training"
            raise ConfigError(f"objective.held_out: {what}; give the path of others")
        return dataset, places[out], places[~out]
    try:
        others = data.load(cfg.data.model_copy(update={"path": path}))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "objective.held_out")) from None
    if others.shape != dataset.shape:
        a, b = ("x".join(map(str, images.shape)) for images in (others, dataset))
        raise ConfigError(f"objective.held_out: {path} holds images of {a}, and the training set is {b}")
    return others, torch.arange(len(others)), None


class Reconstructions:
    """Of held-out images, by all ranks, from the latent's mean; methods are those of training.evaluate.Evaluation."""

    def __init__(
        self,
        cfg: Config,
        dataset: object,  # with the held-out images
        rows: torch.Tensor,  # int64, which they are
        model: Autoencoder,  # in eval mode, with its codec
        folder: Path,
        log: RunLog,
        batch: int,
    ):
        self.cfg, self.dataset, self.rows, self.model = cfg, dataset, rows, model
        self.folder, self.log = folder, log
        self.batch = min(256, batch)

    @torch.no_grad()
    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor | None:
        """uint8 (len(rows), C, R, R) on the CPU, with this rank's batches in their place; None: it has none."""
        (rank, world), made = rank_and_world(), None
        device = next(self.model.parameters()).device
        for start in range(rank * self.batch, len(rows), world * self.batch):
            own = slice(start, min(start + self.batch, len(rows)))
            x = data.to_float(fetch(self.dataset, rows[own]).to(device))
            batch = self.model.codec.from_model(self.model.decode(self.model.encode(x)[0])).cpu()
            made = batch.new_empty(len(rows), *batch.shape[1:]) if made is None else made
            made[own] = batch
        return made

    def write_grid(self, step: int) -> Share:
        """A PNG of sample.grid held-out images spread over all of them, each with its reconstruction on its right."""
        count = min(self.cfg.sample.grid, len(self.rows))
        rows = self.rows[torch.arange(count) * len(self.rows) // count]

        def show(made: torch.Tensor) -> None:
            pairs = torch.stack([fetch(self.dataset, rows).cpu(), made], 1).flatten(0, 1)
            picture = pictures.grid(pairs, 2 * max(1, round((count / 2) ** 0.5)))
            path = self.folder / "samples" / f"step-{step:08d}.png"
            pictures.write_png(picture, path)
            self.log.picture(step, picture, "")
            self.log.say(f"samples: {path} (held-out images, each with its reconstruction on its right)")

        return Share(self.reconstruct(rows), count, self.batch, show)

    def score(self, step: int) -> Share:
        """PSNR of up to metrics.num held-out images."""
        rows = self.rows[: self.cfg.metrics.num]

        def show(made: torch.Tensor) -> dict[str, float]:
            scores = {"psnr": psnr(made, fetch(self.dataset, rows).cpu())}
            said = f"score: PSNR {scores['psnr']:.2f} dB (mean of {len(rows):,} held-out images; higher is better)"
            self.log.score(step, scores, said)
            return scores

        return Share(self.reconstruct(rows), len(rows), self.batch, show)
