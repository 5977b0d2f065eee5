"""What the tests share: golden files, the analytic networks behind them, and a config small enough to train."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import config
from networks import Preconditioner
from objectives.common import append_dims
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


class Map(torch.nn.Module):
    """u(z, t, r) = a tanh(z) cos(t) + b sin(2 r) z + c (t - r) z: the stand-in for a flow map in the golden files.

    Of six numbers, it has a second head; labels, and what it is told of guidance, shift both.
    """

    clock = "time"

    def __init__(self, coef, told=False):
        super().__init__()
        self.coef = torch.nn.Parameter(coef.clone())
        self.heads, self.told = 1 + (len(coef) > 3), told

    def forward(self, z, t, r, **conditions):
        a, b, c = self.coef[:3]
        t, r = append_dims(t, z), append_dims(r, z)
        return a * torch.tanh(z) * t.cos() + b * (2 * r).sin() * z + c * (t - r) * z + self.shift(z, **conditions)

    def both(self, z, t, r, **conditions):
        d, e, f = self.coef[3:]
        u, t, r = self(z, t, r, **conditions), append_dims(t, z), append_dims(r, z)
        v = d * torch.tanh(z) * t.sin() + e * z + f * (t - r) * t.cos()
        return u, v + 2 * self.shift(z, **conditions)

    def shift(self, z, class_labels=None, guidance=None, interval=None):
        shift = z.new_zeros(len(z))
        if class_labels is not None:
            shift = shift + class_labels @ z.new_tensor([0.3, -0.2, 0.5])
        if self.told:
            shift = shift + 0.1 * guidance.log() + interval @ z.new_tensor([0.2, -0.1])
        return append_dims(self.coef[0] * shift, z)


def trained(objective, model, x, **given):
    """(loss of each sample, gradient of its mean by the model's coefficients)."""
    model.zero_grad()
    loss = objective(model, x, **given).loss
    loss.mean().backward()
    return loss.detach(), model.coef.grad


def trained_on_velocity(model, z, t, r, v, tangent, p, eps, **conditions):
    """MeanFlow's loss and gradient, written out for a velocity, a tangent and conditions."""
    model.zero_grad()
    one = torch.ones_like(t)
    u, dudt = torch.func.jvp(lambda *at: model(*at, **conditions), (z, t, r), (tangent, one, 0 * one))
    square = (u - (v - append_dims(t - r, z) * dudt).detach()).square().flatten(1).sum(1)
    loss = square / (square.detach() + eps) ** p
    loss.mean().backward()
    return loss.detach(), model.coef.grad.clone()


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


AUTOENCODER = {
    "name": "autoencoder", "latent_channels": 3, "block_out_channels": [8, 8], "layers_per_block": 1,
    "norm_num_groups": 4, "mid_block_add_attention": True,
}  # fmt: skip


def tiny_autoencoder(folder: Path, **changes: dict) -> config.Config:
    """An autoencoder of digits, by a factor of 2, that trains in about a second; `changes` as for `tiny`."""
    network = {**AUTOENCODER, **changes.pop("network", {})}
    objective = {"name": "autoencoder", **changes.pop("objective", {})}
    train = {**TINY["train"], "optimizer": "adam", "lr": 2e-3, **changes.pop("train", {})}
    raw = {**TINY, "run": {"dir": str(folder), "device": "cpu"}, "sample": {"grid": 10}, "metrics": {"num": 100}}
    return config.parse({**raw, "network": network, "objective": objective, "train": train, **changes})


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
    "flow": {},
    "meanflow": {},
    "soflow": {"velocity_share": 0.3},
    "imf": {},
}
TAUGHT = {"cd": "edm", "scd": "edm", "tcm": "ect", "cmt": "edm", "pd": "edm"}  # by a model of what objective


def every_objective(folder: Path, name: str, teacher: str, **changes: dict) -> config.Config:
    """`tiny` with the objective `name`; in teacher's path the teacher's objective takes the place of {}."""
    taught = {"teacher": teacher.format(TAUGHT[name])} if name in TAUGHT else {}
    objective = {"name": name, **EVERY[name], **taught}
    clock = {"precond": "trigflow"} if name in ("trigflow", "sct", "scd") else {}
    return tiny(folder, **{**changes, "objective": objective, "network": {**clock, **changes.get("network", {})}})


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """The checkpoints {}.ckpt, edm and ect, of a model that has seen six steps, with augmentation labels."""
    folder = tmp_path_factory.mktemp("teacher")
    trainer.train(tiny(folder, objective={"name": "edm"}, data={"augment": 0.5}))
    shutil.copy(folder / "checkpoints" / "last.ckpt", folder / "edm.ckpt")
    as_ect(folder / "edm.ckpt", folder / "ect.ckpt")
    return str(folder / "{}.ckpt")


def as_ect(denoiser: Path | str, path: Path) -> None:
    """Write a diffusion model's checkpoint as a consistency model's, the same weights: tcm takes no other."""
    state = checkpoints.load(denoiser)
    checkpoints.write_state(path, {**state, "config": {**state["config"], "objective": {"name": "ect"}}})


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A file of Inception weights as torch-fidelity's, random: scaled so that features tell images from each other."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("stub", ["2048"], feature_extractor_weights_path=str(path))
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)  # 96 MB
    yield str(path)
    path.unlink()


@pytest.fixture
def without_kernels(monkeypatch):
    """torch.compile traces and differentiates, then runs eager kernels: Inductor's take minutes to build on a CPU."""
    compiled, real = [], torch.compile

    def compile(function, dynamic=None, mode=None):
        compiled.append(mode)
        return real(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    return compiled
