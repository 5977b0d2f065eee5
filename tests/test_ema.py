"""Averaged weights."""

import pytest
import torch

from ema import EMA, decay_from_half_life, warmed_up


def one(value):
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.register_buffer("count", torch.tensor(value))
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_update_keeps_decay_of_the_old_and_takes_the_rest_of_the_new():
    model = one(1.0)
    ema = EMA(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 2.0)
    model.count.fill_(5.0)
    ema.update(model, step=1)
    assert ema.module.weight.item() == pytest.approx(1.1)  # 1.9 with the arguments swapped
    assert ema.module.count.item() == 5.0
    ema.update(model, step=2)
    assert ema.module.weight.item() == pytest.approx(1.19)
    assert not ema.module.weight.requires_grad and not ema.module.training and model.weight.requires_grad


def test_half_life_is_in_images():
    decay = decay_from_half_life(half_life=500_000, batch_size=512)
    assert decay ** (500_000 / 512) == pytest.approx(0.5)


def test_warm_up_holds_the_half_life_to_a_share_of_the_steps():
    assert warmed_up(0.9999, 1000, 0.05) ** 50 == pytest.approx(0.5)
    assert warmed_up(0.9, 10**6, 0.05) == pytest.approx(0.9)
    assert warmed_up(0.9, 1, 0.0) == 0.9 and warmed_up(0.0, 1, 0.05) == 0.0
