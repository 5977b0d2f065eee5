"""benchmarks/versus.py beside stand-ins for the originals' checkouts: equal starts, equal draws, and its table."""

import json
import sys
from pathlib import Path

import pytest
import torch

import config
import data

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import versus
from versus_sides import Case, network, trained

# What is called of each, with its own way of drawing: numpy's (haidog), float64 times of four dimensions (TCM).
HAIDOG = """
import numpy as np
import torch
class MeanFlow:
    def __init__(self, num_classes, cfg_scale):
        assert num_classes is None and cfg_scale is None
    def loss(self, model, x):
        t = torch.tensor(np.random.rand(len(x)), dtype=x.dtype)
        u, v = model(t.reshape(-1, 1, 1, 1) * x, t, 0 * t, y=None, w=None)
        return (u - x).square().mean() + v.square().mean(), {}
"""
TCM = """
import torch
class ECMLoss:
    def __init__(self, P_mean, P_std, t_lower, t_upper, tdist, df, c, ratio_limit, boundary_prob):
        assert (t_lower, t_upper, df, ratio_limit, boundary_prob) == (1, 80, 0.01, 0.999, 0.25)
    def update_schedule(self, stage):
        self.stage = stage
    def __call__(self, net, images):
        state = torch.cuda.get_rng_state()
        t = 1 + torch.rand(len(images), 1, 1, 1).double()
        D = net(images + t * torch.randn_like(images), t, None, augment_labels=None)
        torch.cuda.set_rng_state(state)
        loss = (D - images).square().sum((1, 2, 3))
        return loss, loss[2:], t, loss, loss[:2]
"""
TCM_NETWORKS = """
class TCMPrecond:
    def __init__(self, model_t, model_s, transition_t):
        self.model_t, self.model_s, self.transition_t = model_t, model_s, transition_t
    def __call__(self, x, sigma, *labels, **more):
        return self.model_s(x, sigma, *labels, **more) + 0 * self.model_t(x, sigma, *labels, **more)
"""


@pytest.fixture
def case(tmp_path):
    (tmp_path / "haidog").mkdir()
    (tmp_path / "haidog" / "meanflow.py").write_text(HAIDOG)
    (tmp_path / "tcm" / "training").mkdir(parents=True)
    (tmp_path / "tcm" / "training" / "__init__.py").touch()
    (tmp_path / "tcm" / "training" / "loss.py").write_text(TCM)
    (tmp_path / "tcm" / "training" / "networks_tcm.py").write_text(TCM_NETWORKS)
    cfg = config.load(
        versus.ROOT / "benchmarks/digits_base.yml", ["data.conditional=false", "network.model_channels=8"]
    )
    case = Case(tmp_path, 3, 8, cfg, data.load(cfg.data), tmp_path / "versus")
    torch.manual_seed(1)  # a start unlike the weights that a network begins with
    start = network(case)
    torch.save({k: v + 0.01 * torch.randn_like(v) for k, v in start.state_dict().items()}, tmp_path / "versus-ect.pt")
    return case


@pytest.mark.parametrize("pair", ["imf-haidog", "tcm-nvlabs"])
def test_sides_begin_alike_and_repeat(case, pair):
    """Both sides have the same first weights; the same seed gives the same run, another seed another."""
    ours, theirs = (build(case) for build in versus.PAIRS[pair])
    first = ours.net[0].state_dict()
    assert all(torch.equal(first[name], value) for name, value in theirs.net.state_dict().items())
    if pair == "tcm-nvlabs":
        kept = torch.load(case.starts.with_name("versus-ect.pt"))
        frozen = ours.net[1].stage1.state_dict()
        assert all(torch.equal(first[name], kept[name]) and torch.equal(frozen[name], kept[name]) for name in kept)
    ends = []
    for seed in (0, 0, 1):
        average, seconds = trained(versus.PAIRS[pair][1](case), case, 0.01, seed)
        ends.append(torch.cat([p.flatten() for p in average.parameters()]))
        assert seconds > 0
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_speeds(case):
    """Both sides are timed in one process."""
    ours, theirs = versus.speeds("imf-haidog", case, rounds=1, steps=1)
    assert ours > 0 and theirs > 0


def test_table_of_what_is_done(tmp_path, monkeypatch, capsys):
    """Rows in the file are not run again; each side counts at its better learning rate, and other rows do not."""
    rows = [
        {"pair": "soflow", "side": side, "lr": lr, "seed": 0, "images": 64, **more, "fid": fid}
        for side, lr, fid, more in [
            ("ours", 0.004, 3.0, {}), ("ours", 0.001, 2.0, {}), ("theirs", 0.004, 4.0, {}), ("theirs", 0.001, 5.0, {}),
            ("ours", 0.004, 1.0, {"cfg": "other.yml"}), ("theirs", 0.004, 1.0, {"batch": 32}),
        ]
    ]  # fmt: skip
    out = tmp_path / "versus.json"
    out.write_text(json.dumps(rows))
    words = ["versus.py", str(tmp_path), "--out", str(out), "--only", "soflow", "--seeds", "0", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", words)
    assert versus.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| soflow | 2 | 4 | 0.50 |"
    assert json.loads(out.read_text()) == rows


def test_no_checkout(case):
    with pytest.raises(config.ConfigError, match="soflow: there is no such checkout"):
        versus.PAIRS["soflow"][1](case)
