"""What of the network follows from the method, and how a flow map starts from another model's weights."""

import re

import pytest
import torch
from conftest import relative_error, tiny
from test_flow_maps_networks import IMF_DIT, SMALL_DIT, UNET, stirred

import checkpoints
import config
import networks
from training import trainer

# What follows


@pytest.mark.parametrize("name, expected", [
    *((name, ("edm", "log", None, 1, False)) for name in ("edm", "ct", "ict", "ect")),
    *((name, ("trigflow", "t", None, 1, False)) for name in ("trigflow", "sct")),
    ("flow", ("flow", "time", "t", 1, False)),
    ("meanflow", ("flow", "time", "t,t-r", 1, False)),
    ("soflow", ("flow", "time", "t,t-r", 1, False)),
    ("imf", ("flow", "time", "t-r", 2, False)),
])  # fmt: skip
def test_what_a_method_asks_of_the_network_follows_from_it(name, expected):
    cfg = config.load("config.yml", [f"objective.name={name}"])
    n = cfg.network
    assert (n.precond, n.c_noise, n.times, n.heads, n.guidance_inputs) == expected
    assert config.parse(cfg.model_dump()) == cfg
    assert f"precond: {expected[0]}" in config.dump(cfg)  # a run's config.yml holds what it was
    model = networks.build(n.model_dump(), resolution=8, channels=1)
    assert isinstance(model, networks.FlowMap if expected[2] else networks.Preconditioner)


@pytest.mark.parametrize("name", ["cd", "tcm", "cmt", "pd", "scd"])
def test_distilled_methods_too(name):
    n = config.load("config.yml", [f"objective.name={name}", "objective.teacher=a.ckpt"]).network
    assert (n.precond, n.c_noise, n.times) == (("trigflow", "t", None) if name == "scd" else ("edm", "log", None))


def test_what_follows_from_more_than_the_name():
    parsed = lambda **raw: config.parse(raw).network  # noqa: E731
    assert parsed(network={"name": "dit"}, objective={"name": "soflow"}).times == "t,t-r"
    assert parsed(network={"name": "dit"}, objective={"name": "meanflow"}).times == "t,t-r"
    guided = parsed(objective={"name": "imf", "guidance": 8.0}, data={"conditional": True})
    assert guided.guidance_inputs is True
    assert parsed(network={"precond": "edm"}, objective={"name": "meanflow"}).c_noise == "log"  # as EDM's weights know


@pytest.mark.parametrize("network, objective, now", [
    ({}, {}, ("edm", "log")),
    ({"precond": "cm"}, {"name": "ct"}, ("cm", "log")),
    ({"precond": "cm", "c_noise": "log250"}, {"name": "ict"}, ("cm", "log250")),
    ({"precond": "trigflow"}, {"name": "sct"}, ("trigflow", "log")),  # mnist.yml's, which starts from EDM's weights
    ({"precond": "trigflow", "c_noise": "t"}, {"name": "trigflow"}, ("trigflow", "t")),
])  # fmt: skip
def test_a_config_from_before_means_what_it_did(network, objective, now):
    n = config.parse({"network": network, "objective": objective}).network
    assert (n.precond, n.c_noise, n.times, n.heads, n.guidance_inputs) == (*now, None, 1, False)


@pytest.mark.parametrize("network, objective, said", [
    ({"precond": "edm"}, "sct", "network.precond: objective sct needs trigflow"),
    ({"precond": "cm"}, "meanflow", "network.precond: objective meanflow trains a velocity"),
    ({"precond": "flow"}, "ect", "network.precond: objective ect trains no flow map"),
    ({"c_noise": "time"}, "edm", "network.c_noise: objective edm trains no flow map"),
    ({"times": "t,r"}, "ect", "network.times: objective ect tells the network a noise level"),
    ({"heads": 2}, "ect", "network.heads: objective ect trains no flow map"),
    ({"guidance_inputs": True}, "ect", "network.guidance_inputs: objective ect has no guidance"),
    ({"times": "t"}, "soflow", "network.times: objective soflow learns jumps"),
    ({"times": "t-r"}, "flow", "network.times: t - r is 0 in flow matching"),
    ({"c_noise": "log"}, "imf", "network.c_noise: is a label of t"),
    ({"heads": 2}, "meanflow", "network.heads: objective meanflow trains one head"),
    ({"guidance_inputs": True}, "imf", "network.guidance_inputs: objective imf has no guidance"),
    ({"times": "t,s"}, "soflow", "network.times: 't,s' is not one of"),
])  # fmt: skip
def test_what_does_not_go_with_the_method_is_refused(network, objective, said):
    with pytest.raises(config.ConfigError, match=re.escape(said)):
        config.parse({"network": network, "objective": {"name": objective}})


@pytest.mark.parametrize("network, objective", [
    ({"name": "dit", **SMALL_DIT}, {"name": "ect", "double_kimg": 0.05}),
    ({"name": "dit", **SMALL_DIT}, {"name": "soflow"}),
    ({"name": "dit", **IMF_DIT}, {"name": "imf", "guidance": 8.0}),
    ({"name": "dit", **SMALL_DIT}, {"name": "sct", "warmup": 4}),
], ids=["ect", "soflow", "imf", "sct"])  # fmt: skip
def test_a_dit_trains_by_either_clock_and_comes_back(network, objective, tmp_path):
    cfg = tiny(tmp_path, objective=objective, data={"conditional": True}, train={"steps": 2, "save_every": 2})
    raw = cfg.model_dump() | {"network": network}
    trainer.train(config.parse(raw))
    model = checkpoints.load_model(tmp_path / "checkpoints/last.ckpt")
    assert isinstance(model.model, networks.DiT)
    assert any(p.abs().sum() > 0 for p in model.model.last.parameters())


# The start

NETS = {
    "song": {"name": "song_unet", **UNET},
    "adm": {"name": "dhariwal_unet", **UNET, "channels_per_head": 8},
    "edm2": {"name": "edm2_unet", **UNET, "channels_per_head": 8},
    "dit": {"name": "dit", **SMALL_DIT},
    "prefix": {"name": "dit", **IMF_DIT},
}
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = {"class_labels": torch.eye(3)[[0, 1, 2, 0]]}
TIMES = torch.tensor([0.1, 0.4, 0.7, 0.97])


def made(net, objective, seed=0, **settings):
    """(config, model) with weights that all matter, in eval mode."""
    raw = {"network": {**NETS[net], **settings}, "objective": {"name": objective}, "data": {"conditional": True}}
    if settings.get("guidance_inputs"):
        raw["objective"]["guidance"] = 8.0
    cfg = config.parse(raw)
    torch.manual_seed(seed)
    model = networks.build(cfg.network.model_dump(), resolution=8, channels=1, label_dim=3)
    return cfg, stirred(model, seed).eval().requires_grad_(False)


def started(source, target, path):
    """What `initialise` says of starting the model `target` from the (config, model) `source`."""
    cfg, model = source
    data = {"shape": {"resolution": 8, "channels": 1, "label_dim": 3}, "class_counts": [1] * 3, "scaling": None}
    weights = model.state_dict()
    rest = {"objective": {}, "optimizer": {}, "scaler": {}}
    checkpoints.write_state(
        path, {"step": 0, "config": cfg.model_dump(), "data": data, "model": weights, "ema": [weights], **rest}
    )
    return checkpoints.initialise(target, path)


def velocity(model):
    """Of a flow map on the diagonal, or of a denoiser in the linear clock."""
    if model.clock == "time":
        return model(X, TIMES, TIMES, **LABELS)
    t = TIMES[:, None, None, None]
    return (X - model(X / (1 - t), TIMES / (1 - TIMES), **LABELS)) / t


GUIDED = {"times": "t,t-r", "guidance_inputs": True}
EXACT = [
    ("flow", {}, "meanflow", {}),
    ("flow", {}, "soflow", {"times": "t,r"}),
    ("flow", {}, "imf", GUIDED),
    ("meanflow", {}, "imf", GUIDED),
    ("edm", {}, "meanflow", {"precond": "edm"}),
    ("edm", {}, "soflow", {"precond": "trigflow", "c_noise": "log"}),
    ("trigflow", {}, "meanflow", {"precond": "trigflow", "c_noise": "t"}),
    ("edm", {}, "flow", {"precond": "edm"}),
]
ONLY = [
    ("flow", {}, "imf", {}, "network.times is t there and t-r here"),
    ("meanflow", {}, "imf", {"guidance_inputs": True}, "network.times is t,t-r there and t-r here"),
    ("edm", {}, "meanflow", {}, "network.precond is edm there and flow here"),
    ("edm", {}, "meanflow", {"precond": "edm", "c_noise": "t"}, "network.c_noise is log there and t here"),
    ("ect", {"precond": "cm"}, "meanflow", {"precond": "edm"}, "network.precond is cm there and edm here"),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case[0]}-{case[2]}")
@pytest.mark.parametrize("net", ["song", "adm", "edm2", "dit"])
def test_a_map_starts_with_the_same_velocity(net, case, tmp_path):
    """On the diagonal r = t; and there its second head, where it has one, is the same."""
    there, settings, here, own = case
    source, (_, model) = made(net, there, **settings), made(net, here, seed=1, **own)
    said = started(source, model, tmp_path / "a.ckpt")
    assert said == f"the network starts from {tmp_path / 'a.ckpt'}: the same velocity where r = t"
    expected = velocity(source[1])
    tolerance = 0 if there == "flow" and net != "edm2" else 2e-6  # float32, in two clocks
    assert relative_error(velocity(model), expected) <= tolerance
    if model.heads == 2:
        assert relative_error(model.both(X, TIMES, TIMES, **LABELS)[1], expected) <= max(tolerance, 1e-6)


@pytest.mark.parametrize("net", ["song", "dit"])
def test_r_is_heard_after_the_start(net, tmp_path):
    """At the start the new number has no weight, and a gradient that will give it one."""
    source, (_, model) = made(net, "flow"), made(net, "meanflow", seed=1)
    started(source, model, tmp_path / "a.ckpt")
    assert torch.equal(model(X, TIMES, 0 * TIMES, **LABELS), velocity(model))
    new = model.model.map_layers[1][2].weight if net == "dit" else model.model.map_layer0.weight
    new.requires_grad_()
    model(X, TIMES, 0 * TIMES, **LABELS).square().sum().backward()
    half = new.grad if net == "dit" else new.grad.chunk(2, dim=1)[1]
    assert half.abs().sum() > 0


@pytest.mark.parametrize("case", ONLY, ids=lambda case: f"{case[0]}-{case[2]}-{case[4].split()[0]}")
@pytest.mark.parametrize("net", ["song", "dit"])
def test_what_is_only_an_initialisation_says_so(net, case, tmp_path):
    there, settings, here, own, why = case
    source, (_, model) = made(net, there, **settings), made(net, here, seed=1, **own)
    assert started(source, model, tmp_path / "a.ckpt").endswith(f": an initialisation only: {why}")
    assert relative_error(velocity(model), velocity(source[1])) > 1e-3


def test_new_prefix_tokens_are_heard_at_once(tmp_path):
    source, (_, model) = made("prefix", "flow"), made("prefix", "meanflow", seed=1)
    assert started(source, model, tmp_path / "a.ckpt").endswith("the transformer is given new tokens")
    assert relative_error(velocity(model), velocity(source[1])) > 1e-3
    for name in ("told0", "label"):
        assert torch.equal(model.model.tokens[name], source[1].model.tokens[name])


@pytest.mark.parametrize("net", [*NETS])
@pytest.mark.parametrize("objective", ["meanflow", "imf", "ect"])
def test_the_same_kind_of_model_starts_whole_and_silent(objective, net, tmp_path):
    source, (_, model) = made(net, objective), made(net, objective, seed=1)
    assert started(source, model, tmp_path / "a.ckpt") == ""
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source[1].state_dict().values(), strict=True)
    )


def test_another_network_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.ckpt"
    for source, target, said in (
        (made("song", "flow"), made("song", "meanflow", model_channels=32), "is of another network: "),
        (made("song", "flow"), made("adm", "meanflow"), "is of another network: "),
        (made("song", "flow"), made("song", "ect"), "network.c_noise is time there and log here"),
        (made("song", "imf"), made("song", "meanflow"), "is of another network: "),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=re.escape(said)) as error:
            started(source, target[1], path)
        assert "\n" not in str(error.value)


def test_a_run_says_how_it_starts(tmp_path, capsys):
    trainer.train(tiny(tmp_path / "a", objective={"name": "edm"}, train={"steps": 1}))
    start = str(tmp_path / "a/checkpoints/last.ckpt")
    run = tiny(
        tmp_path / "b",
        objective={"name": "meanflow"},
        network={"precond": "edm"},
        train={"steps": 1, "init_from": start},
    )
    capsys.readouterr()
    trainer.train(run)
    assert f"the network starts from {start}: the same velocity where r = t" in capsys.readouterr().out
