"""How far drawn vectors are from the training set's: their 2-Wasserstein distance."""

import copy
import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

SCORED = 2000  # most vectors in a score: its time grows with their number's cube


def wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Exact 2-Wasserstein distance of two sets of points of one size, (N, ...) each, in their units.

    The square root of the least mean square distance over all pairings, found by scipy's linear_sum_assignment.
    """
    square = torch.cdist(a.double().flatten(1), b.double().flatten(1)).square().cpu().numpy()
    return math.sqrt(square[linear_sum_assignment(square)].mean())


def to_score(num: int, dataset: Any) -> int:
    """How many of `num` vectors a score takes: the training set must have twice as many."""
    return min(num, len(dataset) // 2, SCORED)


def score(samples: torch.Tensor, conditions: torch.Tensor | None, dataset: Any, codec: Any) -> dict[str, float]:
    """{"w2", "w2_of_data"} of the first `to_score` samples.

    w2: 2-Wasserstein distance of samples (M, *shape) to as many training vectors, in the data's standard deviations;
    with conditions (M, K), of the pairs of both. w2_of_data: the same of other training vectors, what perfect samples
    would get.
    """
    n = to_score(len(samples), dataset)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 2 * n]
    codec = copy.deepcopy(codec).cpu()

    def joint(values: torch.Tensor, conditions: torch.Tensor | None) -> torch.Tensor:
        x = (codec.normalise(values) / codec.sigma_data).flatten(1)
        return x if conditions is None else torch.cat([x, codec.condition(conditions)], 1)

    own = joint(samples[:n], conditions if conditions is None else conditions[:n])
    a, b = joint(*dataset.read(rows)).split(n)
    return {"w2": wasserstein(own, a), "w2_of_data": wasserstein(b, a)}


def describe(scores: dict[str, float], num: int) -> str:
    """The scores in words."""
    return (
        f"2-Wasserstein distance {scores['w2']:.4g} ({scores['w2_of_data']:.4g} between two parts of the training set; "
        f"{num:,} vectors, in standard deviations of the data)"
    )
