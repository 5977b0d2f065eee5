"""Muon: steps a matrix along the orthogonal matrix nearest to its momentum, and RAdam steps what is no matrix."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.radam import radam

from training.flat import FlatParameters

MOMENTUM = 0.95
ITERATION = (3.4445, -4.7750, 2.0315)  # the quintic whose fixed interval holds every singular value after five rounds


def is_matrix(p: Tensor) -> bool:
    """A convolution (out, in, k, k) is the matrix (out, in k k). Below eight rows or columns are images' own layers."""
    return p.ndim > 1 and min(len(p), p[0].numel()) >= 8


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, m, n), m <= n, to about U V^T of each one's U S V^T: singular values of 0.7 to 1.2 (0 stays 0)."""
    a, b, c = ITERATION
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(5):
        squared = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.RAdam):
    """Muon (Jordan et al. 2024) with Nesterov's momentum of 0.95 for matrices and convolutions, RAdam for all else.

    One learning rate serves both: a matrix's step has an RMS of about 0.2 lr, near Adam's (2502.16982 eq. 4).
    weight_decay is decoupled, for all. torch.optim.Muon takes no convolutions, and matrices one by one; here those of
    about one size go together, in float32, laid on the long side and padded with zeros, which stay zeros. The moments
    are vectors over all parameters, as the other optimizers' are; the second moment of a matrix stays 0.
    """

    def __init__(self, flat: FlatParameters, capturable: bool, **options: Any) -> None:
        """flat: parameters, those that are no matrices first (`matrices_last`)."""
        super().__init__([flat.vector], foreach=True, capturable=capturable, **options)
        self.flat = flat
        self.matrices = [i for i, p in enumerate(flat.parameters) if is_matrix(p)]
        self.rest = slice(0, flat.starts[self.matrices[0]] if self.matrices else flat.vector.numel())
        sizes = defaultdict(list)  # powers of two that hold its sides: the matrices
        for i in self.matrices:
            p = flat.parameters[i]
            low, high = sorted((len(p), p[0].numel()))
            sizes[1 << (low - 1).bit_length(), 1 << (high - 1).bit_length()].append(i)
        self.stacks = [flat.gradient.new_zeros(len(indices), *size) for size, indices in sizes.items()]
        rooms = {}  # of each matrix: its part of the stack, in the weight's shape
        for stack, indices in zip(self.stacks, sizes.values(), strict=True):
            for padded, i in zip(stack, indices, strict=True):
                p = flat.parameters[i]
                rows, columns = len(p), p[0].numel()
                room = padded[:rows, :columns] if rows <= columns else padded[:columns, :rows].T
                rooms[i] = room.unflatten(1, p.shape[1:])
        self.rooms = [rooms[i] for i in self.matrices]
        self.weights = [flat.parameters[i].data for i in self.matrices]
        self.scales = [0.2 * max(len(p), p[0].numel()) ** 0.5 for p in map(flat.parameters.__getitem__, self.matrices)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step by the gradient that the flat vector holds."""
        (group,), vector, gradient = self.param_groups, self.flat.vector, self.flat.gradient
        state = self.state[vector]
        if not state:
            device = vector.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        if group["weight_decay"]:
            vector.mul_(1 - group["lr"] * group["weight_decay"])
        (beta1, beta2), options = group["betas"], {k: group[k] for k in ("lr", "eps", "foreach", "capturable")}
        rest = [[v.data[self.rest]] for v in (vector, gradient, state["exp_avg"], state["exp_avg_sq"])]
        radam(*rest, [state["step"]], beta1=beta1, beta2=beta2, weight_decay=0.0, **options)
        if not self.matrices:
            return
        momentum = state["exp_avg"][self.rest.stop :]  # of all matrices, and the gaps between them
        slope = gradient[self.rest.stop :]
        momentum.lerp_(slope, 1 - MOMENTUM)
        torch._foreach_copy_(self.rooms, self.views(slope.lerp(momentum, MOMENTUM)))
        for stack in self.stacks:
            torch.mul(orthogonal(stack), -group["lr"], out=stack)
        torch._foreach_add_(self.weights, torch._foreach_mul(self.rooms, self.scales))

    def views(self, vector: Tensor) -> list[Tensor]:
        """The matrices in a vector of all of them, in their weights' shapes and layouts."""
        places = [(self.flat.parameters[i], self.flat.starts[i] - self.rest.stop) for i in self.matrices]
        return [vector.as_strided(p.shape, p.stride(), vector.storage_offset() + start) for p, start in places]


def matrices_last(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The order in which Muon wants them, otherwise kept."""
    return sorted(parameters, key=is_matrix)
