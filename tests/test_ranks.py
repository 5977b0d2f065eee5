"""A batch over two processes, or in several passes, trains as one process and one pass do: every objective."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY, every_objective, tiny_autoencoder
from PIL import Image

import checkpoints
import config
from training import trainer

SETTINGS = {
    "train": {"precision": "fp64", "steps": 20, "log_every": 20, "save_every": 1000},
    "network": {"dropout": 0.2},
    "data": {"augment": 0.5},
    "ema": {"decay": [0.9]},
}


DOUBLE = {"steps": 3, "precision": "fp64"}
SCORED = {"sample": {"grid": 20, "every": 10}, "metrics": {"features": "classifier", "num": 100, "every": 20}}
GUIDED = {"objective": {"guidance": 2.0, "label_dropout": 0.4}, "network": {"label_dropout": 0.0}}
CASES = {  # of two ranks -> objective and settings beside SETTINGS
    **{name: (name, {}) for name in EVERY},
    "ect forward mode": ("ect", {"objective": {"difference": "forward_mode"}}),
    "ict forward mode": ("ict", {"objective": {"difference": "forward_mode"}}),
    "edm labels": ("edm", {"network": {"label_dropout": 0.4}}),
    "ect labels": ("ect", {"network": {"label_dropout": 0.4}, "objective": {"difference": "forward_mode"}, **SCORED}),
    "sct labels": ("sct", {"network": {"label_dropout": 0.4}}),
    **{f"{name} guided": (name, GUIDED) for name in ("meanflow", "soflow", "imf")},
}


def case(folder: Path, name: str, teacher: str) -> config.Config:
    objective, more = CASES.get(name, ("ect", {"train": {"steps": 6}, "sample": {"grid": 40, "every": 4}}))
    settings = {section: {**SETTINGS.get(section, {}), **more.get(section, {})} for section in {**SETTINGS, **more}}
    settings["data"] = {"augment": 0.5, "conditional": "label_dropout" in settings["network"]}
    changed = settings.pop("objective", {})
    cfg = every_objective(folder, objective, teacher, **settings)
    cfg.objective = cfg.objective.model_copy(update=changed)
    cfg.network.guidance_inputs = objective == "imf" and "guidance" in changed
    return cfg


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    parts = {"model": state["model"], "objective": state["objective"], "ema": state["ema"][0]}
    return {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, teacher):
    """A folder with every case's run of two gloo ranks, in one pair of processes; and some in which one rank fails."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in (*CASES, "abort", "stopped while drawing", "fails while drawing"):
        (folder / f"{name}.yml").write_text(config.dump(case(folder / name, name, teacher)))
    (folder / "autoencoder.yml").write_text(config.dump(tiny_autoencoder(folder / "autoencoder", train=DOUBLE)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, Path(__file__).parent / "train_each.py", folder],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "said").write_text(result.stdout)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name, two_ranks, teacher, tmp_path):
    """The weights, averages and targets after 20 steps in float64, by masks of units and labels; samples and scores."""
    trainer.train(case(tmp_path, name, teacher))
    one, two = weights(tmp_path), weights(two_ranks / name)
    assert one.keys() == two.keys() and one["model.model.map_layer0.weight"].dtype == torch.float64
    assert not torch.equal(one["model.model.map_layer0.weight"], one["ema.model.map_layer0.weight"])  # it has learnt
    assert all((one[k] - two[k]).norm() <= 1e-6 * one[k].norm() + 1e-12 for k in one)

    grids = [sorted((folder / "samples").glob("*.png")) for folder in (tmp_path, two_ranks / name)]
    assert len(grids[0]) == len(grids[1]) == (2 if name == "ect labels" else 1)
    assert all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(*grids, strict=True))
    scores = [scores_of(folder) for folder in (tmp_path, two_ranks / name)]
    assert scores[0] == scores[1] and len(scores[0]) == (name == "ect labels")


def test_two_ranks_train_an_autoencoder_as_one_process(two_ranks, tmp_path):
    trainer.train(tiny_autoencoder(tmp_path, train=DOUBLE))
    one, two = weights(tmp_path), weights(two_ranks / "autoencoder")
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).norm() <= 1e-6 * one[k].norm() + 1e-12 for k in one)
    folders = (tmp_path, two_ranks / "autoencoder")
    grids = [np.array(Image.open(folder / "samples" / "step-00000003.png"), int) for folder in folders]
    assert np.abs(grids[0] - grids[1]).max() <= 1 and np.ptp(grids[0]) > 100
    scores = [float((folder / "metrics.jsonl").read_text().split('"psnr": ')[1].split("}")[0]) for folder in folders]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def scores_of(folder: Path) -> list[dict]:
    """The entries of metrics.jsonl that hold scores."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "fid" in entry]


@pytest.mark.parametrize(
    ("name", "reason", "step"), [("stopped", "stopped before its end", 5), ("fails", "no room", 6)]
)
def test_a_rank_that_cannot_draw_its_share_holds_up_no_other(name, reason, step, two_ranks):
    """Rank 1 has a signal, or an error, in its share of the grid of step 4: there is none, and training goes on."""
    folder = two_ranks / f"{name} while drawing"
    assert not (folder / "samples" / "step-00000004.png").exists()
    assert checkpoints.load(folder / "checkpoints" / "last.ckpt")["step"] == step
    assert f"warning: step 4: write_grid failed ({reason})" in (two_ranks / "said").read_text()
    assert (folder / "samples" / "step-00000006.png").exists() == (step == 6)


def test_two_ranks_stop_together(two_ranks):
    """The signal reached rank 1 alone; both finished that step, and rank 0 saved it."""
    assert checkpoints.load(two_ranks / "abort" / "checkpoints" / "last.ckpt")["step"] == 4


@pytest.mark.parametrize(("name", "samples"), [*((name, 4) for name in EVERY), ("tcm", 2)])  # of 2, 0 or 1 are at t'
def test_passes_give_the_gradient_of_one_pass(name, samples, teacher, tmp_path):
    gradients = []
    for microbatch in (None, samples):
        settings = {**SETTINGS, "train": {**SETTINGS["train"], "microbatch": microbatch}}
        run = trainer.Trainer(every_objective(tmp_path, name, teacher, **settings))
        step = run.train_step
        step.step, step.update = 4, lambda lr: None  # by step 4 the pairs are closer than at step 0
        step(run.dataset.images[:16], None)
        gradients.append(step.gradient)
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 1e-10
