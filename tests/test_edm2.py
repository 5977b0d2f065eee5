"""EDM2's network, loss and checkpoints, against golden/unet_edm2, edm2_checkpoint, edm2_phema, and arithmetic."""

import copy
import json
import math
import struct

import pytest
import torch
from conftest import GOLDEN, golden, relative_error, tiny

import checkpoints
import config
import convert
from checkpoints import edm, edm2
from config import ConfigError
from networks import EDM2UNet, Preconditioner
from networks.edm2 import Block, MPConv, mp_cat, mp_silu, mp_sum, unit
from objectives import EDM, EasyConsistencyTuning
from objectives.common import append_dims
from objectives.draws import Draws
from objectives.schedules import ect_pair
from training import trainer

PICKLE = GOLDEN / "edm2_checkpoint.pkl"
SMALL = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 16,
}
NETWORK = {"name": "edm2_unet", **SMALL}


def ours(name):
    """A published name as our state has it."""
    return f"model.{name.removeprefix('unet.')}"


def read(dtype=torch.float32):
    """Tensors of the golden file and the network's arguments; all float32 there."""
    raw = (GOLDEN / "unet_edm2.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    args, tensors = json.loads(header.pop("__metadata__")["network"]), {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        values = torch.frombuffer(data[start:end], dtype=torch.float32)
        tensors[key] = values.reshape(entry["shape"]).to(dtype)
    return tensors, args


def part(tensors, prefix):
    return {ours(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


def golden_model(dtype=torch.float32, state="state."):
    tensors, args = read(dtype)
    channels, sigma_data = args.pop("img_channels"), args.pop("sigma_data")
    del args["use_fp16"]
    net = EDM2UNet(in_channels=channels, out_channels=channels, **args)
    model = Preconditioner(net, sigma_data=sigma_data).to(dtype)
    model.load_state_dict({**part(tensors, "state."), **part(tensors, state)})
    return model, tensors


def small(resolution=8, dtype=torch.float64, **settings):
    """A small network whose every gain matters."""
    torch.manual_seed(0)
    net = EDM2UNet(resolution, 3, 3, **{**SMALL, **settings}).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.ndim == 0 else p * (0.5 + torch.rand(len(p), *[1] * (p.ndim - 1))))
    return Preconditioner(net)


def batch(n=3, resolution=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, resolution, resolution, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.logspace(-1, 1.5, n, dtype=dtype)


# Network --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "_unlabelled"])
def test_network_is_the_published_one(given):
    model, t = golden_model()
    model.eval()
    labels = None if given else t["class_labels"]
    with torch.no_grad():
        assert relative_error(model.raw(t["x"], t["sigma"], labels), t[f"F{given}"]) < 1e-5
        assert relative_error(model(t["x"], t["sigma"], labels), t[f"D{given}"]) < 1e-5
        assert relative_error(model.logvar(t["sigma"]), t["logvar"]) < 1e-5
    assert all(torch.equal(v, t["state." + k]) for k, v in published(model).items())  # eval mode forces nothing


def published(model):
    """Our state under published names."""
    names = {k: k.removeprefix("model.") for k in model.state_dict()}
    return {k if k.startswith("logvar") else f"unet.{k}": model.state_dict()[name] for name, k in names.items()}


def test_a_forward_in_training_mode_forces_the_weights():
    model, t = golden_model()
    model.train()
    D, u = model(t["x"], t["sigma"], t["class_labels"]), model.logvar(t["sigma"])
    assert relative_error(D.detach(), t["D_train"]) < 1e-5
    assert relative_error(u.detach(), t["logvar_train"]) < 1e-5
    before, after, now = part(t, "state."), part(t, "after."), model.state_dict()
    for name, value in now.items():
        assert torch.allclose(value, after[name], rtol=1e-5, atol=1e-6) if name in after else value.equal(before[name])
    assert {k for k in now if k.endswith(".weight")} == set(after)
    model(t["x"], t["sigma"], t["class_labels"])
    model.logvar(t["sigma"])
    assert max(relative_error(model.state_dict()[k], v) for k, v in part(t, "after2.").items()) < 1e-6


def test_without_logvar_its_layer_stays():
    model, t = golden_model()
    model.train()(t["x"], t["sigma"], t["class_labels"])
    name = "logvar_linear.weight"
    assert model.state_dict()[ours(name)].equal(t[f"state.{name}"])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 3e-4)])
def test_gradient_goes_through_the_second_normalisation_alone(dtype, limit):
    model, t = golden_model(dtype)
    model.train()
    D, u = model(t["x"], t["sigma"], t["class_labels"]), model.logvar(t["sigma"])
    ((D * t["cotangent"]).sum() + (u * t["cotangent_logvar"]).sum()).backward()
    expected = part(t, "grad.")
    assert {name for name, _ in model.named_parameters()} == set(expected)
    assert max(relative_error(p.grad, expected[name]) for name, p in model.named_parameters()) < limit


@pytest.mark.parametrize("how", ["no_grad", "eval", "forcing"])
def test_what_does_not_train_does_not_force(how):
    model, t = golden_model()
    model.train(how != "eval")
    model.model.forcing = how != "forcing"
    with torch.set_grad_enabled(how != "no_grad"):
        model(t["x"], t["sigma"], t["class_labels"])
        model.logvar(t["sigma"])
    assert all(v.equal(t["state." + k]) for k, v in published(model).items())
    model.model.force_weights()
    assert max(relative_error(model.state_dict()[k], v) for k, v in part(t, "after.").items()) < 1e-6


def test_pieces_keep_magnitudes():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, n, 8, 8, generator=g, dtype=torch.float64) for n in (24, 8))
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.0, 0.3, 1.0):
        assert rms(mp_sum(a[:, :8], b, t)) == pytest.approx(1, abs=0.01)
        assert rms(mp_cat(a, b, t)) == pytest.approx(1, abs=0.01)
        shares = mp_cat(a, b, t).split([24, 8], dim=1)
        assert shares[1].square().sum() / a.numel() == pytest.approx(4 / 3 * t**2 / ((1 - t) ** 2 + t**2), rel=0.02)
    assert torch.allclose(mp_sum(a, 2 * a, 0.25) * math.sqrt(0.625), 1.25 * a)
    assert unit(torch.tensor([[3.0, 4.0]]), [1]).flatten().tolist() == pytest.approx(
        [v / (math.sqrt(12.5) + 1e-4) for v in (3, 4)]
    )
    layer = MPConv(24, 16, 3).double()
    assert rms(layer(a)[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.05)


def test_published_sizes():
    """Table 3 of 2312.02696: XS (of 512 px, 125M there), S and M."""
    for channels, millions in ((128, 125), (192, 280), (256, 498)):
        with torch.device("meta"):
            net = EDM2UNet(64, 3, 3, label_dim=1000, model_channels=channels)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=4e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_dim": 4, "dropout": 0.3},
        {"resample_filter": [1, 3, 3, 1], "clip_act": None, "channel_mult_emb": 3, "channel_mult_noise": 2},
        {"label_balance": 0.3, "concat_balance": 0.7, "res_balance": 0.4, "attn_balance": 0.2, "clip_act": 2.0},
        {"attn_resolutions": [], "channels_per_head": 64},
    ],
)
def test_forward_mode_is_the_derivative(settings):
    model, (x, sigma) = small(**settings).train(), batch()
    model.model.forcing = False
    labels = torch.eye(4, dtype=x.dtype)[:3] if "label_dim" in settings else None
    same = {"class_labels": labels, "dropout_keys": torch.arange(3)}
    dx, dsigma, h = torch.randn_like(x), sigma * 0.3, 1e-6
    with torch.no_grad():
        D, dD = model.jvp(x, sigma, dx, dsigma, **same)
        up, down = (model(x + s * dx, sigma + s * dsigma, **same) for s in (h, -h))
        assert torch.allclose(D, model(x, sigma, **same))
        assert relative_error(dD, (up - down) / (2 * h)) < 1e-6


def test_several_times_and_heads():
    """Of a flow map: two noise labels side by side, the first's waves first; a second output."""
    net, (x, _) = small(told=2, heads=2).model, batch()
    times = torch.tensor([[0.9, 0.2], [0.9, 0.3], [0.8, 0.2]], dtype=x.dtype)
    waves = net.emb_fourier(times)
    assert waves.shape == (3, 32) and waves[0, :16].equal(waves[1, :16]) and waves[0, 16:].equal(waves[2, 16:])
    assert net.eval()(x, times).shape == (3, 6, 8, 8)


def test_dropout_follows_its_keys_and_stops_at_a_resolution():
    x, sigma = batch()
    keys = torch.arange(3)
    for limit, dropping in ((None, [8, 4]), (8, [8, 4]), (4, [4]), (2, [])):
        model = small(dropout=0.5, dropout_max_resolution=limit).train()
        blocks = {name: m for name, m in model.named_modules() if isinstance(m, Block)}
        assert {int(name.split(".")[-1].split("x")[0]) for name, m in blocks.items() if m.drops} == set(dropping)
        with torch.no_grad():
            first, again, other = (model(x, sigma, dropout_keys=k) for k in (keys, keys, keys + 7))
            assert first.equal(again) and first.equal(other) == (not dropping)
            assert first.equal(model.eval()(x, sigma)) == (not dropping)
    assert len({m.layer for m in blocks.values()}) == len(blocks)


def test_computing_blocks_again_changes_no_gradient():
    x, sigma = batch()
    grads = []
    for again in (False, True):
        model = small(dropout=0.4).train()
        for block in model.modules():
            if hasattr(block, "checkpointing"):
                block.checkpointing = again
        model(x, sigma, dropout_keys=torch.arange(3)).square().sum().backward()
        grads.append([p.grad for p in model.model.enc.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads, strict=True))


def test_half_precision_is_near():
    model, (x, sigma) = small(dtype=torch.float32).eval(), batch(dtype=torch.float32)
    with torch.no_grad():
        exact = model(x, sigma)
        model.autocast = torch.bfloat16
        assert 1e-5 < relative_error(model(x, sigma), exact) < 0.03
        assert model.logvar(sigma).dtype == torch.float32


def test_what_it_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"no augmentation labels; set data\.augment: 0"):
        EDM2UNet(8, 3, 3, augment_dim=9)
    with pytest.raises(ValueError, match="resolution 6 cannot be halved 2 times"):
        EDM2UNet(6, 3, 3, channel_mult=[1, 1, 1])
    with pytest.raises(ValueError, match="channels do not split into 3 heads"):
        EDM2UNet(8, 3, 3, model_channels=50, channel_mult=[1], channels_per_head=16, attn_resolutions=[8])


# Objectives -----------------------------------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """The golden file's stand-in: D around a tanh(u) cos(c), u(sigma) = b cos(3 c) + d, c = ln(sigma) / 4."""

    def __init__(self, coef):
        super().__init__()
        self.coef = torch.nn.Parameter(coef.clone())

    def forward(self, x, sigma):
        s = append_dims(sigma, x)
        F = self.coef[0] * torch.tanh(x / (s**2 + 0.25).sqrt()) * torch.cos(s.log() / 4)
        return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * F

    def logvar(self, sigma):
        return self.coef[1] * torch.cos(3 * sigma.log() / 4) + self.coef[2]


def test_loss_with_logvar_is_edm2s():
    g = golden("edm2_phema")
    P_mean, P_std, sigma_data = g["loss_settings"].tolist()
    model, objective = Known(g["loss_coef"]), EDM(P_mean, P_std, sigma_data, logvar=True)
    sigma = (P_mean + P_std * g["loss_normal"]).exp()
    loss = objective(model, g["loss_x"], sigma=sigma, noise=g["loss_noise"]).loss
    assert torch.allclose(loss, g["loss_elements"].mean((1, 2, 3)), rtol=1e-9)
    assert loss.mean().item() == pytest.approx(g["loss_mean"].item(), rel=1e-9)
    loss.mean().backward()
    elements = g["loss_x"][0].numel()  # the original's gradient is of the sum over them
    assert torch.allclose(model.coef.grad * elements, g["loss_grad"], rtol=1e-9)


def test_ect_weighs_by_c_out_as_on_imagenet():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    noise, t = torch.randn_like(x), torch.tensor([0.05, 0.3, 1.0, 2.0, 9.0, 70.0], dtype=torch.float64)
    model = Known(torch.tensor([0.8, 0.3, -0.2], dtype=torch.float64))
    how = {"q": 4.0, "huber_c": 0.06, "difference": "two_passes", "weighting": "c_out", "sigma_data": 0.5}
    objective = EasyConsistencyTuning(100, P_mean=-0.8, P_std=1.6, **how)
    loss = objective(model, x, step=150, t=t, noise=noise).loss
    r, _ = ect_pair(t, 1, 4.0, "sigmoid")
    assert torch.allclose(r, (t * (1 - (1 + 8 * torch.sigmoid(-t)) / 16)).clamp(min=0))
    D_t, D_r = (model(x + append_dims(s, x) * noise, s) for s in (t, r.clamp(min=1e-9)))
    square = (D_t - torch.where(append_dims(r, x) > 0, D_r, x)).square().sum((1, 2, 3))
    expected = ((square + 0.06**2).sqrt() - 0.06) * (t**2 + 0.25) / (t * 0.5) ** 2
    assert torch.allclose(loss, expected, rtol=1e-9)


def test_a_targets_pass_forces_nothing():
    """ECT's two passes: the weights are those of one forced forward, and the gradient can be taken."""
    model, (x, _) = small(label_dim=0, dropout=0.2).train(), batch(6)
    once = copy.deepcopy(model)
    once.model.force_weights(logvar=False)
    objective = EasyConsistencyTuning(100, difference="two_passes")
    out = objective(model, x, step=500, draws=Draws(0, 6), dropout_keys=torch.arange(6))
    out.loss.mean().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), once.named_parameters(), strict=True):
        assert a.equal(b), name
    assert model.model.out_gain.grad.abs() > 0


# Runs -----------------------------------------------------------------------------------------------------------------

RUN = {
    "network": {**NETWORK, "dropout": 0.1, "dropout_max_resolution": 4},
    "objective": {"name": "edm", "logvar": True},
    "data": {"conditional": True},
}


def settings(**train):
    rates = {"lr_decay": "inverse_sqrt", "lr_decay_batches": 3, "lr_warmup": 2, "optimizer": "adam"}
    return {**RUN, "train": {**rates, "lr": 0.01, "steps": 6, **train}}


def fresh(folder, **changes):
    """`tiny` without its own network."""
    cfg = tiny(folder).model_dump()
    cfg.pop("network")
    for section, values in {**settings(), **changes}.items():
        renamed = section in ("network", "objective")
        cfg[section] = dict(values) if renamed else {**cfg[section], **values}
    return config.parse(cfg)


def step_of(run, rows=slice(0, 16)):
    run.train_step(run.dataset.images[rows], run.dataset.labels[rows])
    return run.train_step


def test_a_step_forces_once_whatever_the_microbatches(tmp_path):
    steps = []
    for microbatch in (16, 4):
        train = {**settings()["train"], "precision": "fp64", "microbatch": microbatch, "lr_warmup": 0, "lr": 1e-12}
        run = trainer.Trainer(fresh(tmp_path, train=train))
        once = copy.deepcopy(run.train_step.model)
        steps.append(step_of(run))
        once.model.force_weights()
        for (name, a), (_, b) in zip(steps[-1].model.named_parameters(), once.named_parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-10), name
    assert relative_error(steps[1].gradient, steps[0].gradient) < 1e-10
    assert steps[0].model.model.logvar_linear.weight.grad.abs().sum() > 0


def test_a_run_learns_and_goes_on_in_ect(tmp_path, capsys):
    trainer.train(fresh(tmp_path / "a", train={**settings()["train"], "steps": 60, "lr": 0.02, "log_every": 20}))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    ect = {"name": "ect", "double_kimg": 0.05, "weighting": "c_out", "huber_c": 0.06, "q": 4.0}
    train = {**settings()["train"], "init_from": str(last)}
    trainer.train(fresh(tmp_path / "b", objective=ect, train=train))
    start, end = checkpoints.load_model(last), checkpoints.load_model(tmp_path / "b" / "checkpoints" / "last.ckpt")
    x = torch.randn(4, 1, 8, 8)
    difference = relative_error(end(x, torch.full((4,), 1.0)), start(x, torch.full((4,), 1.0)))
    assert 0 < difference < 0.5


@pytest.mark.parametrize("name", ["sct", "trigflow"])
def test_other_objectives_train_it(name, tmp_path):
    trainer.train(fresh(tmp_path, objective={"name": name}, network={**NETWORK, "dropout": 0.1}))
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 6


def test_logvar_asks_for_a_network_that_has_it():
    with pytest.raises(ConfigError, match=r"objective\.logvar: needs a network that learns it, edm2_unet"):
        config.parse({"objective": {"name": "edm", "logvar": True}})


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_pickle_computes_what_edm2_computed(tmp_path, capsys):
    target = tmp_path / "edm2.ckpt"
    assert convert.main(["import", str(PICKLE), str(target)]) == 0
    model, io = checkpoints.load_model(target), golden("edm2_checkpoint_io")
    assert relative_error(model(io["x"], io["sigma"]), io["D"]) < 1e-5
    assert relative_error(model.raw(io["x"], io["sigma"]), io["F"]) < 1e-5
    assert relative_error(model.logvar(io["sigma"]), io["logvar"]) < 1e-5
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    cfg = config.load(f"{target}.yml")
    assert (cfg.network.name, cfg.network.model_channels, cfg.network.dropout) == ("edm2_unet", 8, 0.1)
    assert (cfg.objective.logvar, cfg.objective.P_mean, cfg.objective.P_std) == (True, -0.4, 1.0)
    assert cfg.data.path == "datasets/edm2-img512-sd.zip" and not cfg.data.conditional


def test_the_encoder_is_kept(tmp_path):
    state, _ = convert.read(PICKLE)
    encoder, io = state["data"]["encoder"], golden("edm2_checkpoint_io")
    assert (encoder["name"], encoder["vae_name"]) == ("StabilityVAEEncoder", "stabilityai/sd-vae-ft-mse")
    scale, bias = (torch.tensor(encoder[key]).view(-1, 1, 1) for key in ("scale", "bias"))
    mean, std = io["encoder_raw"].chunk(2, dim=1)
    latents = (mean + std * io["encoder_noise"]) * scale + bias
    assert torch.allclose(latents, io["encoder_latents"], atol=1e-6)


def test_other_pickles_of_the_format():
    """Classes, no more than the necessary said, plain dicts; an RGB encoder has no fields."""
    with open(PICKLE, "rb") as file:
        content = edm._Unpickler(file, PICKLE).load()
    plain, io = golden_model()[0], read()[0]
    args = read()[1]
    ema, encoder = content["ema"], content["encoder"]
    positional = [args.pop(key) for key in ("img_resolution", "img_channels", "label_dim", "use_fp16")]
    ema.state = {"_init_args": tuple(positional), "_init_kwargs": args}
    encoder.name, encoder.state = "StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}}
    content = {**content, "dataset_kwargs": {"path": "edm2-imagenet-64x64.zip", "use_labels": True}}
    weights = {k: v.half() for k, v in published(plain).items()}
    state = edm2.state_of(ema, weights, content, edm.numbers, PICKLE)
    model = checkpoints.model_from(state, PICKLE)
    assert relative_error(model(io["x"], io["sigma"], io["class_labels"]), io["D"]) < 2e-3  # float16 weights
    assert state["data"]["encoder"] == {"name": "StandardRGBEncoder"}
    assert state["config"]["data"]["conditional"] and state["data"]["shape"]["label_dim"] == 10
    ema.state["_init_kwargs"] = {**args, "wings": 2}
    with pytest.raises(checkpoints.CheckpointError, match="has a setting wings, which this project lacks"):
        edm2.state_of(ema, weights, content, edm.numbers, PICKLE)


def test_a_truncated_pickle_is_one_line(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(PICKLE.read_bytes()[:5000])
    assert convert.main(["import", str(tmp_path / "a.pkl"), str(tmp_path / "a.ckpt")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is no whole pickle" in said
