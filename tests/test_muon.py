"""Muon beside torch's own, its learning rate, its state through checkpoints, and a run of it."""

import pytest
import torch

from training.flat import FlatParameters
from training.muon import Muon, is_matrix, matrices_last, orthogonal


def flat_of(*parameters: torch.Tensor) -> FlatParameters:
    return FlatParameters(matrices_last([torch.nn.Parameter(p.clone()) for p in parameters]))


def weights(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def gradients(parameters: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    return weights(seed, *(p.shape for p in parameters), dtype=parameters[0].dtype)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (8, 9)])
def test_singular_values_come_near_one(shape):
    m = torch.stack(weights(0, *[shape] * 3))
    found = torch.linalg.svdvals(orthogonal(m))
    assert found.min() > 0.3 and found.max() < 1.3  # five rounds leave the smallest of a square one on its way
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    alike = (
        (orthogonal(m) * (u @ v)).flatten(1).sum(1)
        / orthogonal(m).flatten(1).norm(dim=1)
        / (u @ v).flatten(1).norm(dim=1)
    )
    assert alike.min() > 0.95
    assert orthogonal(torch.zeros(1, *shape)).isfinite().all()


def test_matrices_step_as_torchs_muon_does_and_the_rest_as_radam():
    """Convolutions as their (out, in k k) matrix. torch's iterates in bf16, ours in float32: 2% of a step."""
    shapes = (16, 24), (24, 16), (16, 24), (12, 30, 1, 1), (9, 60), (16, 8, 3, 3), (16,), (3, 16), (16, 1, 2, 2)
    flat = flat_of(*weights(0, *shapes))
    ours = Muon(flat, capturable=False, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    theirs = [torch.nn.Parameter((p.flatten(1) if is_matrix(p) else p).detach().clone()) for p in flat.parameters]
    start = [p.detach().clone() for p in theirs]
    assert [is_matrix(p) for p in flat.parameters] == [False] * 3 + [True] * 6
    muon = torch.optim.Muon(theirs[3:], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    radam = torch.optim.RAdam(theirs[:3], lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    for step in range(8):
        for p, q, g in zip(flat.parameters, theirs, gradients(flat.parameters, step + 1), strict=True):
            p.grad.copy_(g)
            q.grad = g.view_as(q).clone()
        ours.step(), muon.step(), radam.step()
    for p, q, s in zip(flat.parameters, theirs, start, strict=True):
        moved = (q - s).norm()
        assert moved > 0.01
        assert (p.view_as(q) - q).norm() < (0.02 if is_matrix(p) else 1e-6) * moved


def test_layouts_agree():
    """channels_last, as on a GPU, and float64."""
    for dtype in (torch.float32, torch.float64):
        start, ends = weights(0, (16, 8, 3, 3), (8, 16, 3, 3), (16,), dtype=dtype), []
        for layout in (torch.contiguous_format, torch.channels_last):
            parameters = [p.to(memory_format=layout) if p.ndim == 4 else p for p in start]
            flat = FlatParameters(matrices_last([torch.nn.Parameter(p) for p in parameters]))
            optimizer = Muon(flat, capturable=False, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
            for step in range(3):
                for p, g in zip(flat.parameters, gradients(flat.parameters, step), strict=True):
                    p.grad.copy_(g)
                optimizer.step()
            ends.append([p.detach().clone() for p in flat.parameters])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_holds_the_weights():
    """As a step with a bad gradient is: its gradient is 0 and so is the rate."""
    flat = flat_of(*weights(0, (16, 24), (16,)))
    optimizer = Muon(flat, capturable=False, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    flat.gradient.normal_()
    optimizer.step()
    before = flat.vector.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    flat.gradient.zero_()
    optimizer.step()
    assert torch.equal(flat.vector, before)
