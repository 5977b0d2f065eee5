"""What the tests share: golden files, the analytic networks behind them, and a config small enough to train."""

from pathlib import Path

import numpy as np
import pytest
import torch

import config
from networks import Preconditioner
from training import trainer

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of tests/golden/<name>.npz as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


class Analytic(torch.nn.Module):
    """F(u, c) = a tanh(u) cos(c): the stand-in for a network in the golden files."""

    img_resolution, img_channels, label_dim, augment_dim = 8, 3, 0, 0

    def __init__(self, a: float = 1.0):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, u, c, class_labels=None, augment_labels=None):
        return self.a * torch.tanh(u) * torch.cos(c).reshape(-1, *[1] * (u.ndim - 1))


def analytic(a: float = 1.0, precond: str = "edm") -> Preconditioner:
    return Preconditioner(Analytic(a), precond=precond)


TINY = {
    "data": {"name": "digits"},
    "network": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1},
    "objective": {"name": "ect", "double_kimg": 0.05},
    "ema": {"decay": [0.9, 0.99], "warmup": 0.0},
    "train": {"steps": 6, "batch_size": 16, "lr": 1e-3, "log_every": 2, "save_every": 2, "precision": "fp32"},
    "sample": {"grid": 4},
    "metrics": {"features": "classifier", "num": 100, "at_end": False},
}


def tiny(folder: Path, **changes: dict) -> config.Config:
    """A config that trains in about a second; `changes` are section={key: value}."""
    raw = {section: dict(values) for section, values in TINY.items()}
    raw["run"] = {"dir": str(folder), "device": "cpu"}
    for section, values in changes.items():
        renamed = section == "objective" and "name" in values
        raw[section] = {**({} if renamed else raw.get(section, {})), **values}
    return config.parse(raw)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain nothing on tests this small, and fewer of them make a crowded machine's tests steady."""
    torch.set_num_threads(1)


EVERY = {  # objective -> settings small enough to train in a second; those in TAUGHT take a teacher
    "edm": {},
    "ct": {"s1": 8},
    "ict": {"s1": 40},
    "ect": {"double_kimg": 0.05},
    "cd": {"N": 6, "mu": 0.5},
    "trigflow": {},
    "sct": {"warmup": 4},
    "scd": {"warmup": 4},
    "tcm": {"df": 2.0},
    "cmt": {"steps": 4},
    "pd": {"N": 4},
}
TAUGHT = ("cd", "scd", "tcm", "cmt", "pd")


def every_objective(folder: Path, name: str, teacher: str, **changes: dict) -> config.Config:
    """`tiny` with the objective `name`."""
    objective = {"name": name, **EVERY[name], **({"teacher": teacher} if name in TAUGHT else {})}
    clock = {"precond": "trigflow"} if name in ("trigflow", "sct", "scd") else {}
    return tiny(folder, **{**changes, "objective": objective, "network": {**clock, **changes.get("network", {})}})


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """The checkpoint of an EDM model that has seen six steps, with augmentation labels."""
    folder = tmp_path_factory.mktemp("teacher")
    trainer.train(tiny(folder, objective={"name": "edm"}, data={"augment": 0.5}))
    return str(folder / "checkpoints" / "last.ckpt")
