"""Dropout masks follow from keys: the same bits eager, compiled and in forward mode, and in every pass of a step."""

import pytest
import torch
from conftest import every_objective

import networks
from networks.layers import UNetBlock, dropout
from training import trainer

SETTINGS = {
    "name": "song_unet", "precond": "edm", "c_noise": "log", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0,
    "model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.5,
}  # fmt: skip


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = networks.build(SETTINGS, resolution=8, channels=1).train()
    with torch.no_grad():  # fresh, the last layers are almost zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def test_eager_compiled_and_forward_mode_drop_the_same_units(model):
    x, sigma, keys = (
        torch.randn(4, 1, 8, 8),
        torch.tensor([0.1, 0.5, 2.0, 40.0]),
        torch.tensor([3, 1, 4, 1_000_000_007]),
    )
    eager = model(x, sigma, dropout_keys=keys)
    assert apart(model(x, sigma, dropout_keys=keys + 1), eager) > 0.05
    direction = (x, sigma, torch.randn_like(x), torch.ones(4))
    D, slope = model.jvp(*direction, dropout_keys=keys)
    assert apart(D, eager) < 1e-5
    torch._dynamo.reset()
    how = {"dynamic": False, "fullgraph": True, "backend": "aot_eager"}  # Inductor's kernels take minutes on a CPU
    model.model.compile(**how)
    model.compiled_jvp = torch.compile(model.network_jvp, **how)
    assert apart(model(x, sigma, dropout_keys=keys), eager) < 1e-5
    again = model.jvp(*direction, dropout_keys=keys)
    assert apart(again[0], eager) < 1e-5 and apart(again[1], slope) < 1e-5


def test_inductors_kernel_draws_the_same_bits():
    x, keys = torch.ones(3, 5, 7, 3), torch.tensor([0, 12345, 2**31 - 1])
    compiled = torch.compile(dropout, dynamic=False)
    assert torch.equal(compiled(x, 0.3, keys, 7), dropout(x, 0.3, keys, 7))
    tangent = torch.compile(
        lambda x, dx: torch.func.jvp(lambda x: dropout(x, 0.3, keys, 7), (x,), (dx,)), dynamic=False
    )
    assert all(torch.equal(part, dropout(x, 0.3, keys, 7)) for part in tangent(x, x))


def test_the_derivative_is_that_of_finite_differences_under_one_mask(model):
    model.double()
    x, sigma = torch.randn(4, 1, 8, 8).double(), torch.tensor([0.1, 0.5, 2.0, 40.0]).double()
    keys, dx, step = torch.arange(4), torch.randn(4, 1, 8, 8).double(), 1e-6
    with torch.no_grad():
        _, slope = model.jvp(x, sigma, dx, torch.ones(4), dropout_keys=keys)
        ahead, behind = (model(x + h * dx, sigma + h, dropout_keys=keys) for h in (step, -step))
    assert apart(slope, (ahead - behind) / (2 * step)) < 1e-6


@pytest.mark.parametrize("name", ["ct", "cd", "ict", "ect", "tcm", "sct"])
def test_every_pass_of_a_step_in_training_mode_drops_the_same_units(name, teacher, tmp_path, monkeypatch):
    """TCM's frozen stage among them; CT's and CD's target too. What the first block drops tells the mask."""
    given, real = [], UNetBlock.compute

    def looked(self, x, emb, keys):
        if self.layer == 0:
            given.append(keys)
        return real(self, x, emb, keys)

    monkeypatch.setattr(UNetBlock, "compute", looked)
    cfg = every_objective(tmp_path, name, teacher, network={"dropout": 0.4})
    run = trainer.Trainer(cfg)
    run.train_step(run.dataset.images[:16], None)
    keys = [k for k in given if k is not None]  # a teacher in eval mode drops nothing
    assert len(keys) == (3 if name == "tcm" else 2) and len(keys[0].unique()) == 16
    assert all(torch.equal(k, keys[0]) for k in keys)


def test_labels_are_dropped_once_a_step_for_every_pass(tmp_path):
    def seen(rows, share=0.5, **changes):
        network = {"label_dropout": share}
        cfg = every_objective(tmp_path, "ct", "", network=network, data={"conditional": True}, train={"batch_size": 64})
        run = trainer.Trainer(cfg)
        vars(run.train_step).update(local_batch=len(range(64)[rows]), microbatch=len(range(64)[rows]), **changes)
        run.train_step.step = 3
        _, conditions, _ = run.train_step.prepare(run.dataset.images[:64][rows], run.dataset.labels[:64][rows], 0)
        return conditions["class_labels"]

    labels, whole = seen(slice(0, 64), share=0.0), seen(slice(0, 64))
    kept = whole.sum(1) == 1
    assert 16 < kept.sum() < 48 and torch.equal(whole[kept], labels[kept]) and not whole[~kept].any()
    assert torch.equal(seen(slice(32, 64), rank=1), whole[32:])  # by the place in the global batch
