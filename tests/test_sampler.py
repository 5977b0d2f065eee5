"""Samplers against the original code, and the promises about seeds."""

import pytest
import torch
from conftest import golden, relative_error

import config
import networks
import sampler
from objectives.draws import key, sample_noise
from sampling import drawing, plan
from sources.codecs import ImageCodec
from sources.images import draw_labels

CASE = golden("samplers")


def denoiser(x, sigma):
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (0.36 * x / (0.36 + s**2)).clamp(-1, 1)


@pytest.mark.parametrize("name", [k[:-7] for k in CASE if k.startswith("multistep") and k.endswith("_sigmas")])
def test_multistep_matches_the_original(name):
    sigmas = CASE[f"{name}_sigmas"][
        :-1
    ].tolist()  # the last is sigma_min, where the original adds and evaluates nothing
    x = sampler.multistep(denoiser, CASE["z"], sigmas, lambda i: CASE["noises"][i - 1])
    assert relative_error(x, CASE[name]) < 1e-6


def test_heun_matches_the_original():
    x = sampler.heun(denoiser, CASE["z"], CASE["karras_sigmas18"][:18].tolist())
    assert relative_error(x, CASE["heun18"]) < 1e-6


def test_heun_evaluates_twice_per_step_but_the_last():
    calls = []
    sampler.heun(lambda x, s: calls.append(float(s[0])) or x, torch.zeros(1, 2), [80.0, 5.0, 0.1])
    assert calls == pytest.approx([80, 5, 5, 0.1, 0.1])


def small(label_dim=0):
    torch.manual_seed(0)
    net = networks.SongUNet(8, 1, 1, label_dim=label_dim, model_channels=8, channel_mult=[1], num_blocks=1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = networks.Preconditioner(net).eval()
    model.codec = ImageCodec(8, 1, label_dim)
    return model


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 0.8], [80.0, 5.0, 0.5]])
def test_a_sample_does_not_depend_on_its_batch(sigmas):
    model = small(label_dim=3)
    labels = draw_labels(4, range(10), [5, 3, 2])
    whole = torch.cat(list(drawing.generate(model, 4, range(10), sigmas, given=labels, batch_size=10)))
    parts = torch.cat(list(drawing.generate(model, 4, range(10), sigmas, given=labels, batch_size=3)))
    one = torch.cat(list(drawing.generate(model, 4, [7], sigmas, given=labels[7:8])))
    assert (whole - parts).abs().max() < 1 / 255 and (whole[7:8] - one).abs().max() < 1 / 255
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_the_noise_of_later_steps_is_new():
    a, b = sample_noise(0, range(1000), (4,)), sample_noise(0, range(1000), (4,), "step 1")
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.06
    assert abs(a.mean()) < 0.06 and abs(a.std() - 1) < 0.05
    assert torch.equal(sample_noise(0, [5], (4,)), a[5:6]) and not torch.equal(sample_noise(1, [5], (4,)), a[5:6])


def test_every_evaluation_of_a_sample_sees_noise_of_its_own():
    seen = []

    class Nothing(torch.nn.Module):
        shape, sigma_min = (1, 16, 16), 0.3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, sigma, class_labels=None):
            seen.append(x.flatten())
            return torch.zeros_like(x)

    next(drawing.generate(Nothing(), 0, range(50), [80.0, 5.0, 0.5]))
    assert [float(x.std()) for x in seen] == pytest.approx([80, (25 - 0.09) ** 0.5, 0.4], rel=0.03)
    assert (torch.corrcoef(torch.stack(seen)) - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("solver", ["multistep", "heun"])
def test_a_sample_is_of_the_class_asked_for(solver):
    model = small(label_dim=3)

    def draw(*labels):
        return next(drawing.generate(model, 0, range(3), [80.0, 0.8], solver, torch.tensor(labels)))

    mixed = draw(0, 1, 2)
    assert all((mixed[i] - draw(i, i, i)[i]).abs().max() < 1 / 255 for i in range(3))
    assert (draw(0, 0, 0) - draw(1, 1, 1)).abs().max() > 0.05


def test_labels_follow_the_training_set():
    labels = draw_labels(0, range(6000), [100, 0, 200, 300])
    shares = torch.bincount(labels, minlength=4) / 6000
    assert shares[1] == 0 and torch.allclose(shares, torch.tensor([1, 0, 2, 3]) / 6, atol=0.03)


def test_key_is_stable_across_machines_and_versions():
    assert key(0, "start", 1) == 4926927310973173828 and key(0, "start", 1) != key(1, "start", 0)


def test_levels():
    assert sampler.levels(1) == [80.0] and sampler.levels(2) == [80.0, 0.821]
    assert sampler.levels(2, given=[80.0, 1.5, 0.3]) == [80.0, 1.5]
    four = sampler.levels(4, 80.0, 0.002, given=[80.0, 1.0])
    assert len(four) == 4 and four[0] == pytest.approx(80) and four == sorted(four, reverse=True) and four[-1] > 0.01


def test_plan_takes_heun_for_a_denoiser():
    edm = config.parse({"objective": {"name": "edm"}, "sample": {"heun_steps": 5}})
    levels, solver = plan.plan(edm)
    assert solver == "heun" and len(levels) == 5 and levels[-1] == pytest.approx(0.002)
    assert plan.plan(config.Config(), 1) == ([80.0], "multistep")


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_tcm_is_sampled_only_where_it_was_trained(steps):
    cfg = config.parse({"objective": {"name": "tcm", "t_prime": 1.0, "teacher": "x.ckpt"}})
    levels, _ = plan.plan(cfg, steps)
    assert len(levels) == steps and levels[0] == pytest.approx(80) and min(levels) >= 1.0


def test_guidance_mixes_the_model_with_and_without_labels():
    model = small(label_dim=3)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 1.0]), torch.eye(3)[:2]
    with torch.no_grad():
        null, own = model(x, sigma), model(x, sigma, class_labels=labels)
        mixed = sampler.guided(model, 2.5)(x, sigma, class_labels=labels)
    assert not torch.allclose(null, own) and torch.allclose(mixed, null + 2.5 * (own - null))
    assert sampler.guided(model, 1) is model and sampler.guided(model, None) is model
    draw = lambda w: next(drawing.generate(model, 0, range(4), [80.0], given=torch.zeros(4).long(), guidance=w))  # noqa: E731
    assert torch.equal(draw(None), draw(1)) and not torch.equal(draw(None), draw(3))
