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
    return p.ndim > 1 and min(sides(p)) >= 8


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
        first = sum(not is_matrix(p) for p in flat.parameters)
        self.weights = [p.data for p in flat.parameters[first:]]
        self.rest = slice(0, flat.starts[first] if self.weights else flat.vector.numel())
        self.slope = torch.zeros_like(flat.gradient[self.rest.stop :])  # of all matrices, and the gaps between them
        self.slopes = flat.views(self.slope, first) if self.weights else []
        sizes = defaultdict(list)  # powers of two that hold its sides: the matrices
        for i, p in enumerate(self.weights):
            low, high = sorted(sides(p))
            sizes[1 << (low - 1).bit_length(), 1 << (high - 1).bit_length()].append(i)
        self.stacks, rooms = [], {}  # rooms: of each matrix its part of a stack, in the weight's shape
        for size, indices in sizes.items():
            stack = self.slope.new_zeros(len(indices), *size)
            scales = [0.2 * max(sides(self.weights[i])) ** 0.5 for i in indices]
            self.stacks.append((stack, stack.new_tensor(scales)[:, None, None]))
            for padded, i in zip(stack, indices, strict=True):
                rows, columns = sides(self.weights[i])
                room = padded[:rows, :columns] if rows <= columns else padded[:columns, :rows].T
                rooms[i] = room.unflatten(1, self.weights[i].shape[1:])
        self.rooms = [rooms[i] for i in range(len(rooms))]

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
        if not self.weights:
            return
        momentum, slope = (v[self.rest.stop :] for v in (state["exp_avg"], gradient))
        momentum.lerp_(slope, 1 - MOMENTUM)
        torch.lerp(slope, momentum, MOMENTUM, out=self.slope)
        torch._foreach_copy_(self.rooms, self.slopes)
        for stack, scales in self.stacks:
            torch.mul(orthogonal(stack), -group["lr"] * scales, out=stack)
        torch._foreach_add_(self.weights, self.rooms)


def sides(matrix: Tensor) -> tuple[int, int]:
    """(rows, columns) of a matrix, or of a convolution as `is_matrix` sees it."""
    return len(matrix), matrix[0].numel()


def matrices_last(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The order in which Muon wants them, otherwise kept."""
    return sorted(parameters, key=is_matrix)
