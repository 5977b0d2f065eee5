"""What `auto` computes is float64's gradient, for every objective at its last stage, on small networks."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVERY, TAUGHT, as_ect, tiny

import data
from objectives import MeanFlow, draws
from objectives.common import forward_mode
from objectives.schedules import ect_pair
from training import build, trainer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import precision

NETWORK = {"model_channels": 8, "channel_mult": [1], "attn_resolutions": []}  # 5,000 parameters
LAST = {"ect": {"stage": 1}, "ict": {}, "ct": {}, "pd": {"N": 64}}  # their own last stage: 15, N = 1281, 151, 1


def settings(name, **more):
    clock = {"precond": "trigflow", "c_noise": "t"} if name in ("trigflow", "sct", "scd") else {}
    return {"objective": {"name": name, **more}, "network": {**NETWORK, **clock}}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Name of the clock -> a denoiser; one that has learned little shows little rounding."""
    paths = {}
    for name in ("edm", "trigflow"):
        folder = tmp_path_factory.mktemp(name)
        train = {"steps": 250, "batch_size": 48, "lr": 1e-2, "log_every": 250, "save_every": 250, "precision": "fp32"}
        trainer.train(tiny(folder, **settings(name), train=train))
        paths[name] = str(folder / "checkpoints" / "last.ckpt")
    as_ect(paths["edm"], folder / "ect.ckpt")
    paths["ect"] = str(folder / "ect.ckpt")
    return paths


def rows(starts, name, precisions=("auto",), network=None, train=None, **more):
    """The rows of benchmarks/precision.py at the last stage."""
    start = starts["trigflow" if name in ("trigflow", "sct", "scd") else "edm"]
    taught = {"teacher": starts["ect"] if name == "tcm" else start} if name in TAUGHT else {}
    given = settings(name, **LAST.get(name, EVERY[name]), **taught, **more)
    given["network"].update(network or {})
    cfg = tiny(Path("unused"), **given, train={"steps": 16, **(train or {})})
    cfg.train.init_from = start
    return list(precision.measure(cfg, argparse.Namespace(batches=1, batch=128, stages=1, precisions=precisions)))


@pytest.mark.parametrize("name", EVERY)
def test_auto_is_float64_at_the_last_stage(starts, name):
    found = rows(starts, name)
    assert len(found) == (2 if name == "tcm" else 1)
    for row in found:
        assert row["cosine"] >= 0.99 and abs(row["loss_ratio"] - 1) <= 0.02, row


def test_a_difference_for_meanflows_derivative_is_float32s(starts):
    """Of outputs 0.01 apart bf16 leaves little; forward mode it leaves whole."""
    (row,) = rows(starts, "meanflow", derivative="difference")
    assert row["cosine"] > 0.999999  # bf16 has 0.99994
    run = trainer.Trainer(
        tiny(Path("unused"), **settings("meanflow"), train={"init_from": starts["edm"], "precision": "bf16"})
    )
    model, x = run.train_step.model.eval(), data.to_float(run.dataset.images[:64])
    t, r, v = torch.linspace(0.1, 1, 64), torch.zeros(64), torch.randn(x.shape)
    slopes = {}
    for derivative in ("forward_mode", "difference"):
        for half in (True, False):
            model.autocast = torch.bfloat16 if half else None
            with torch.no_grad():
                u = model(x, t, r)
                slopes[derivative, half] = MeanFlow(derivative=derivative).along_path(model, x, t, r, v, u)
    exact = slopes["forward_mode", False]
    errors = {key: float((slope - exact).norm() / exact.norm()) for key, slope in slopes.items()}
    assert (
        errors["difference", False] < 0.05 and errors["forward_mode", True] < 0.05 and errors["difference", True] > 0.5
    )


@pytest.mark.parametrize("name", ["ect", "ict", "tcm", "soflow"])
def test_so_it_is_compiled_with_dropout(starts, name, without_kernels):
    """Both forms in one compiled step, under bf16's autocast."""
    for row in rows(starts, name, network={"dropout": 0.3}, train={"compile": True}):
        assert row["cosine"] >= 0.99 and abs(row["loss_ratio"] - 1) <= 0.02, row
    assert len(without_kernels) >= 3  # the trial, the network, its derivative


def test_half_precision_by_two_passes_is_not(starts):
    (half,) = rows(starts, "ect", ("bf16",))
    assert half["stage"] == "15" and half["cosine"] < 0.9 and half["loss_ratio"] > 2


def test_tcm_by_a_derivative_is_two_passes(starts):
    """In float64, over other batches and parts of them; and rows at t' or with r below it find room every time."""
    cfg = tiny(Path("unused"), **settings("tcm", df=0.01, teacher=starts["ect"]), train={"batch_size": 64})
    model = build.build_model(cfg, data.load(cfg.data).codec(cfg), torch.device("cpu"), "fp64")
    objective = build.build_objective(cfg, model, build.load_teacher(cfg, model)).double()
    with torch.no_grad():
        for p in model.parameters():  # another network than the frozen one
            p.mul_(1 + 0.01 * torch.randn_like(p))
    assert objective.in_half(0, model)
    keys = torch.randint(2**31, (64,))
    for seed, (start, count) in enumerate([(0, 64), (16, 32), (3, 1), (1, 2)]):
        x = torch.randn(count, 1, 8, 8).double()
        losses = []
        for objective.difference in ("two_passes", "forward_mode"):
            losses.append(
                objective(model, x, draws=draws.Draws(seed, count, start, 64), dropout_keys=keys[:count]).loss
            )
        assert torch.allclose(*losses, rtol=1e-3), (start, count)
    for seed in range(500):
        rows = draws.Draws(seed, 40, 7, 64)
        most, least = objective.shares(rows)
        r = ect_pair(objective.draw_t(rows), 0, 1000.0)[0]
        assert least <= (r < 1).sum() <= most < 40


def test_a_fast_noise_embedding_keeps_the_middle_stages_in_float32():
    """Fourier features of scale 16 turn too fast for the midpoint at 1/16, where two passes begin to fail."""
    held = {}
    for embedding in ("positional", "fourier"):
        cfg = tiny(Path("unused"), network={"embedding_type": embedding}, objective={"name": "ect", "stage": 1})
        model = build.build_model(cfg, data.load(cfg.data).codec(cfg), torch.device("cpu"), "bf16")
        objective = build.build_objective(cfg, model)
        held[embedding] = [objective.in_half(stage, model) for stage in range(16)]
        assert all(
            forward_mode(model, "auto", objective.gap(s)) == (s > 2 and h) for s, h in enumerate(held[embedding])
        )
    assert held["positional"] == [True] * 16
    assert held["fourier"] == [True] * 3 + [False] * 6 + [True] * 7


def test_cd_of_a_fine_grid_is_float32(starts):
    cfg = tiny(Path("unused"), **settings("cd", N=18, teacher=starts["edm"]))
    model = build.build_model(cfg, data.load(cfg.data).codec(cfg), torch.device("cpu"), "fp32")
    objective = build.build_objective(cfg, model, build.load_teacher(cfg, model))
    assert not objective.in_half(0, model)
    objective.N = 16
    assert objective.in_half(0, model)


def test_the_command_adds_its_rows_to_a_file(starts, tmp_path, monkeypatch, capsys):
    cfg, out = tmp_path / "recipe.yml", tmp_path / "rows.json"
    cfg.write_text(json.dumps(tiny(tmp_path, **settings("ect"), train={"steps": 16}).model_dump()))
    old = {"recipe": "another", "stage": "0", "precision": "fp32", "loss_ratio": 1.0, "cosine": 1.0}
    out.write_text(json.dumps({"rows": [old], "commands": []}))
    words = ["--ckpt", starts["edm"], "--batch", "8", "--batches", "1", "--stages", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["precision.py", "--cfg", str(cfg), *words, "objective.stage=1"])
    assert precision.main() == 0 and precision.main() == 0  # the second time, in place of the first
    first, *new = json.loads(out.read_text())["rows"]
    assert first == old
    assert [(r["stage"], r["precision"]) for r in new] == [(s, p) for s in ("0", "15") for p in precision.PRECISIONS]
    assert all(math.isfinite(r["cosine"] + r["loss_ratio"]) and r.keys() == old.keys() for r in new)
    assert new[0]["cosine"] > 0.999 and capsys.readouterr().out.count("| auto |") == 4


def test_tf32_reads_ten_bits():
    exact = torch.tensor([[1.0, 1 + 2**-10, -2.5]])
    x = (exact + torch.tensor([[0.0, 2**-12, -(2**-13)]])).requires_grad_()
    weight = torch.tensor([[1.0], [1 + 2**-11], [3.0]])  # ties go away from 0
    rounded = torch.tensor([[1.0], [1 + 2**-10], [3.0]])
    with precision.TF32():
        y = x @ weight
    assert torch.equal(y, exact @ rounded)
    (y * (1 + 2**-12)).sum().backward()
    assert torch.equal(x.grad, rounded.T)
