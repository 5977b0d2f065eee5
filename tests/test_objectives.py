"""Objectives against the original code's per-sample losses, and the properties that wrong versions break."""

import math

import pytest
import torch
from conftest import analytic, golden, relative_error

import networks
from objectives import losses
from objectives.common import append_dims
from objectives.ct import ConsistencyTraining, snr_weight
from objectives.draws import Draws
from objectives.ect import EasyConsistencyTuning
from objectives.edm import EDM
from objectives.ict import ImprovedConsistencyTraining
from objectives.schedules import ict_index_probabilities
from objectives.scm import ContinuousConsistency, network
from objectives.tcm import TruncatedConsistency
from sampler import karras_sigmas

CT = golden("ct_losses")
ECT = golden("ect_losses")


def per_sample(objective, model, x, **given):
    """The loss of each sample."""
    return objective(model, x, **given).loss.detach()


def test_edm_matches_the_original():
    loss = per_sample(EDM(), analytic(), CT["x0"], sigma=CT["edm_sigma"], noise=CT["noise"])
    assert relative_error(loss, CT["edm_loss_karras"]) < 1e-6


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("weighting", ["uniform", "snr", "snr+1", "karras", "truncated-snr"])
def test_ct_matches_the_original(metric, weighting):
    objective, index = ct_on_the_golden_grid(metric, weighting)
    loss = per_sample(objective, analytic(1.0, "cm"), CT["x0"], index=index, noise=CT["noise"])
    assert relative_error(loss, CT[f"loss_{weighting}_{metric}"]) < 1e-6


def ct_on_the_golden_grid(metric, weighting):
    """CT whose grid holds the golden pairs, and the pairs' indices counted from sigma_min."""
    objective = ConsistencyTraining(analytic(0.9, "cm"), 100, losses.build(metric), weighting=weighting)
    for N in range(2, 400):
        grid = karras_sigmas(N).flip(0)
        index = N - 2 - CT["indices"]
        if index.min() >= 0 and torch.allclose(grid[index + 1], CT["sigma_t"], rtol=1e-9):
            assert torch.allclose(grid[index], CT["sigma_next"], rtol=1e-9)
            objective.levels = lambda step, N=N: N
            return objective, index
    raise AssertionError("no Karras grid holds the golden noise levels")


@pytest.mark.parametrize("key", [k[:-2] for k in ECT if k.endswith("_t")])
def test_ect_matches_the_original(key):
    q, stage, c, mapping = key.split("_")
    objective = EasyConsistencyTuning(1, float(q[1:]), mapping, huber_c=float(c[1:]))
    objective.stage = lambda step: int(stage[5:])
    loss = per_sample(objective, analytic(), ECT["x0"], t=ECT[f"{key}_t"], noise=ECT[f"{key}_eps"])
    assert relative_error(loss, ECT[f"{key}_loss"]) < 1e-6


def test_ict_is_the_papers_formula():
    """Written out from 2310.14189 eqs. 6-7, apart from the code under test."""
    x, noise, model = CT["x0"], CT["noise"], analytic(1.0, "cm")
    objective = ImprovedConsistencyTraining(total_steps=100)
    index = torch.arange(6)
    loss = per_sample(objective, model, x, index=index, noise=noise)
    s = karras_sigmas(11).flip(0)
    high, low = s[index + 1], s[index]
    a, b = model(x + append_dims(high, x) * noise, high), model(x + append_dims(low, x) * noise, low)
    c = 0.00054 * math.sqrt(3 * 8 * 8)
    expected = (((a - b) ** 2).sum((1, 2, 3)) + c**2).sqrt() - c
    assert relative_error(loss, expected.detach() / (high - low)) < 1e-9


def test_ict_draws_pairs_by_their_probability():
    objective = ImprovedConsistencyTraining(total_steps=100)
    seen = []
    model = lambda x, sigma: seen.append(sigma) or x  # noqa: E731
    objective(model, torch.zeros(40_000, 1), draws=Draws(3, 40_000))
    sigmas = karras_sigmas(11).flip(0)
    index = torch.bucketize(seen[0].double(), sigmas[1:] * 0.999) - 1
    counts = torch.bincount(index, minlength=10) / 40_000
    assert (counts - ict_index_probabilities(sigmas, -1.1, 2.0)).abs().max() < 0.01


def test_edm_and_ect_draw_their_log_normal():
    seen = []
    model = lambda x, sigma: seen.append(sigma.log()) or x  # noqa: E731
    x = torch.ones(40_000, 1)
    EDM()(model, x, draws=Draws(0, 40_000))
    EasyConsistencyTuning(math.inf)(model, x, draws=Draws(0, 40_000))
    for ln, mean, std in ((seen[0], -1.2, 1.2), (seen[1], -1.1, 2.0)):
        assert ln.mean().item() == pytest.approx(mean, abs=0.04) and ln.std().item() == pytest.approx(std, abs=0.03)


def test_ect_grows_a_stage_per_interval():
    objective = EasyConsistencyTuning(steps_per_stage=12.5)
    assert [objective.stage(k) for k in (0, 12, 13, 24, 25, 100)] == [0, 0, 1, 1, 2, 8]
    assert EasyConsistencyTuning(math.inf).stage(10**9) == 0


def test_ect_never_divides_by_a_gap_that_float32_cannot_hold():
    for q in (2.0, 4.0, 256.0, 4096.0):
        out = EasyConsistencyTuning(1, q)(lambda x, s: x, torch.ones(64, 3), step=10**6, draws=Draws(0, 64))
        assert torch.isfinite(out.loss).all() and out.log["gap"] > 2**-21


def test_ct_target_follows_mu_of_k():
    student = analytic(1.0, "cm")
    objective = ConsistencyTraining(student, 100, losses.l2, s0=2, s1=150, mu0=0.9)
    with torch.no_grad():
        student.model.a.fill_(2.0)
    objective.after_step(student, step=0)
    assert objective.target.model.a.item() == pytest.approx(0.81 * 1.0 + 0.19 * 2.0)
    assert not objective.target.model.a.requires_grad
    assert objective.target_decay(99) > 0.99


@pytest.mark.parametrize("name", ["ct", "ict", "ect", "tcm"])
def test_no_gradient_flows_through_the_target(name):
    kind = {"ct": "cm", "ict": "cm"}.get(name, "edm")
    model = analytic(0.7, kind)
    objective = make(name, model)
    x = CT["x0"]
    objective(model, x, step=50, draws=Draws(0, 6)).loss.mean().backward()
    got = model.model.a.grad.clone()
    eps = 1e-6
    losses_at = []
    for shift in (eps, -eps):  # the student's parameter moves, the target's, which is asked second, does not
        passes = iter([analytic(0.7 + shift, kind), analytic(0.7, kind)])
        both = lambda x, s, passes=passes: next(passes)(x, s)  # noqa: E731
        losses_at.append(objective(both, x, step=50, draws=Draws(0, 6)).loss.mean().item())
    assert got.item() == pytest.approx((losses_at[0] - losses_at[1]) / (2 * eps), rel=1e-5)


def test_the_tangent_of_scm_has_no_gradient():
    """2410.11081 eq. 8: the gradient is that of e^w/d |F - sg(F + g)|^2, F^- and g being what F's parameter gives."""
    model, seen = analytic(0.7, "trigflow"), []
    objective = ContinuousConsistency(warmup=1)
    real = objective.tangent
    objective.tangent = lambda *a: (lambda F, g: seen.append(g) or (F, g))(*real(*a))
    out = objective(
        model, CT["x0"], step=50, draws=Draws(0, 6), t=(t := torch.linspace(0.1, 1.5, 6).double()), noise=CT["noise"]
    )
    out.loss.mean().backward()
    u = (append_dims(t.cos(), CT["x0"]) * CT["x0"] + append_dims(t.sin(), CT["x0"]) * 0.5 * CT["noise"]) / 0.5
    other = analytic(0.7, "trigflow")
    F = network(other, u, t, 0.5, {})
    g = seen[0] / append_dims(seen[0].flatten(1).norm(dim=1) + 0.1, u)
    (F - (F + g).detach()).square().mean().backward()  # w(t) is 0 at the start
    assert model.model.a.grad.item() == pytest.approx(other.model.a.grad.item(), rel=1e-9)


def make(name, model, steps=100):
    return {
        "edm": lambda: EDM(),
        "ct": lambda: ConsistencyTraining(model, steps, losses.l2),
        "ict": lambda: ImprovedConsistencyTraining(steps),
        "ect": lambda: EasyConsistencyTuning(steps / 8),
        "tcm": lambda: TruncatedConsistency(analytic(0.9)),
        "sct": lambda: ContinuousConsistency(warmup=1),
    }[name]()


@pytest.mark.parametrize("name", ["ct", "ict", "ect", "tcm"])
def test_both_passes_share_noise_and_dropout_mask(name):
    """A network of dropout alone shows each pass's mask, and (x_t - x) / t its noise."""
    masks, noises = [], []
    x = torch.full((64, 1, 4, 4), 0.5)

    class Dropping(torch.nn.Module):
        def forward(self, y, sigma):
            masks.append(torch.nn.functional.dropout(torch.ones(64, 100), 0.5, training=True))
            noises.append((y - x) / append_dims(sigma, x))
            return y

    model = Dropping()
    objective = make(name, model)
    before = torch.get_rng_state()
    objective(model, x, step=99, draws=Draws(0, 64))
    assert len(masks) == 2 and torch.equal(masks[0], masks[1]) and 0.4 < (masks[0] > 0).float().mean() < 0.6
    assert torch.allclose(noises[0], noises[1], atol=1e-2)
    after = torch.get_rng_state()  # as after one pass: the next step draws a new mask
    torch.set_rng_state(before)
    torch.nn.functional.dropout(torch.ones(64, 100), 0.5, training=True)
    assert torch.equal(after, torch.get_rng_state())


def test_shared_mask_in_a_real_network():
    """With the pair's two levels made equal the loss of a dropout network is exactly zero only under one mask."""
    torch.manual_seed(0)
    net = networks.SongUNet(
        8, 1, 1, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.5
    )
    with torch.no_grad():  # EDM starts the last layers at almost 0: make them count
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = networks.Preconditioner(net).train()
    objective = EasyConsistencyTuning(1)
    objective.stage = lambda step: 50  # t - r is far below rounding: both passes see the same input
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    t = torch.full((4,), 1.0, dtype=torch.float64)
    D = []
    model.register_forward_hook(lambda module, args, out: D.append(out.detach()))
    objective(model.double(), x, t=t, noise=torch.randn_like(x))
    assert torch.allclose(D[0], D[1], atol=1e-9)
    assert (model(x, t) - model(x, t)).abs().max() > 1e-3  # dropout is at work


def test_weights_by_snr():
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert snr_weight("truncated-snr", sigma, 0.5).tolist() == [4.0, 1.0]
    assert snr_weight("karras", sigma, 0.5).tolist() == [8.0, 4.25]


def test_draws_depend_on_the_place_in_the_global_batch_alone():
    whole = Draws(7, count=8)
    parts = [Draws(7, count=2, start=s, total=8) for s in (0, 2, 4, 6)]
    for draw in (
        lambda d: d.normal((d.count, 3)),
        lambda d: d.uniform((d.count,)),
        lambda d: d.integers(9, (d.count,)),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(p) for p in parts]))
