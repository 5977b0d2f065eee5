"""What `auto` computes is float64's gradient, for every objective at its last stage, on small networks."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVERY, TAUGHT, tiny

from training import trainer

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
    return paths


def rows(starts, name, precisions=("auto",)):
    """The rows of benchmarks/precision.py at the last stage."""
    start = starts["trigflow" if name in ("trigflow", "sct", "scd") else "edm"]
    taught = {"teacher": start} if name in TAUGHT else {}
    cfg = tiny(Path("unused"), **settings(name, **LAST.get(name, EVERY[name]), **taught), train={"steps": 16})
    cfg.train.init_from = start
    return list(precision.measure(cfg, argparse.Namespace(batches=1, batch=128, stages=1, precisions=precisions)))


@pytest.mark.parametrize("name", EVERY)
def test_auto_is_float64_at_the_last_stage(starts, name):
    found = rows(starts, name)
    assert len(found) == (2 if name == "tcm" else 1)
    for row in found:
        assert row["cosine"] >= 0.99 and abs(row["loss_ratio"] - 1) <= 0.02, row


def test_half_precision_by_two_passes_is_not(starts):
    (half,) = rows(starts, "ect", ("bf16",))
    assert half["stage"] == "15" and half["cosine"] < 0.9 and half["loss_ratio"] > 2


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
