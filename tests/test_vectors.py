"""Vectors: the MLP, their data and normalisation, runs on them, and sampling to npz."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import tiny

import checkpoints
import config
import convert
import data
import generate
from metrics import distance
from networks import MLP, Preconditioner
from objectives.scm import network as trigflow_network
from sampling import shards
from sampling.samples import VectorSamples
from sources.codecs import VectorCodec, codec_from
from training import build, trainer
from training.step import TrainingStep

RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(300, 3)) * [1, 10, 0.1] + [5, 0, -2]
# The action is the sine of a state, times 3, and noise; the second element never changes.
ACTIONS = np.stack([3 * np.sin(STATES[:, 0]) + 0.1 * RNG.normal(size=300), np.full(300, 7.0)], 1).clip(-2.9, 8)
LOW, HIGH = np.array([-3.0, 5.0]), np.array([4.0, 8.0])


def save(folder, **arrays):
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def section(path, **changes):
    return config.Data(name="npz", path=str(path), **changes)


def vector_run(folder, path, **changes):
    """A config of a run on the vectors in `path` that trains in a second."""
    settings = {
        "data": {"name": "npz", "path": str(path), "conditional": True},
        "network": {"name": "mlp", "width": 16, "depth": 1},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value}
    raw = tiny(folder).model_dump()
    del raw["network"]
    if "objective" in settings:
        del raw["objective"]
    for key, value in settings.items():
        raw[key] = {**raw.get(key, {}), **value}
    return config.parse(raw)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on vectors with conditions and bounds."""
    folder = tmp_path_factory.mktemp("vectors")
    path = save(folder, vectors=ACTIONS, conditions=STATES, low=LOW, high=HIGH)
    settings = {"train": {"steps": 500, "batch_size": 64, "lr": 5e-3, "log_every": 50, "save_every": 500}}
    cfg = vector_run(folder / "r", path, data={"bounds": "tanh"}, **settings, metrics={"at_end": True})
    trainer.train(cfg)
    return folder / "r"


# The network ----------------------------------------------------------------------------------------------------------


def mlp(shape=(2,), condition_dim=0, **settings):
    torch.manual_seed(0)
    net = MLP(shape, condition_dim, width=16, depth=2)
    with torch.no_grad():  # it starts at almost 0: make every layer count
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return Preconditioner(net.double(), **settings)


@pytest.mark.parametrize("shape", [(2,), (3, 5), (1, 4, 4)])
def test_the_mlp_sees_every_element_the_noise_and_the_condition(shape):
    model = mlp(shape, 3)
    x, sigma = torch.randn(4, *shape).double(), torch.tensor([0.1, 1.0, 5.0, 80.0])
    c = torch.randn(4, 3).double()
    D = model(x, sigma, condition=c)
    assert D.shape == x.shape and model.shape == shape and model.condition_dim == 3
    x_grad = torch.autograd.functional.jacobian(lambda v: model(v, sigma, condition=c)[1], x)
    x_grad = x_grad.reshape(x[1].numel(), 4, x[1].numel())
    assert (x_grad[:, 1].abs() > 0).all() and (x_grad[:, [0, 2, 3]] == 0).all()
    c_grad = torch.autograd.functional.jacobian(lambda v: model(x, sigma, condition=v).flatten(1), c)
    assert all((c_grad[i, :, i].abs() > 0).all() for i in range(4))
    assert all((c_grad[i, :, j] == 0).all() for i in range(4) for j in range(4) if i != j)  # samples do not mix
    assert (model(x, 2 * sigma, condition=c) - D).abs().min() > 0


@pytest.mark.parametrize("precond", ["edm", "cm", "trigflow"])
def test_the_mlp_is_preconditioned_as_any_network(precond):
    model = mlp((2,), precond=precond)
    x = torch.randn(4, 2).double()
    low = torch.full((4,), 0.002 if precond == "cm" else 1e-9, dtype=torch.float64)
    assert torch.allclose(model(x, low), x, atol=1e-6)  # the boundary
    sigma = torch.full((4,), 0.7, dtype=torch.float64)
    f = model.model(x / math.hypot(0.7, 0.5), torch.full((4,), math.log(0.7) / 4, dtype=torch.float64))
    eps, sign = (0.002 if precond == "cm" else 0), (-1 if precond == "trigflow" else 1)
    skip, out = 0.25 / ((0.7 - eps) ** 2 + 0.25), 0.5 * (0.7 - eps) / math.hypot(0.7, 0.5)
    assert torch.allclose(model(x, sigma), skip * x + sign * out * f, atol=1e-9)


def test_the_mlps_forward_derivative_is_its_slope():
    """What sCM's tangent is made of, against finite differences."""
    model = mlp((3,), 2, precond="trigflow", c_noise="t")
    u, t, c = torch.randn(5, 3).double(), torch.rand(5).double() + 0.2, {"condition": torch.randn(5, 2).double()}
    du, dt, h = torch.randn(5, 3).double(), torch.randn(5).double(), 1e-6
    f = lambda u, t: trigflow_network(model, u, t, 0.5, c)  # noqa: E731
    _, slope = torch.func.jvp(f, (u, t), (du, dt))
    difference = (f(u + h * du, t + h * dt) - f(u - h * du, t - h * dt)) / (2 * h)
    assert torch.allclose(slope, difference, rtol=1e-5, atol=1e-7)


def test_a_condition_that_is_missing_or_of_another_shape_is_an_error():
    x, sigma = torch.zeros(4, 2).double(), torch.ones(4)
    with pytest.raises(ValueError, match=r"condition has shape None; this network needs \(4, 3\)"):
        mlp((2,), 3)(x, sigma)
    with pytest.raises(ValueError, match=r"condition has shape \(4, 2\); this network needs \(4, 3\)"):
        mlp((2,), 3)(x, sigma, condition=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"condition has shape \(4, 2\); this network needs None"):
        mlp((2,))(x, sigma, condition=torch.zeros(4, 2))


# Data and normalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (3, 5)])
def test_normalised_data_have_mean_0_and_std_sigma_data_in_every_element(shape, tmp_path):
    values = RNG.normal(size=(500, *shape)) * RNG.uniform(0.01, 50, shape) + RNG.normal(size=shape) * 9
    conditions = RNG.normal(size=(500, 4)) * 20 - 3
    dataset = data.load(section(save(tmp_path, vectors=values, conditions=conditions), conditional=True))
    codec = VectorCodec.fit(dataset.values, dataset.conditions, sigma_data=0.7)
    x, c = codec.normalise(dataset.values), codec.condition(dataset.conditions)
    assert torch.allclose(x.mean(0), torch.zeros(shape), atol=1e-4)
    assert torch.allclose(x.std(0, correction=0), torch.full(shape, 0.7), atol=1e-4)
    assert torch.allclose(c.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(c.std(0, correction=0), torch.ones(4), atol=1e-4)
    assert np.allclose(codec.restore(x).numpy(), values, rtol=1e-4, atol=1e-4)
    again = codec_from(json.loads(json.dumps(codec.state())))
    assert torch.equal(again.normalise(dataset.values), x)
    assert again.state() == codec.state() and again.network_shape == {"shape": shape, "condition_dim": 4}
    assert not list(codec.state_dict())  # no part of the weights


def test_a_training_batch_and_samples_of_vectors(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES, low=LOW, high=HIGH)
    cfg = vector_run(tmp_path, path, data={"bounds": "clamp"}, network={"sigma_data": 0.8})
    dataset = data.load(cfg.data)
    codec = dataset.codec(cfg)
    assert (codec.kind, codec.class_counts, codec.sigma_data, codec.bounds) == ("vectors", None, 0.8, "clamp")
    rows = torch.tensor([7, 0, 299])
    values, conditions = dataset.read(rows)
    x, given = codec.to_model(values, conditions, None)  # nothing is drawn
    assert torch.equal(x, codec.normalise(values)) and torch.equal(given["condition"], codec.condition(conditions))
    assert torch.equal(codec.told(conditions, x)["condition"], given["condition"])
    assert codec.told(None, x) == {} and codec.to_model(values, None, None)[1] == {}
    assert torch.equal(codec.from_model(x), codec.restore(x))
    x64, given64 = codec.double().to_model(values, conditions, None, torch.float64)
    assert x64.dtype == given64["condition"].dtype == torch.float64 and torch.allclose(x64.float(), x)
    drawn = dataset.draw_given(3, range(500))
    assert len(drawn.unique(dim=0)) > 200 and torch.equal(dataset.draw_given(3, [7, 0]), drawn[[7, 0]])
    assert all((dataset.conditions == row).all(1).any() for row in drawn[:20])
    free = vector_run(tmp_path, path, data={"conditional": False})
    dataset = data.load(free.data)
    assert dataset.draw_given(3, range(5)) is None and dataset.codec(free).network_shape["condition_dim"] == 0


def test_an_element_that_never_changes_is_kept():
    codec = VectorCodec.fit(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    x = codec.normalise(torch.tensor([[1.0, 7.0]]))
    assert x.tolist() == [[-0.5, 0.0]] and codec.restore(x + 0.5).tolist() == [[2.0, 7.0]]


@pytest.mark.parametrize("bounds", ["clamp", "tanh"])
def test_samples_never_leave_the_bounds(bounds):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    values = low + (high - low) * torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    values[0], values[1] = low, high
    codec = VectorCodec.fit(values, bounds=bounds, low=low, high=high)
    x = codec.normalise(values)
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-4)
    assert torch.allclose(x.std(0, correction=0), torch.tensor(0.5), atol=1e-4)
    slack = 1e-5 if bounds == "clamp" else 0.0011 * (high - low) / 2  # tanh reaches its bounds at infinity
    assert ((codec.restore(x) - values).abs() <= slack).all()
    wild = codec.restore(100 * torch.randn(1000, 2))
    assert (wild >= low).all() and (wild <= high).all() and wild.std() > 1
    if bounds == "tanh":  # by the formula: the middle of the range and half of it
        raw = x / 0.5 * codec.std + codec.mean
        assert torch.allclose(
            raw, (((values - low) / (high - low) * 2 - 1) * 1.0).clamp(-0.999, 0.999).atanh(), atol=1e-4
        )
    free = VectorCodec.fit(values, low=low, high=high).restore(100 * torch.randn(1000, 2))
    assert (free < low).any()


@pytest.mark.parametrize(
    ("arrays", "changes", "said"),
    [
        ({"vectors": ACTIONS.astype(int)}, {}, r"vectors in .* are int64 \(300, 2\); they must be floats"),
        ({"vectors": ACTIONS[:, 0]}, {}, r"vectors in .* are \(300,\); they must be \(N, D\)"),
        ({"vectors": ACTIONS[:0]}, {}, r"vectors in .* are \(0, 2\)"),
        (
            {"vectors": np.where(ACTIONS[5] == ACTIONS, np.nan, ACTIONS)},
            {},
            r"vectors in .* not finite in float32 in row \d+",
        ),
        ({"vectors": ACTIONS, "conditions": STATES[:9]}, {}, r"conditions in .* \(9, 3\); they must be \(300, K\)"),
        ({"vectors": ACTIONS, "conditions": STATES[:, 0]}, {}, r"conditions in .* \(300,\)"),
        ({"vectors": ACTIONS, "conditions": STATES + np.inf}, {}, r"conditions in .* not finite in float32 in row 0"),
        ({"vectors": ACTIONS}, {"conditional": True}, r"data\.conditional: .* has no array `conditions`"),
        ({"vectors": ACTIONS}, {"bounds": "clamp"}, r"data\.bounds: clamp needs arrays `low` and `high`"),
        ({"vectors": ACTIONS, "low": HIGH, "high": LOW}, {"bounds": "tanh"}, r"low below high"),
        (
            {"vectors": ACTIONS, "low": LOW[:1], "high": HIGH},
            {"bounds": "tanh"},
            r"low and high in .* \(1,\) and \(2,\)",
        ),
        (
            {"vectors": ACTIONS, "low": LOW + 2, "high": HIGH},
            {"bounds": "clamp"},
            r"row \d+ of vectors in .* is outside",
        ),
        ({"vectors": ACTIONS}, {"resolution": 8}, r"data\.resolution: is for images"),
        ({"vectors": ACTIONS}, {"flip": True}, r"data\.flip: is for images"),
        ({"actions": ACTIONS}, {}, r"holds no array named `images`, .* or `vectors`.* It holds actions"),
    ],
)
def test_bad_data_are_one_line(arrays, changes, said, tmp_path):
    with pytest.raises(config.ConfigError, match=said) as error:
        data.load(section(save(tmp_path, **arrays), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"name": "digits", "path": None}}, r"network\.name: mlp makes vectors"),
        ({"objective": {"name": "ct", "metric": "lpips"}}, r"objective\.metric: lpips compares images"),
        ({"network": {"name": "song_unet"}, "data": {"bounds": "clamp"}}, r"data\.bounds: is for vectors"),
        ({"sample": {"guidance": 2.0}}, r"sample\.guidance"),
        (
            {"objective": {"name": "cd", "teacher": "x", "guidance": 2.0}},
            r"objective\.guidance: guides by class labels",
        ),
    ],
)
def test_settings_that_do_not_fit_vectors(changes, said, tmp_path):
    base = {"data": {"name": "npz", "path": "x.npz", "conditional": True}, "network": {"name": "mlp"}}
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value}
    with pytest.raises(config.ConfigError, match=said):
        config.parse(base)


def test_networks_and_data_that_do_not_fit_are_one_line(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    with pytest.raises(config.ConfigError, match=r"network: a UNet makes images.*network\.name: mlp"):
        trainer.train(tiny(tmp_path / "a", data={"name": "npz", "path": str(path)}))
    images = save(tmp_path, images=np.zeros((9, 8, 8, 1), np.uint8))
    with pytest.raises(config.ConfigError, match=r"network: mlp makes vectors.*network\.name: song_unet"):
        trainer.train(vector_run(tmp_path / "b", images, data={"conditional": False}))


# Runs -----------------------------------------------------------------------------------------------------------------


def weights(folder):
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    return {f"{part}.{k}": v for part in ("model", "objective") for k, v in state[part].items()} | {
        f"ema.{k}": v for k, v in state["ema"][0].items()
    }


@pytest.mark.parametrize("objective", [{"name": "ect"}, {"name": "ct", "s1": 8}, {"name": "sct", "warmup": 3}])
def test_a_resumed_run_on_vectors_is_the_unbroken_run_bit_for_bit(objective, tmp_path, monkeypatch):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    settings = {"objective": objective, "network": {"precond": "trigflow"} if objective["name"] == "sct" else {}}
    trainer.train(vector_run(tmp_path / "a", path, **settings))
    real = TrainingStep.__call__

    def killed_at_step_3(self, *batch):
        if self.step == 3:
            raise RuntimeError("killed")
        real(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", killed_at_step_3)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train(vector_run(tmp_path / "b", path, **settings))
    monkeypatch.setattr(TrainingStep, "__call__", real)
    torch.manual_seed(999)
    trainer.train(vector_run(tmp_path / "b", path, **settings), resume=True)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resume_refuses_vectors_of_another_spread(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    trainer.train(vector_run(tmp_path / "a", path))
    save(tmp_path, vectors=2 * ACTIONS, conditions=STATES)
    with pytest.raises(config.ConfigError, match=r"data\.path: .* does not hold the vectors that .* was trained on"):
        trainer.train(vector_run(tmp_path / "a", path), resume=True)


def test_microbatches_of_vectors_give_the_gradient_of_the_whole_batch(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)

    def gradient(microbatch):
        cfg = vector_run(tmp_path, path, train={"precision": "fp64", "microbatch": microbatch})
        dataset = data.load(cfg.data)
        codec = dataset.codec(cfg)
        model = build.build_model(cfg, codec, torch.device("cpu"), "fp64")
        step = TrainingStep(cfg, codec, model, build.build_objective(cfg, model), "fp64")
        step.update = lambda lr: None
        step(*dataset.read(torch.arange(16)))
        return step.gradient

    whole = gradient(None)
    assert whole.norm() > 0 and (gradient(4) - whole).norm() / whole.norm() < 1e-10


def test_a_run_on_vectors_learns_and_scores(run, capsys):
    first, *entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (first["data"]["size"], first["data"]["classes"]) == ([2], None) and len(first["data"]["fingerprint"]) == 16
    assert entries[0]["w2"] > 0 if "w2" in entries[0] else entries[0]["loss"] > 0
    scores = entries[-1]
    assert 0 < 0.5 * scores["w2_of_data"] < scores["w2"] < 2 * scores["w2_of_data"]
    with np.load(run / "samples" / "step-00000500.npz") as arrays:
        assert arrays["vectors"].shape == (4, 2) and arrays["conditions"].shape == (4, 3)
        assert all((np.abs(STATES.astype(np.float32) - c).sum(1) == 0).any() for c in arrays["conditions"])
    model = checkpoints.load_model(run / "checkpoints" / "last.ckpt")
    assert np.allclose(model.codec.condition_mean, STATES.mean(0), rtol=1e-4, atol=1e-4)
    assert (model.codec.low.tolist(), model.codec.bounds) == (LOW.tolist(), "tanh")


def test_the_score_is_the_exact_distance():
    a, b = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[5.5], [0.0], [2.0]])
    assert distance.wasserstein(a, b) == pytest.approx(math.sqrt((0 + 1 + 0.25) / 3))  # sorted, in one dimension
    assert distance.wasserstein(a, a[[2, 0, 1]]) == pytest.approx(0, abs=1e-6)


# generate.py ----------------------------------------------------------------------------------------------------------


def call(run, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", *map(str, arguments)])


def test_generate_writes_vectors_in_their_own_units_under_the_conditions_asked_for(run, tmp_path, capsys):
    states = np.stack([np.linspace(3, 7, 40), np.zeros(40), np.full(40, -2)], 1)
    np.save(tmp_path / "states.npy", states)
    np.savez(tmp_path / "states.npz", conditions=states)
    assert call(run, "--conditions", tmp_path / "states.npy", "--out", tmp_path / "a") == 0
    assert call(run, "--conditions", tmp_path / "states.npz", "--out", tmp_path / "b", "--batch", 7) == 0
    a, b = (np.load(tmp_path / name / "samples" / "000000.npz") for name in "ab")
    assert np.allclose(a["vectors"], b["vectors"], atol=1e-4) and np.allclose(a["conditions"], states)
    assert a["vectors"].shape == (40, 2) and a["vectors"].dtype == np.float32
    assert np.corrcoef(a["vectors"][:, 0], np.sin(states[:, 0]))[0, 1] > 0.8  # the conditions reach the network
    assert (a["vectors"][:, 1] == 7).all() and (a["vectors"] >= LOW).all() and (a["vectors"] <= HIGH).all()
    assert call(run, "--conditions", tmp_path / "states.npy", "--num", 45, "--out", tmp_path / "c") == 0
    c = np.load(tmp_path / "c" / "samples" / "000000.npz")
    assert np.allclose(c["conditions"][40:], states[:5]) and np.allclose(c["vectors"][:40], a["vectors"], atol=1e-4)
    assert "40 vectors, 1 evaluations each" in capsys.readouterr().out


def test_generate_takes_the_training_sets_conditions_and_goes_on_after_a_stop(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 20)
    assert call(run, "--num", 50, "--steps", 2, "--out", tmp_path / "a") == 0
    files = sorted((tmp_path / "a" / "samples").iterdir())
    assert [f.name for f in files] == ["000000.npz", "000020.npz", "000040.npz"]
    before = np.load(files[1])["vectors"]
    files[1].unlink()
    assert call(run, "--num", 50, "--steps", 2, "--out", tmp_path / "a") == 0
    assert np.array_equal(np.load(files[1])["vectors"], before)
    conditions = np.concatenate([np.load(f)["conditions"] for f in files])
    assert all((np.abs(STATES.astype(np.float32) - c).sum(1) == 0).any() for c in conditions)
    assert len(np.unique(conditions, axis=0)) > 40


def test_generate_scores_vectors(run, tmp_path, capsys):
    assert call(run, "--calc_fid", "--num", 120, "--out", tmp_path / "a") == 0
    said = re.search(
        r"score at 1 NFE: 2-Wasserstein distance ([\d.]+) \(([\d.]+) .*120 vectors", capsys.readouterr().out
    )
    assert 0.5 * float(said[2]) < float(said[1]) < 2 * float(said[2])
    with np.load(tmp_path / "a" / "samples" / "000000.npz") as arrays:  # what perfect samples get
        assert arrays["vectors"].shape == (120, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--class", 1], "--class: is for images"),
        (["--nearest"], "--nearest: is for images"),
        (["--sweep", "1,2"], "--sweep: is for images"),
        (["--search-sigmas", 2], "--search-sigmas: is for images"),
        (["--format", "png"], "--format: png is for images"),
        (["--conditions", "nowhere.npy"], "--conditions: nowhere.npy cannot be read"),
        (["--conditions", "{folder}/two.npy"], "holds float64 (5, 2); this model needs floats (M, 3)"),
        (["--conditions", "{folder}/nan.npy"], "holds numbers that are not finite"),
        (["--conditions", "{folder}/two.npy", "--calc_fid"], "--calc_fid: compares with the training set"),
        (["data.path={folder}/other.npz"], "does not hold vectors of the checkpoint's shape (2,)"),
        (["data.path={folder}/gone.npz"], "data.path: "),
    ],
)
def test_generate_refuses_in_one_line(run, arguments, said, tmp_path, capsys):
    np.save(tmp_path / "two.npy", np.zeros((5, 2)))
    np.save(tmp_path / "nan.npy", np.full((5, 3), np.nan))
    np.savez(
        tmp_path / "other.npz",
        vectors=np.ones((9, 3)),
        conditions=np.ones((9, 3)),
        low=-np.ones(3) * 2,
        high=np.ones(3) * 2,
    )
    assert call(run, *(str(a).format(folder=tmp_path) for a in arguments), "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_image_model_takes_no_conditions(tmp_path, capsys):
    trainer.train(tiny(tmp_path))
    assert call(tmp_path, "--conditions", "x.npy") == 2
    assert capsys.readouterr().err.startswith("--conditions: is for models of vectors")


def test_images_made_elsewhere_are_not_scored_against_vectors(run, capsys):
    assert generate.main(["--cfg", f"{run}/config.yml", "--samples", "x", "--calc_fid"]) == 2
    assert capsys.readouterr().err.startswith("--samples: scores images")


def test_a_model_of_vectors_goes_through_safetensors(run, tmp_path, capsys):
    pytest.importorskip("safetensors")  # of requirements-dev
    ckpt, back = run / "checkpoints" / "last.ckpt", tmp_path / "back.ckpt"
    assert convert.main(["export", str(ckpt), str(tmp_path / "out"), "--to", "safetensors"]) == 0
    assert convert.main(["import", str(tmp_path / "out" / "model.safetensors"), str(back)]) == 0
    there, back = checkpoints.load_model(ckpt), checkpoints.load_model(back)
    assert back.codec.state() == there.codec.state()
    x, c = torch.randn(3, 2), torch.randn(3, 3)
    assert torch.equal(back(x, torch.ones(3), condition=c), there(x, torch.ones(3), condition=c))
    for kind in ("onnx", "diffusers"):
        capsys.readouterr()
        assert convert.main(["export", str(ckpt), str(tmp_path / kind), "--to", kind]) == 2
        assert f"--to {kind}" in capsys.readouterr().err


def test_distillation_on_vectors_and_a_teacher_of_other_vectors(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    trainer.train(vector_run(tmp_path / "teacher", path, objective={"name": "edm"}))
    teacher = {"teacher": str(tmp_path / "teacher" / "checkpoints" / "last.ckpt")}
    for name in ("cd", "pd"):
        trainer.train(vector_run(tmp_path / name, path, objective={"name": name, **teacher}))
    save(tmp_path, vectors=2 * ACTIONS, conditions=STATES)
    with pytest.raises(config.ConfigError, match=r"objective\.teacher: .* vectors of another mean, spread or bounds"):
        trainer.train(vector_run(tmp_path / "other", path, objective={"name": "cd", **teacher}))


def test_sct_starts_from_the_denoiser_that_an_edm_run_left(tmp_path):
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    trainer.train(vector_run(tmp_path / "edm", path, objective={"name": "edm"}, train={"lr": 0.05}))
    ckpt = str(tmp_path / "edm" / "checkpoints" / "last.ckpt")
    there = checkpoints.load_model(ckpt)
    settings = {"objective": {"name": "sct", "warmup": 4}, "network": {"precond": "trigflow"}}
    cfg = vector_run(tmp_path / "sct", path, **settings, train={"init_from": ckpt})
    here = build.build_model(cfg, data.load(cfg.data).codec(cfg), torch.device("cpu"), "fp32").eval()
    x, sigma, condition = torch.randn(3, 2), torch.tensor([0.1, 1.0, 80.0]), torch.randn(3, there.condition_dim)
    given = [there(x, s, condition=condition) for s in (sigma, 2 * sigma)]
    assert not torch.allclose(*given, atol=1e-3)
    assert torch.allclose(given[0], here(x, sigma, condition=condition), atol=1e-5)


def test_the_best_checkpoint_on_vectors_has_the_lowest_distance(tmp_path, monkeypatch):
    distances = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(VectorSamples, "score", lambda *rest, **named: {"w2": next(distances), "w2_of_data": 0.5})
    path = save(tmp_path, vectors=ACTIONS, conditions=STATES)
    trainer.train(vector_run(tmp_path / "r", path, metrics={"every": 2}))
    best = checkpoints.load(tmp_path / "r" / "checkpoints" / "best.ckpt")
    assert (best["step"], best["best"]["scores"]["w2"]) == (4, 1.0)


def test_a_network_of_ones_own_needs_no_more_than_a_forward():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x, c_noise, *nothing):
            return self.linear(torch.cat([x, c_noise[:, None]], 1))

    own, x, sigma = Own(), torch.randn(4, 2), torch.rand(4) + 0.5
    s = sigma[:, None]
    c_in, c_out, c_skip = (s**2 + 0.25).rsqrt(), 0.5 * s * (s**2 + 0.25).rsqrt(), 0.25 / (s**2 + 0.25)
    by_hand = c_skip * x + c_out * own(c_in * x, sigma.log() / 4)
    torch.testing.assert_close(Preconditioner(own)(x, sigma), by_hand)
