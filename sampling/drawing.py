"""What is to be sampled from a model, and the samples: all at once, from a stop to the next, or as they are read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import networks
import sampler
from metrics.common import class_name
from objectives.draws import sample_noise
from sampling.plan import LEVELS


@dataclass
class Drawing:
    """All that decides some samples, and how fast they were drawn."""

    model: networks.Preconditioner
    seed: int
    num: int
    levels: list[float]  # sigmas, or a flow map's times
    solver: str
    given: torch.Tensor | None = None  # what each is asked for: classes, int64 (num,), or conditions, float32 (num, K)
    batch: int = 256
    guidance: float | None = None
    interval: list[float] | None = None  # of t, where the network is told its guidance
    of_class: int | None = None  # the one class that all are asked for
    bar: Any = None  # a tqdm that hears of every batch
    drawn: int = 0
    seconds: float = 0.0

    def draw(self, start: int, stop: int) -> torch.Tensor:
        """Samples start..stop on the CPU: uint8 images (N, C, H, W), or vectors, float32 (N, ...)."""
        started = time.perf_counter()
        given = None if self.given is None else self.given[start:stop]
        how = (self.levels, self.solver, given, self.batch, self.guidance, self.interval)
        batches = []
        for x in generate(self.model, self.seed, range(start, stop), *how):
            batches.append(self.model.codec.from_model(x).cpu())
            if self.bar is not None:
                self.bar.update(len(x))
        samples = torch.cat(batches)
        self.drawn, self.seconds = self.drawn + len(samples), self.seconds + time.perf_counter() - started
        return samples

    def stream(self) -> Stream:
        """All samples, drawn when they are read."""
        starts = range(0, self.num, self.batch)
        sizes = [min(self.batch, self.num - start) for start in starts]
        return Stream(lambda piece: self.draw(starts[piece], starts[piece] + sizes[piece]), sizes)

    @property
    def nfe(self) -> int:
        """Evaluations of the network per sample; guidance doubles them, unless the network is told it."""
        calls = 2 * len(self.levels) - 1 if self.solver == "heun" else len(self.levels)
        return calls * sampler.evaluations(self.model, self.guidance)

    def told(self, things: str) -> str:
        """What was drawn, in words; things: "samples" or "vectors"."""
        return f"{self.num:,} {things}, {self.nfe} evaluations each, seed {self.seed}{self.asked()}"

    def asked(self) -> str:
        """What the samples were asked for beside their number, in words, after a comma: ", class 3, guidance 2"."""
        words = [] if self.of_class is None else [class_name(self.of_class, self.model.codec.classes)]
        words += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        words += [] if self.interval is None else [f"in t from {self.interval[0]:g} to {self.interval[1]:g}"]
        return "".join(f", {word}" for word in words)

    def speed(self) -> str:
        """Samples a second, in words."""
        return f"{self.drawn / self.seconds:,.0f} images/s" if self.drawn else "all were there already"

    def manifest(self, format: str) -> dict[str, Any]:
        """What tells these samples, kept in this format, from others."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        labels = None if self.given is None else hashlib.sha256(self.given.numpy().tobytes()).hexdigest()[:16]
        weights = digest.hexdigest()[:16]
        own = {
            "seed": self.seed,
            "num": self.num,
            LEVELS[getattr(self.model, "clock", "sigma")]: self.levels,
            "solver": self.solver,
        }
        told = {"guidance": self.guidance} | ({} if self.interval is None else {"interval": self.interval})
        return {"weights": weights, **own, "labels": labels, **told, "format": format}


class Stream:
    """Images read piece by piece; one piece is in memory at a time. What metrics/ reads."""

    def __init__(self, read: Callable[[int], torch.Tensor], sizes: list[int]):
        """`read(i)` gives piece i, uint8 (sizes[i], C, H, W)."""
        self.read, self.ends = read, torch.tensor(sizes).cumsum(0)
        self.held: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) for int64 (B,) indices, in any order."""
        order = indices.argsort(stable=True)  # each piece is read once
        pieces = torch.bucketize(indices[order], self.ends, right=True)
        rows = indices[order] - torch.cat([self.ends.new_zeros(1), self.ends])[pieces]
        parts = [self.piece(i)[rows[pieces == i]] for i in pieces.unique().tolist()]
        return torch.cat(parts)[order.argsort()]

    def piece(self, i: int) -> torch.Tensor:
        """Piece i, uint8 (n, C, H, W); the last one read is kept."""
        if self.held is None or self.held[0] != i:
            self.held = None  # before the next is read: never two
            self.held = (i, self.read(i))
        return self.held[1]


@torch.no_grad()
def generate(
    model: torch.nn.Module,  # networks.Preconditioner, in eval mode
    seed: int,
    indices: Sequence[int],  # which samples of this seed
    levels: Sequence[float],  # sigmas or times, descending; see sampler
    solver: str = "multistep",  # or "heun"; of a flow map "jumps", "renoise" or "heun"
    given: torch.Tensor | None = None,  # (len(indices), ...): what each is asked for, as model.codec.told takes it
    batch_size: int = 256,
    guidance: float | None = None,  # see sampler.guided
    interval: Sequence[float] | None = None,
) -> Iterator[torch.Tensor]:
    """Batches (B, *model.shape) of float32, by `indices`' order, of which model.codec.from_model makes samples.

    Sample i of a seed starts from the same noise, whatever batch, device or process it is drawn in.
    """
    device = next(model.parameters()).device
    own_model, shape = sampler.guided(model, guidance, interval), model.shape
    for start in range(0, len(indices), batch_size):
        own = indices[start : start + batch_size]
        z = sample_noise(seed, own, shape).to(device)
        conditions = {} if given is None else model.codec.told(given[start : start + batch_size], z)
        if solver == "heun":
            solve = sampler.heun if getattr(model, "clock", "sigma") == "sigma" else sampler.flow_heun
            yield solve(own_model, z, levels, **conditions)
            continue

        def noise_at(i: int, own: Sequence[int] = own) -> torch.Tensor:
            return sample_noise(seed, own, shape, f"step {i}").to(device)

        if solver == "multistep":
            yield sampler.multistep(own_model, z, levels, noise_at, model.sigma_min, **conditions)
        else:
            yield sampler.jumps(own_model, z, levels, noise_at if solver == "renoise" else None, **conditions)
