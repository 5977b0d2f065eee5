"""A batch over two processes, or in several passes, trains as one process and one pass do: every objective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVERY, every_objective

import checkpoints
import config
from training import trainer

SETTINGS = {
    "train": {"precision": "fp64", "steps": 20, "log_every": 20, "save_every": 1000},
    "network": {"dropout": 0.0},
    "data": {"augment": 0.5},
    "ema": {"decay": [0.9]},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    parts = {"model": state["model"], "objective": state["objective"], "ema": state["ema"][0]}
    return {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, teacher):
    """A folder with every objective's run of two gloo ranks, in one pair of processes; and one that is stopped."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in EVERY:
        (folder / f"{name}.yml").write_text(config.dump(every_objective(folder / name, name, teacher, **SETTINGS)))
    (folder / "abort.yml").write_text(config.dump(every_objective(folder / "abort", "ect", teacher, **SETTINGS)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, Path(__file__).parent / "train_each.py", folder],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", EVERY)
def test_two_ranks_train_as_one_process(name, two_ranks, teacher, tmp_path):
    """The weights, averages and targets after 20 steps in float64."""
    trainer.train(every_objective(tmp_path, name, teacher, **SETTINGS))
    one, two = weights(tmp_path), weights(two_ranks / name)
    assert one.keys() == two.keys() and one["model.model.map_layer0.weight"].dtype == torch.float64
    assert not torch.equal(one["model.model.map_layer0.weight"], one["ema.model.map_layer0.weight"])  # it has learnt
    assert all((one[k] - two[k]).norm() <= 1e-6 * one[k].norm() + 1e-12 for k in one)


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
