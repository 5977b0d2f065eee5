"""Random draws as pure functions of (seed, step, place in the global batch).

No generator state is ever saved: a resumed run, a run on two devices and a run in four microbatches all see the
numbers that one unbroken run on one device sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def key(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of ints and strings; equal tuples give equal seeds on every platform."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def wide(device: torch.device) -> torch.dtype:
    """float64, in which noise levels are drawn and paired; on mps, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def home(device: torch.device) -> torch.device:
    """Where tables of float64 for `device` are computed: there, but on the CPU for mps."""
    return torch.device("cpu") if device.type == "mps" else device


class Draws:
    """The random numbers of one training step, for rows [start, start + count) of a global batch of `total`.

    Every method draws for the whole global batch and keeps its own rows, so what a sample gets depends on its place in
    the batch alone, never on how the batch is split. Drawing is a tiny part of a step; drawing it all everywhere is
    what makes that independence free of bookkeeping.
    """

    def __init__(
        self,
        seed: int,  # any non-negative integer, usually key(run seed, "step", step)
        count: int,  # rows in this process's (micro)batch
        start: int = 0,  # the first of them in the global batch
        total: int | None = None,  # rows in the global batch; None: count
        device: torch.device | str = "cpu",
    ):
        self.count, self.start, self.total = count, start, count if total is None else total
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    @classmethod
    def fresh(cls, x: torch.Tensor) -> Draws:
        """Draws for a batch x (B, ...) seeded from torch's global generator: for scripts that seed by hand."""
        return cls(int(torch.randint(2**62, ())), count=len(x), device=x.device)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor (total, ...)."""
        return rows[self.start : self.start + self.count]

    def first(self, count: int) -> int:
        """How many of this process's rows are among the first `count` of the global batch."""
        return min(max(count - self.start, 0), self.count)

    def dropped(self, share: float) -> torch.Tensor:
        """bool (count,): the first rows of the global batch, as many as independent draws of this probability hit."""
        hits = (torch.rand(self.total, generator=self.generator, device=self.device) < share).sum()
        return torch.arange(self.start, self.start + self.count, device=self.device) < hits

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """N(0, 1) of `shape`, whose first entry is `count`."""
        size = (self.total, *shape[1:])
        return self.own(torch.randn(size, generator=self.generator, device=self.device, dtype=dtype))

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """U[0, 1) of `shape`, whose first entry is `count`."""
        size = (self.total, *shape[1:])
        return self.own(torch.rand(size, generator=self.generator, device=self.device, dtype=dtype))

    def told(self, w: float | Sequence[float] | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """{"guidance": (count,)}, U[w[0], w[1]] for each sample (2310.04378 alg. 1), of a pair w; nothing of others."""
        if not isinstance(w, Sequence):
            return {}
        return {"guidance": w[0] + (w[1] - w[0]) * self.uniform((self.count,), dtype)}

    def integers(self, high: int, shape: Sequence[int]) -> torch.Tensor:
        """int64 in [0, high) of `shape`, whose first entry is `count`."""
        size = (self.total, *shape[1:])
        return self.own(torch.randint(high, size, generator=self.generator, device=self.device))


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "start") -> torch.Tensor:
    """N(0, 1) for generated samples: float32 on the CPU, (len(indices), *shape).

    Row i depends on (seed, indices[i], stream) alone, so sample 17 of seed 3 is the same whatever the batch size, the
    number of devices and their kind. `stream` tells the draws of one sample apart: its start, its 2nd step, ...
    """
    rows = torch.empty(len(indices), *shape)
    generator = torch.Generator()
    for row, index in zip(rows, indices, strict=True):
        torch.randn(tuple(shape), generator=generator.manual_seed(key(seed, stream, int(index))), out=row)
    return rows
