"""Flow maps' wrapper and networks: the change of clock, what is told of two times, forward mode, the DiT."""

import math

import pytest
import torch
from conftest import relative_error

import networks
from networks import MLP, DhariwalUNet, DiT, FlowMap, Preconditioner, SongUNet, Wrapper, dit
from networks.flow_map import columns

UNET = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
SMALL_DIT = {"hidden": 32, "depth": 3, "num_heads": 2, "head_blocks": 2}
IMF_DIT = {
    **SMALL_DIT, "norm": "rms", "mlp": "swiglu", "mlp_ratio": 8 / 3, "qk_norm": True, "positions": "rope",
    "conditioning": "prefix",
}  # fmt: skip
KINDS = {
    "song": lambda **more: SongUNet(8, 2, 2, 3, dropout=0.3, **UNET, **more),
    "adm": lambda **more: DhariwalUNet(8, 2, 2, 3, dropout=0.3, channels_per_head=8, **UNET, **more),
    "dit": lambda **more: DiT(8, 2, 2, 3, **SMALL_DIT, **more),
    "imf": lambda **more: DiT(8, 2, 2, 3, **IMF_DIT, **more),
    "mlp": lambda **more: MLP((2, 8, 8), 0, width=16, depth=1, **more),
}
T = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
R = torch.tensor([0.3, 0.2, 0.0], dtype=torch.float64)
KEYS = torch.tensor([3, 1, 4])


def stirred(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every weight changed: fresh last layers are 0 or almost."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.15)
    return module


def flow_map(
    kind: str = "song", times: str = "t,t-r", heads: int = 1, guidance_inputs: bool = False, **more
) -> FlowMap:
    torch.manual_seed(0)
    net = KINDS[kind](told=columns(times, guidance_inputs), heads=heads)
    model = FlowMap(net, times, heads=heads, guidance_inputs=guidance_inputs, **more)
    return stirred(model).double().train()


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))


def labels_of(model: FlowMap) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.eye(3).double()} if model.label_dim else {}


class Echo(torch.nn.Module):
    """A network that remembers what it was given and returns twice its input, minus the input as a second head."""

    label_dim = 5

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.heads, self.weight = heads, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        self.x, self.told, self.labels = x, c_noise, class_labels
        return torch.cat([2 * x, -x][: self.heads], dim=1)


# The wrapper


@pytest.mark.parametrize("times, told", [
    ("t", lambda t, r: t),
    ("t,t-r", lambda t, r: torch.stack([t, t - r], 1)),
    ("t,r", lambda t, r: torch.stack([t, r], 1)),
    ("t-r", lambda t, r: t - r),
])  # fmt: skip
def test_the_network_is_given_z_and_told_the_times_raw(times, told):
    z, _ = batch()
    model = FlowMap(Echo(), times)
    assert model.clock == "time"
    assert isinstance(model, Wrapper)
    assert torch.equal(model(z, T, R), 2 * z)
    assert torch.equal(model.model.x, z)
    assert torch.equal(model.model.told, told(T, R))
    assert torch.equal(model.model.labels, torch.zeros(3, 5).double())  # None is the null label


def test_guidance_and_its_interval_are_told():
    z, _ = batch()
    model = FlowMap(Echo(), "t-r", guidance_inputs=True)
    model(z, T, R)
    null = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(3, 3)
    assert torch.equal(model.model.told, torch.cat([(T - R)[:, None], null], 1))
    w, interval = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0.0, 1.0], [0.1, 0.9], [0.25, 0.5]])
    model(z, T, R, guidance=w, interval=interval)
    expected = torch.tensor([[0, 0, 1], [0.5, 0.1, 0.9], [0.75, 0.25, 0.5]], dtype=torch.float64)
    assert torch.allclose(model.model.told[:, 1:], expected, atol=1e-7)
    model(z, T, R, guidance=4.0, interval=(0.25, 0.5))  # the same for all
    assert torch.equal(model.model.told[:, 1:], expected[2].expand(3, 3))


def test_heads_are_the_first_and_the_second_channels():
    z, _ = batch()
    u, v = FlowMap(Echo(2), heads=2).both(z, T, R)
    assert torch.equal(u, 2 * z)
    assert torch.equal(v, -z)
    assert torch.equal(FlowMap(Echo(2), heads=2)(z, T, R), 2 * z)
    u, du = FlowMap(Echo(2), heads=2).jvp(z, T, R, 3 * z, 0 * T, 0 * T)
    assert torch.equal(u, 2 * z)
    assert torch.equal(du, 6 * z)


def test_the_arithmetic_is_float32_or_wider():
    z, _ = batch()
    model = FlowMap(Echo()).float()
    assert model(z.bfloat16(), T, R).dtype == torch.float32
    assert model(z, T, R).dtype == torch.float64


@pytest.mark.parametrize("kind", ["song", "adm", "dit", "imf", "mlp"])
@pytest.mark.parametrize("c_noise", ["log", "log250", "t"])
@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
@pytest.mark.parametrize("precond", ["edm", "trigflow"])
def test_a_denoisers_weights_are_its_velocity_where_r_is_t(precond, sigma_data, c_noise, kind):
    """v = (z - D(z / (1 - t); t / (1 - t))) / t, whatever the step t - r says to a network that is told t alone."""
    torch.manual_seed(0)
    settings = {"precond": precond, "c_noise": c_noise, "sigma_data": sigma_data}
    denoiser = stirred(Preconditioner(KINDS[kind](), **settings)).double().eval()
    model = FlowMap(denoiser.model, "t", **settings).eval()
    t = torch.linspace(0.01, 0.98, 12, dtype=torch.float64)
    z = torch.randn(12, 2, 8, 8, dtype=torch.float64)
    labels = {"class_labels": torch.eye(3).double().repeat(4, 1)} if model.label_dim else {}
    s, at = t / (1 - t), t[:, None, None, None]
    expected = (z - denoiser(z / (1 - at), s, **labels)) / at
    with torch.no_grad():
        assert relative_error(model(z, t, t, **labels), expected) < 1e-10
    assert torch.equal(model(z, t, 0 * t, **labels), model(z, t, t, **labels))  # times: t


@pytest.mark.parametrize("precond", ["edm", "trigflow", "flow"])
def test_both_ends_of_the_path_are_finite(precond):
    """sigma = t / (1 - t) has no end; the label stops at sigma_max, and nothing is divided by t or 1 - t."""
    model = FlowMap(KINDS["song"](told=2), precond=precond, c_noise="time" if precond == "flow" else "log").double()
    z, dz = batch()
    t, r = torch.tensor([0.0, 1.0, 1.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    u, du = model.jvp(z, t, r, dz, torch.ones_like(t), torch.zeros_like(t))
    assert u.isfinite().all()
    assert du.isfinite().all()
    if precond != "flow":
        assert torch.allclose(model.time_label(t), torch.tensor([1e-8, 80.0, 80.0]).double().log() / 4)


@pytest.mark.parametrize("kind", [*KINDS])
def test_labels_and_r_are_heard(kind):
    z, _ = batch()
    model = flow_map(kind).eval()
    u = model(z, T, R)
    assert (model(z, T, R + 0.1) - u).abs().amax((1, 2, 3)).min() > 1e-5
    assert (model(z, T - 0.1, R - 0.1) - u).abs().amax((1, 2, 3)).min() > 1e-5  # t is told too, not t - r alone
    alone = flow_map(kind, "t-r").eval()
    assert torch.allclose(alone(z, T, R), alone(z, T - 0.1, R - 0.1), atol=1e-12)
    if model.label_dim:
        assert torch.equal(model(z, T, R, class_labels=torch.zeros(3, 3)), u)
        assert (model(z, T, R, class_labels=torch.eye(3)) - u).abs().amax((1, 2, 3)).min() > 1e-5


@pytest.mark.parametrize("kind", [*KINDS])
def test_columns_are_embedded_in_order(kind):
    """Told (t, t - r), a network whose second number has no weight hears t, and the other way round."""
    z, _ = batch()
    for silent, moved in ((1, (T, R + 0.1)), (0, (T + 0.05, R + 0.05))):
        model = flow_map(kind).eval()
        net = model.model
        with torch.no_grad():
            if hasattr(net, "map_layers"):
                for p in net.map_layers[silent].parameters():
                    p.zero_()
            else:
                net.map_layer0.weight.chunk(2, dim=1)[silent].zero_()
        u = model(z, T, R)
        assert torch.allclose(model(z, *moved), u, atol=1e-12)
        other = (T + 0.05, R + 0.05) if silent else (T, R + 0.1)
        assert not torch.allclose(model(z, *other), u, atol=1e-6)


SHAPES = [
    ("t,t-r", 1, False, {}), ("t,r", 1, False, {}), ("t-r", 2, True, {}), ("t", 1, False, {}),
    ("t,t-r", 2, True, {"precond": "edm", "c_noise": "log"}),
    ("t,r", 1, False, {"precond": "trigflow", "c_noise": "t", "sigma_data": 0.8}),
]  # fmt: skip


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case[0]}-{case[1]}-{case[3].get('precond', 'flow')}")
@pytest.mark.parametrize("kind", [*KINDS])
def test_the_derivative_is_that_of_finite_differences(kind, case):
    """In all three directions at once, with dropout on, labels, and guidance where it is told."""
    times, heads, guidance_inputs, more = case
    model = flow_map(kind, times, heads, guidance_inputs, **more)
    z, dz = batch()
    dt, dr = torch.tensor([1.0, 0.5, -0.7]).double(), torch.tensor([0.3, 1.0, -0.2]).double()
    given = {**labels_of(model), "dropout_keys": KEYS}
    if guidance_inputs:
        given |= {
            "guidance": torch.tensor([1.0, 2.0, 8.0]),
            "interval": torch.tensor([[0.0, 1.0], [0.2, 0.7], [0.4, 0.9]]),
        }
    with torch.no_grad():
        u, du = model.jvp(z, T, R, dz, dt, dr, **given)
        h = 1e-5
        up, down = (model(z + s * dz, T + s * dt, R + s * dr, **given) for s in (h, -h))
        assert relative_error(du, (up - down) / (2 * h)) < 1e-7
        assert relative_error(u, model(z, T, R, **given)) < 1e-12
        if heads == 2:
            assert relative_error(model.both(z, T, R, **given)[0], u) < 1e-12


@pytest.mark.parametrize("kind", [*KINDS])
def test_in_bf16_the_derivative_errs_by_rounding_alone(kind):
    model = flow_map(kind)
    z, dz = batch()
    given = {**labels_of(model), "dropout_keys": KEYS}
    with torch.no_grad():
        exact = model.jvp(z, T, R, dz, torch.ones_like(T), torch.zeros_like(T), **given)
        model.float().autocast = torch.bfloat16
        given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
        z, dz = z.float(), dz.float()
        half = model.jvp(z, T, R, dz, torch.ones_like(T), torch.zeros_like(T), **given)
        assert relative_error(half[0].double(), model(z, T, R, **given).double()) < 2e-2
    for near, value in zip(half, exact, strict=True):
        assert near.dtype == torch.float32
        assert 1e-5 < relative_error(near.double(), value) < 3e-2


def test_the_compiled_derivative_is_the_same():
    """Of the DiT; the UNets' is test_masks.py's."""
    torch.manual_seed(0)
    network = DiT(8, 2, 2, 3, **{**IMF_DIT, "depth": 1, "head_blocks": 1}, told=4, heads=2)
    model = stirred(FlowMap(network, "t-r", heads=2, guidance_inputs=True)).train()
    z, dz = (v.float() for v in batch())
    given = {"class_labels": torch.eye(3), "guidance": torch.tensor([1.0, 2.0, 8.0])}
    places = (z, T, R, dz, torch.ones_like(T), torch.zeros_like(T))
    with torch.no_grad():
        eager = model.jvp(*places, **given)
        model.compiled_jvp = torch.compile(model.network_jvp, dynamic=False, backend="aot_eager")
        compiled = model.jvp(*places, **given)
    for a, b in zip(compiled, eager, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("make, said", [
    (lambda z: FlowMap(Echo(), "t,s"), "times is 't,s'"),
    (lambda z: FlowMap(Echo(), precond="cm"), "precond is 'cm'; a flow map's must be"),
    (lambda z: FlowMap(Echo(), c_noise="sigma"), "c_noise is 'sigma'"),
    (lambda z: FlowMap(Echo(), "t-r", "edm", "log"), "with times 't-r' it must be time"),
    (lambda z: FlowMap(KINDS["song"](), "t,t-r"), "is told 1 numbers a sample, and times 't,t-r' has 2"),
    (lambda z: FlowMap(Echo())(z, T, R, guidance=2.0), "not told guidance"),
    (lambda z: FlowMap(Echo()).jvp(z, T, R, z, T, R, interval=(0, 1)), "not told guidance"),
    (lambda z: FlowMap(Echo(), guidance_inputs=True)(z, T, R, guidance=torch.ones(2)), r"guidance has shape \(2,\)"),
    (lambda z: FlowMap(Echo())(z, T, R, torch.ones(3, 4)), r"class_labels has shape \(3, 4\); this network needs"),
    (lambda z: FlowMap(Echo()).both(z, T, R), "one head"),
    (lambda z: KINDS["song"](told=2)(z.float(), T), r"c_noise has shape \(3,\); this network needs \(B, 2\)"),
    (lambda z: KINDS["mlp"]()(z.float(), torch.ones(3, 2)), r"c_noise has shape \(3, 2\); this network needs \(B,\)"),
])  # fmt: skip
def test_what_does_not_fit_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make(batch()[0])


# Networks


def test_the_published_cifar10_network():
    """MeanFlow's and SoFlow's DDPM++: embeddings of 256 channels of t and t - r side by side."""
    settings = {"precond": "flow", "c_noise": "time", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    settings |= {"name": "song_unet", "channel_mult": [2, 2, 2], "channel_mult_noise": 2, "dropout": 0.2}
    settings |= {"resample_filter": [1, 3, 3, 1], "times": "t,t-r", "heads": 1, "guidance_inputs": False}
    model = networks.build(settings, resolution=32, channels=3, augment_dim=6)
    assert model.model.map_layer0.weight.shape == (512, 2 * 256)
    assert model.model.map_augment.weight.shape == (512, 6)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(55.9e6, rel=0.01)


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
def test_vectors_have_two_heads_and_a_condition(shape):
    torch.manual_seed(0)
    model = stirred(FlowMap(MLP(shape, 2, width=16, depth=1, told=2, heads=2), heads=2))
    z, t = torch.randn(4, *shape), torch.rand(4)
    u, v = model.both(z, t, t / 2, condition=torch.randn(4, 2))
    assert u.shape == v.shape == z.shape
    assert not torch.allclose(u, v)


@pytest.mark.parametrize("settings, millions", [
    ({"patch_size": 4}, 130),  # DiT-B/4
    ({"patch_size": 2}, 130),  # DiT-B/2
    ({"patch_size": 4, "told": 2}, 131),  # MeanFlow's B/4
    ({"hidden": 1152, "depth": 28, "num_heads": 16}, 675),  # DiT-XL/2
    ({**IMF_DIT, "hidden": 768, "depth": 12, "num_heads": 12, "told": 4}, 89),  # iMF-B/2 when it samples
])  # fmt: skip
def test_sizes_are_the_published_ones(settings, millions):
    """Of ImageNet-256 latents, 4 x 32 x 32 (2212.09748 tab. 1; 2505.13447 tab. 4; 2512.02012 tab. 4)."""
    with torch.device("meta"):
        network = DiT(32, 4, 4, 1000, **settings)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


@pytest.mark.parametrize("kind", ["dit", "imf"])
def test_a_fresh_dit_gives_zero_and_every_weight_can_learn(kind):
    torch.manual_seed(0)
    network = KINDS[kind](told=2, heads=2, augment_dim=4)
    x = torch.randn(3, 2, 8, 8)
    given = torch.rand(3, 2), torch.eye(3), torch.randn(3, 4)
    assert network(x, *given).eq(0).all()
    stirred(network)(x, *given).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("kind", ["dit", "imf"])
def test_a_dit_knows_where_a_patch_stands(kind):
    """Two patches changed places: without positions only the outputs would have."""
    network = stirred(KINDS[kind]())
    x = torch.randn(1, 2, 8, 8)
    swapped = x.clone()
    swapped[..., :2, :2], swapped[..., 6:, 4:6] = x[..., 6:, 4:6], x[..., :2, :2]
    out, other = network(x, torch.zeros(1)), network(swapped, torch.zeros(1))
    other[..., :2, :2], other[..., 6:, 4:6] = other[..., 6:, 4:6].clone(), other[..., :2, :2].clone()
    assert (out - other).abs().max() > 1e-3


def test_a_dit_of_no_square():
    """Patches go back to where they came from, rows and columns apart; what does not split is refused."""
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = torch.nn.functional.unfold(x.double(), 2, stride=2).transpose(1, 2)  # (C, p, p) of each, row by row
    patches = patches.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(dit.pixels(patches, 2, 3, 2), x.double())
    places = dit.sincos(2, 3, 16, torch.device("cpu"))
    angle = [torch.tensor([n * 1e-4 ** (i / 4) for i in range(4)]) for n in (1, 2)]
    assert torch.allclose(places[5], torch.cat([angle[0].sin(), angle[0].cos(), angle[1].sin(), angle[1].cos()]))
    network = stirred(KINDS["dit"]())
    wide = torch.randn(1, 2, 4, 12)
    assert network(wide, torch.zeros(1)).shape == wide.shape
    turned = network(wide.transpose(2, 3), torch.zeros(1)).transpose(2, 3)
    assert not torch.allclose(network(wide, torch.zeros(1)), turned, atol=1e-3)
    with pytest.raises(ValueError, match="8x7 pixels does not split into patches of 2x2"):
        network(torch.randn(1, 2, 8, 7), torch.zeros(1))
    with pytest.raises(ValueError, match="9x9 pixels does not split"):
        DiT(9, 2, 2, **SMALL_DIT)


def test_rope_tells_distances():
    """The product of a query at place i and a key at j depends on i - j alone, and on it."""
    q, k = (torch.randn(8).double().expand(1, 12, 1, 8) for _ in range(2))
    turn = dit.angles(12, 8, torch.device("cpu"))[:, None]
    turn = torch.stack([turn.cos(), turn.sin()])
    products = torch.einsum("bihc,bjhc->ij", dit.rotated(q, turn), dit.rotated(k, turn))
    assert torch.allclose(products[2:, 2:], products[:-2, :-2], atol=1e-5)
    assert products[0].std() > 1e-2


def test_the_first_head_alone_is_the_first_of_both():
    network = stirred(KINDS["imf"](told=1, heads=2)).double()
    z, _ = batch()
    both, first = network(z, T), network(z, T, first=True)
    assert torch.allclose(both[:, :2], first, atol=1e-12)
    assert not torch.allclose(both[:, 2:], first, atol=1e-2)
    assert len(network.blocks) == 3
    assert len(network.blocks_2) == 2


def test_recomputed_blocks_give_the_same_gradient():
    z, _ = batch()
    model = flow_map("dit")
    gradients = []
    for recompute in (False, True):
        for block in model.model.blocks:
            block.checkpointing = recompute
        model.zero_grad()
        model(z, T, R).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("wrong, said", [
    ({"hidden": 30}, "hidden 30 does not split into 2 heads"),
    ({"num_heads": 3}, "hidden 32 does not split into 3 heads"),
    ({"heads": 2, "head_blocks": 4}, "head_blocks 4 is more than the depth 3"),
    ({"norm": "batch"}, "norm is 'batch'"),
])  # fmt: skip
def test_a_wrong_dit_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        DiT(8, 2, 2, **{**SMALL_DIT, **wrong})


def test_rms_norm():
    x = torch.randn(2, 5, 8) * torch.tensor([1e-2, 1e2])[:, None, None]
    norm = dit.RMSNorm(8, affine=True)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(8.0)
    assert torch.allclose(norm(x), expected, rtol=1e-5)
    assert math.isclose(float(dit.RMSNorm(8, affine=False)(x[1]).square().mean()), 1, rel_tol=1e-4)
