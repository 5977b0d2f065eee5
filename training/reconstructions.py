"""How an autoencoder does: held-out images beside what it makes of them, and their PSNR."""

from __future__ import annotations

from pathlib import Path

import torch

import data
from config import Config
from metrics import pictures
from metrics.common import fetch
from metrics.scores import psnr
from networks import Autoencoder
from training.evaluate import Share, own_batches
from training.logs import RunLog


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
        """uint8 (len(rows), C, R, R): this rank's, as own_batches."""
        device = next(self.model.parameters()).device

        def make(start: int, stop: int) -> torch.Tensor:
            x = data.to_float(fetch(self.dataset, rows[start:stop]).to(device))
            return self.model.codec.from_model(self.model.decode(self.model.encode(x)[0])).cpu()

        return own_batches(len(rows), self.batch, make, "reconstructing")

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
