"""The UNets and their preconditioners, against golden/unet_*.safetensors and against arithmetic done here."""

import copy
import json
import math
import struct
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import networks
from networks import DhariwalUNet, Preconditioner, SongUNet, plain_kernels
from networks.layers import FourierEmbedding, GroupNorm, Resample, ResampleConv, dropout

GOLDEN = Path(__file__).parent / "golden"
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def read_golden(name):
    """Tensors and the network's arguments; the format is a length, a JSON header, raw data (all float32 here)."""
    raw = (GOLDEN / f"unet_{name}.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    data = bytearray(raw[8 + size :])
    network = json.loads(header.pop("__metadata__")["network"])
    tensors = {}
    for key, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = entry["data_offsets"]
        tensors[key] = torch.frombuffer(data[start:end], dtype=torch.float32).reshape(entry["shape"])
    return tensors, network


def golden_model(name):
    tensors, args = read_golden(name)
    kind = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[args.pop("model_type")]
    channels, sigma_data = args.pop("img_channels"), args.pop("sigma_data")
    model = Preconditioner(kind(in_channels=channels, out_channels=channels, **args), sigma_data=sigma_data)
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return model.eval(), tensors


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def small(kind=SongUNet, resolution=8, channels=3, **settings):
    """A small network in eval mode whose every weight matters (fresh ones have last layers of almost zero)."""
    torch.manual_seed(0)
    defaults = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    network = kind(resolution, channels, channels, **{**defaults, **settings})
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.ndim == 1))
    return network.eval()


def batch(n=3, channels=3, resolution=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, resolution, resolution, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.logspace(-2, 1.9, n, dtype=torch.float64).to(dtype)


class Echo(nn.Module):
    """A network that remembers what it was given and returns a fixed output."""

    img_resolution, img_channels, label_dim, augment_dim = 4, 3, 5, 0

    def __init__(self, output=0.0, dtype=torch.float64):
        super().__init__()
        self.output = nn.Parameter(torch.tensor(output, dtype=dtype))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        self.given = types.SimpleNamespace(x=x, c_noise=c_noise, class_labels=class_labels, augment=augment_labels)
        return self.output.expand(x.shape)


# Golden numbers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-7)], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
@torch.no_grad()
def test_golden(name, dtype, tolerance, memory_format):
    model, golden = golden_model(name)
    model = model.to(dtype=dtype, memory_format=memory_format)
    x, sigma = golden["x"].to(dtype), golden["sigma"].to(dtype)
    labels = {k: golden[k].to(dtype) for k in ("class_labels", "augment_labels") if k in golden}
    f, d = model.raw(x, sigma, **labels), model(x, sigma, **labels)
    assert f.dtype == d.dtype == dtype
    assert relative(f, golden["F"]) < tolerance
    assert relative(d, golden["D"]) < tolerance
    with plain_kernels():
        assert relative(model.raw(x, sigma, **labels), golden["F"]) < tolerance


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_golden_bf16(name):
    """Under autocast the network errs by what bf16 rounding makes of it, and the output stays float32."""
    model, golden = golden_model(name)
    labels = {k: golden[k] for k in ("class_labels", "augment_labels") if k in golden}
    model.autocast = torch.bfloat16
    f, d = model.raw(golden["x"], golden["sigma"], **labels), model(golden["x"], golden["sigma"], **labels)
    assert f.dtype == torch.bfloat16
    assert d.dtype == torch.float32
    assert 1e-4 < relative(f.float(), golden["F"]) < 2e-2
    d.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_golden_uses_its_labels():
    """The golden test would not notice labels that are never read."""
    for name, key in (("adm", "class_labels"), ("ncsnpp", "augment_labels")):
        model, golden = golden_model(name)
        with torch.no_grad():
            assert relative(model.raw(golden["x"], golden["sigma"]), golden["F"]) > 1e-3, key


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_state_names(name):
    model, golden = golden_model(name)
    assert set(model.state_dict()) == {k.removeprefix("state.") for k in golden if k.startswith("state.")}


def test_conditional_song_unet_names():
    """Published conditional DDPM++ weights have a bias on map_label; ADM's and map_augment's have none."""
    assert "map_label.bias" in small(label_dim=4).state_dict()
    assert "map_label.bias" not in small(DhariwalUNet, label_dim=4).state_dict()
    assert "map_augment.bias" not in small(augment_dim=4).state_dict()


# Preconditioning

SIGMA = [0.002, 0.05, 0.5, 2.0, 80.0]


@pytest.mark.parametrize("c_noise", ["log", "log250", "t"])
@pytest.mark.parametrize("precond", ["edm", "cm", "trigflow"])
@pytest.mark.parametrize("sigma_data", [0.5, 0.7])
def test_preconditioning_formulas(precond, c_noise, sigma_data):
    echo = Echo(0.3)
    model = Preconditioner(echo, precond, c_noise, sigma_data=sigma_data, sigma_min=0.002, sigma_max=80.0)
    x = torch.linspace(-2, 2, 5 * 3, dtype=torch.float64).reshape(5, 3, 1, 1)
    out = model(x, torch.tensor(SIGMA, dtype=torch.float64), torch.zeros(5, 5))
    for i, s in enumerate(SIGMA):
        eps = 0.002 if precond == "cm" else 0
        c_skip = sigma_data**2 / ((s - eps) ** 2 + sigma_data**2)
        c_out = sigma_data * (s - eps) / math.hypot(s, sigma_data) * (-1 if precond == "trigflow" else 1)
        assert torch.allclose(out[i], c_skip * x[i] + c_out * 0.3, rtol=1e-12, atol=1e-14)
        assert torch.allclose(echo.given.x[i], x[i] / math.hypot(s, sigma_data), rtol=1e-12, atol=0)
        expected = {"log": math.log(s) / 4, "log250": 250 * math.log(s), "t": math.atan(s / sigma_data)}
        assert math.isclose(echo.given.c_noise[i].item(), expected[c_noise], rel_tol=1e-12)


def test_cm_boundary():
    """D(x; sigma_min) = x for cm whatever the network says; edm's D is not x there, but at 0."""
    x, _ = batch(resolution=4)
    at = torch.full((3,), 0.01)
    assert torch.equal(Preconditioner(Echo(9.0), "cm", sigma_min=0.01)(x, at), x)
    assert (Preconditioner(Echo(9.0), "edm", sigma_min=0.01)(x, at) - x).abs().min() > 0.05
    for c_noise in ("log", "log250", "t"):
        model = Preconditioner(Echo(9.0), "edm", c_noise)
        assert torch.equal(model(x, torch.zeros(3)), x)
        assert model.model.given.c_noise.isfinite().all()


@pytest.mark.parametrize("sigma", SIGMA)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_unit_variance_of_input_and_target(sigma, sigma_data):
    """EDM's conditions: both the network's input and the F that would make D exact have variance 1."""
    g = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 64, 3, 16, 16, generator=g, dtype=torch.float64)
    y, n = y * sigma_data, noise * sigma
    s = torch.full((64,), sigma, dtype=torch.float64)
    zero, one = Echo(0.0), Echo(1.0)
    skip = Preconditioner(zero, "edm", sigma_data=sigma_data)(y + n, s)
    c_out = Preconditioner(one, "edm", sigma_data=sigma_data)(y + n, s) - skip
    assert abs(zero.given.x.std().item() - 1) < 0.02
    assert abs(((y - skip) / c_out).std().item() - 1) < 0.02


def test_null_label_and_label_errors():
    model = Preconditioner(Echo())
    x, sigma = batch(resolution=4)
    model(x, sigma)
    assert torch.equal(model.model.given.class_labels, torch.zeros(3, 5, dtype=torch.float64))
    labels = torch.eye(5)[:3]
    model(x, sigma, labels)
    assert torch.equal(model.model.given.class_labels, labels.double())
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"class_labels has shape \(.*\); this network needs \(3, 5\)"):
            model(x, sigma, wrong)
    with pytest.raises(ValueError, match=r"augment_labels has shape \(3, 9\); this network needs none"):
        model(x, sigma, augment_labels=torch.zeros(3, 9))


def test_output_dtypes():
    """float64 in, float64 out, also around a float32 network (EDM's sampler runs so); never less than float32."""
    x, sigma = batch(resolution=4)
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        for network in (torch.float32, torch.float64):
            model = Preconditioner(Echo(dtype=network))
            assert model(x.to(dtype), sigma.to(dtype)).dtype == expected
            assert model.model.given.x.dtype == model.model.given.c_noise.dtype == network


def test_unknown_kinds():
    with pytest.raises(ValueError, match="precond is 'vp'"):
        Preconditioner(Echo(), "vp")
    with pytest.raises(ValueError, match="c_noise is 'sigma'"):
        Preconditioner(Echo(), c_noise="sigma")


# Layers


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize(
    "direction, kernel, filter_last",
    [("down", 1, False), ("down", 3, False), ("down", 3, True), ("up", 1, False), ("up", 3, False)],
)
def test_resample_conv_is_filter_and_conv(taps, direction, kernel, filter_last):
    """The one-pass form equals the two steps written out, borders included."""
    torch.manual_seed(0)
    layer = ResampleConv(4, 6, kernel, direction, taps, filter_last).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    f = torch.outer(*[torch.tensor(taps, dtype=torch.float64)] * 2) / sum(taps) ** 2
    pad, same = len(taps) // 2 - 1, kernel // 2

    def filtered(t, padding):
        per_channel = f.expand(t.shape[1], 1, -1, -1)
        conv = nn.functional.conv2d if direction == "down" else nn.functional.conv_transpose2d
        gain = 1 if direction == "down" else 4
        return conv(t, per_channel * gain, stride=2, padding=padding, groups=t.shape[1])

    if filter_last:
        y = nn.functional.conv2d(x, layer.weight, padding=same + pad)
        expected = filtered(y, 0) + layer.bias[:, None, None]
    else:
        expected = nn.functional.conv2d(filtered(x, pad), layer.weight, layer.bias, padding=same)
    assert layer(x).shape[-1] == (4 if direction == "down" else 16)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
    resampled = Resample(direction, taps).double()(x)
    assert torch.allclose(resampled, filtered(x, pad), rtol=1e-10, atol=1e-10)


def test_odd_filter_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        Resample("up", [1, 2, 1])


def test_group_norm_groups():
    assert [GroupNorm(c, 1e-5).num_groups for c in (4, 32, 128, 256)] == [1, 8, 32, 32]
    with pytest.raises(ValueError, match="144 channels"):
        GroupNorm(144, 1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    """Kept with probability 1 - p, independently, and scaled so that the mean stays."""
    keys = torch.randint(2**31, (9,), generator=torch.Generator().manual_seed(0))
    x = torch.ones(9, 31, 32, 33)
    y = dropout(x, p, keys, 3)
    kept = y != 0
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    flat = kept.flatten().double() - (1 - p)
    half = x[0].numel() // 2  # two mask elements share a random number
    for lag in (1, 2, 3, 4, 32, 33, half, half + 1, x[0].numel()):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 4 * p * (1 - p) / math.sqrt(x.numel() - lag)
    for place in range(4):
        assert abs(flat[place : flat.numel() // 4 * 4 : 4].mean().item()) < 8 * deviation
    assert dropout(torch.ones(3, 5, 7, 3), p, keys[:3], 0).shape == (3, 5, 7, 3)


def test_dropout_follows_from_key_and_layer_alone():
    x, keys = torch.ones(4, 16, 8, 8), torch.tensor([5, 9, 5, 2**31 - 1])
    mask = dropout(x, 0.5, keys, 1)
    assert torch.equal(mask[0], mask[2]) and not torch.equal(mask[0], mask[1])
    assert torch.equal(dropout(x[1:3], 0.5, keys[1:3], 1), mask[1:3])  # however a batch is split
    assert torch.equal(dropout(x.to(memory_format=torch.channels_last), 0.5, keys, 1), mask)
    assert torch.equal(dropout(x.double(), 0.5, keys, 1), mask.double())
    assert not torch.equal(dropout(x, 0.5, keys, 2), mask)
    agree = [((dropout(x, 0.5, keys, 1) > 0) == (dropout(x, 0.5, keys + k, layer) > 0)).double().mean().item()
             for k, layer in ((1, 1), (0, 2), (1, 2), (2**20, 1))]  # fmt: skip
    assert all(abs(share - 0.5) < 0.04 for share in agree)


def test_fourier_scale():
    torch.manual_seed(0)
    assert abs(FourierEmbedding(4000, 0.02).freqs.std().item() / 0.02 - 1) < 0.1
    assert abs(small(embedding_type="fourier", model_channels=128).map_noise.freqs.std().item() / 16 - 1) < 0.4
    settings = {"embedding_type": "fourier", "fourier_scale": 0.02, "model_channels": 128}
    assert small(**settings).map_noise.freqs.std().item() < 0.04


@torch.no_grad()
def test_attention_heads():
    """Two heads of 64; published weights order the outputs of qkv as (head, channel, q or k or v)."""
    block = small(DhariwalUNet, model_channels=128, channel_mult=[1], attn_resolutions=[8]).enc["8x8_block0"].double()
    assert block.num_heads == 2
    assert small(DhariwalUNet, model_channels=32, attn_resolutions=[8, 4]).enc["8x8_block0"].num_heads == 0  # as EDM
    x = torch.randn(2, 128, 3, 3, dtype=torch.float64)
    qkv = torch.einsum("oc,bcl->bol", block.qkv.weight[:, :, 0, 0], x.flatten(2)) + block.qkv.bias[:, None]
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, head * 192 + which : (head + 1) * 192 : 3] for which in range(3))
        weights = torch.einsum("bcq,bck->bqk", q, k / 8).softmax(dim=2)
        heads.append(torch.einsum("bqk,bck->bcq", weights, v))
    expected = (
        torch.einsum("oc,bcl->bol", block.proj.weight[:, :, 0, 0], torch.cat(heads, 1)) + block.proj.bias[:, None]
    )
    assert relative(block.attention(x).flatten(2), expected) < 1e-12


# The whole networks


@pytest.mark.parametrize("settings", [{}, NCSNPP, {"encoder_type": "skip", "decoder_type": "skip"}, {"adm": True}])
def test_initial_output_is_almost_zero(settings):
    """Last layers start at (almost) zero, the rest does not: a fresh F is close to 0 and its gradients reach it."""
    settings = {**settings}
    kind = DhariwalUNet if settings.pop("adm", False) else SongUNet
    torch.manual_seed(0)
    network = kind(16, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], **settings)
    x, sigma = batch(resolution=16)
    assert network(x, sigma.log() / 4).abs().max() < 1e-3
    block = network.enc["16x16_block0"]
    bound = math.sqrt(6 / (2 * 32 * 9)) if kind is SongUNet else math.sqrt(1 / (32 * 9))
    assert 0.98 * bound < block.conv0.weight.abs().max() <= bound
    assert block.conv1.weight.abs().max() <= 1e-5 * bound
    assert (block.conv0.bias.abs().max() == 0) == (kind is SongUNet)
    qkv = network.enc["8x8_block0"].qkv.weight
    bound = math.sqrt(0.2) * math.sqrt(6 / (4 * 64)) if kind is SongUNet else math.sqrt(1 / 64)
    assert 0.98 * bound < qkv.abs().max() <= bound


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_scale_shift_norm(kind):
    """The switch changes the embedding's outputs, and the scale multiplies: at scale -1, shift 0 the branch dies."""
    plain, scaled = (small(kind, scale_shift_norm=s).enc["8x8_block0"] for s in (False, True))
    assert scaled.affine.out_features == 2 * plain.affine.out_features
    with torch.no_grad():
        scaled.affine.weight.zero_()
        scaled.affine.bias.zero_()[: scaled.affine.out_features // 2] = -1
        x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
        dead = (x + scaled.conv1.bias[:, None, None]) * scaled.skip_scale
        assert torch.allclose(scaled(x, emb), dead, atol=1e-6)


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
@pytest.mark.parametrize(
    "channels, resolution, mult", [(1, 8, [1, 2, 2]), (3, 12, [1, 2]), (2, 20, [1, 1, 2]), (1, 5, [1])]
)
@torch.no_grad()
def test_resolutions_and_channels(kind, channels, resolution, mult):
    network = small(kind, resolution, channels, channel_mult=mult, attn_resolutions=[resolution])
    x, sigma = batch(2, channels, resolution)
    assert network(x, sigma).shape == x.shape
    with pytest.raises(ValueError, match="resolution 7 cannot be halved"):
        small(kind, 7, 3)


@pytest.mark.parametrize("settings", [{}, NCSNPP, {"encoder_type": "skip", "decoder_type": "skip"}])
@torch.no_grad()
def test_noise_level_is_per_sample(settings):
    """Samples do not see each other: a batch gives what its rows give one at a time, and sigma matters."""
    network = small(**settings)
    x, sigma = batch()
    together = network(x, sigma)
    alone = torch.cat([network(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert relative(network(x, sigma.flip(0)), together) > 1e-2


@torch.no_grad()
def test_residual_encoder_chain():
    """NCSN++: each level's input pyramid starts from the sum of the level above, not from the image."""
    network = small(**{**NCSNPP, "channel_mult": [1, 1, 1]})
    seen = {}

    def keep(name):
        network.enc[name].register_forward_hook(lambda module, given, out: seen.update({name: (given[0], out)}))

    for name in ("8x8_conv", "4x4_down", "4x4_aux_residual", "4x4_block0", "2x2_aux_residual"):
        keep(name)
    x, sigma = batch()
    network(x, sigma)
    assert torch.equal(seen["4x4_aux_residual"][0], x)
    total = (seen["4x4_down"][1] + seen["4x4_aux_residual"][1]) / math.sqrt(2)
    assert torch.allclose(seen["4x4_block0"][0], total)
    assert torch.allclose(seen["2x2_aux_residual"][0], total)


@torch.no_grad()
def test_label_scale():
    """DDPM++ scales one-hot labels by sqrt(label_dim) to unit variance; ADM does so in its initial weights."""
    for kind, scale in ((SongUNet, 2.0), (DhariwalUNet, 1.0)):
        network, seen = small(kind, label_dim=4), []
        network.map_label.register_forward_hook(lambda module, given, out, seen=seen: seen.append(given[0]))
        x, sigma = batch()
        network(x, sigma, torch.eye(4)[:3])
        assert torch.equal(seen[0], scale * torch.eye(4)[:3])


def test_unknown_architecture():
    with pytest.raises(ValueError, match="encoder_type is 'resnet'"):
        small(encoder_type="resnet")


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_dropout_only_in_training(kind):
    network = small(kind, dropout=0.5)
    x, sigma = batch()
    assert torch.equal(network(x, sigma), network(x, sigma))
    network.train()
    assert not torch.equal(network(x, sigma), network(x, sigma))
    state = torch.get_rng_state()
    first = network(x, sigma)
    torch.set_rng_state(state)
    assert torch.equal(network(x, sigma), first)


CONDITIONAL = {"label_dim": 4, "augment_dim": 9}


@pytest.mark.parametrize("kind, settings", [(SongUNet, {}), (SongUNet, NCSNPP), (DhariwalUNet, {"model_channels": 64})])
def test_layouts_and_attentions_agree(kind, settings):
    """channels_last against contiguous, fused against plain attention; outputs and gradients, in float64."""
    network = small(kind, **settings, **CONDITIONAL, attn_resolutions=[8, 4]).double()
    x, sigma = batch(2, dtype=torch.float64)
    labels, augment = torch.eye(4)[:2].double(), torch.randn(2, 9).double()

    def run(network, x):
        out = network(x, sigma, labels, augment)
        grads = torch.autograd.grad(out.square().sum(), [p for p in network.parameters()])
        return [out.detach(), *grads]

    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert last.enc["8x8_block0"].conv0.weight.is_contiguous(memory_format=torch.channels_last)
    expected = run(network, x)
    with plain_kernels():
        plain = run(network, x)
    for other in (run(last, x.to(memory_format=torch.channels_last)), plain):
        assert all(relative(a, b) < 1e-9 for a, b in zip(other, expected, strict=True))


@torch.no_grad()
def test_fused_and_plain_kernels_agree():
    """Beyond the length up to which a CPU takes the plain one anyway, two heads."""
    network = small(DhariwalUNet, 20, model_channels=128, channel_mult=[1], attn_resolutions=[20])
    x, sigma = batch(1, resolution=20)
    fused = network(x, sigma)
    with plain_kernels():
        plain = network(x, sigma)
    assert 0 < relative(plain, fused) < 1e-4  # not bit-equal: they are two implementations


@pytest.mark.parametrize("kind, settings", [(SongUNet, {}), (SongUNet, NCSNPP), (DhariwalUNet, {"model_channels": 64})])
@pytest.mark.parametrize("training, attention", [(False, [8, 4]), (True, [8, 4]), (False, [])])
def test_jvp_matches_finite_difference(kind, settings, training, attention):
    """Forward-mode derivative in x and sigma at once, and in sigma alone, with dropout's mask held fixed."""
    network = small(kind, **settings, dropout=0.2, label_dim=4, attn_resolutions=attention)
    model = Preconditioner(network).double().train(training)
    x, sigma = batch(2, dtype=torch.float64)
    labels = torch.eye(4)[:2].double()
    tangents = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double(), 0.3 * sigma

    def f(x, sigma):
        torch.manual_seed(5)
        return model.raw(x, sigma, labels)

    for dx, ds in (tangents, (torch.zeros_like(x), tangents[1])):
        with plain_kernels():
            value, jvp = torch.func.jvp(f, (x, sigma), (dx, ds))
        with torch.no_grad():
            assert relative(value, f(x, sigma)) < 1e-9
            h = 1e-5
            difference = (f(x + h * dx, sigma + h * ds) - f(x - h * dx, sigma - h * ds)) / (2 * h)
        assert relative(jvp, difference) < 1e-5
    with plain_kernels():
        only_sigma = torch.func.jvp(lambda s: f(x, s), (sigma,), (ds,))[1]
    assert relative(only_sigma, difference) < 1e-5


def test_plain_kernels_ends_after_an_error():
    with pytest.raises(RuntimeError), plain_kernels():
        raise RuntimeError
    assert not networks.layers._PLAIN


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_compiles_to_one_graph(kind):
    """No graph break in training or evaluation; the compiler itself is not run here."""
    network = small(kind, label_dim=4, dropout=0.1)
    x, sigma = batch(2)
    labels = torch.eye(4)[:2]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x, sigma, labels), network(x, sigma, labels), rtol=1e-4, atol=1e-4)
    network.train()
    compiled(x, sigma, labels).sum().backward()


# build


def song_cfg(**changes):
    settings = {
        "name": "song_unet",
        "precond": "cm",
        "c_noise": "log250",
        "sigma_data": 0.6,
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "fourier_scale": 0.02,
        "scale_shift_norm": True,
        **NCSNPP,
    }
    return {**settings, **changes}


def test_build():
    torch.manual_seed(3)
    model = networks.build(song_cfg(), resolution=8, channels=1, label_dim=10, augment_dim=9)
    assert (model.precond, model.c_noise) == ("cm", "log250")
    assert (model.sigma_data, model.sigma_min, model.sigma_max) == (0.6, 0.01, 50.0)
    assert (model.img_resolution, model.img_channels, model.label_dim, model.augment_dim) == (8, 1, 10, 9)
    assert isinstance(model.model, SongUNet)
    assert model.model.enc["8x8_block0"].scale_shift_norm
    x, sigma = batch(2, channels=1)
    assert model(x, sigma, torch.eye(10)[:2], torch.zeros(2, 9)).shape == x.shape
    torch.manual_seed(3)
    again = networks.build(song_cfg(), 8, 1, 10, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="resolution 9"):
        networks.build(song_cfg(), 9, 1, 0, 0)
