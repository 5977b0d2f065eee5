"""Flow-map objectives against the originals' numbers; flow matching, teachers and FACM's anchor by their formulas."""

import math
import re

import pytest
import torch
from conftest import Analytic, Map, golden, relative_error, trained, trained_on_velocity

import config
from networks import Preconditioner
from objectives import FlowMatching, ImprovedMeanFlow, MeanFlow, SoFlow, meanflow
from objectives.common import along_map, append_dims
from objectives.draws import Draws
from objectives.flow import velocity
from objectives.schedules import soflow_rho, time_pair
from objectives.scm import ContinuousConsistency, anchor_loss

MEANFLOW, SOFLOW, IMF = (golden(f"{name}_losses") for name in ("meanflow", "soflow", "imf"))


class Given:
    """Draws whose normal numbers are given, in the order they are asked for."""

    def __init__(self, *normal, uniform=None):
        self.given, self.uniforms = list(normal), uniform
        self.start, self.count, self.total, self.device = 0, len(normal[0]), len(normal[0]), torch.device("cpu")

    first = Draws.first

    def normal(self, shape, dtype):
        return self.given.pop(0).to(dtype)

    def uniform(self, shape):
        return self.uniforms


def settings_of(numbers):
    """The p and eps of every loss in a file."""
    return sorted({tuple(map(float, m)) for key in numbers for m in re.findall(r"_p([\d.e-]+)_eps([\d.e-]+)_", key)})


def key_of(numbers, start, p, eps, end):
    """A key whose p and eps may be written in other ways."""
    (found,) = (
        k for k in numbers if k.startswith(f"{start}_p") and k.endswith(f"_{end}") and (p, eps) == settings_of([k])[0]
    )
    return found


# MeanFlow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", sorted({key.removesuffix("_square") for key in MEANFLOW if key.endswith("_square")}))
def test_meanflow_matches_the_original(times):
    g, model = MEANFLOW, Map(MEANFLOW["coef"])
    given = {"t": g[f"{times}_t"], "r": g[f"{times}_r"], "noise": g["noise"]}
    for p, eps in settings_of(g):
        loss, gradient = trained(MeanFlow(p=p, eps=eps), model, g["x0"], **given)
        assert relative_error(loss, g[key_of(g, times, p, eps, "loss")]) < 1e-10
        assert relative_error(gradient, g[key_of(g, times, p, eps, "grad")]) < 1e-10
    log = MeanFlow()(model, g["x0"], **given).log
    assert log["square"].item() == pytest.approx((g[f"{times}_square"] / g["x0"][0].numel()).mean().item())
    assert log["different"][0] == (given["r"] < given["t"]).sum() and log["different"][1] == len(given["t"])


@pytest.mark.parametrize("times", ["v0", "edge"])
def test_the_derivative_along_a_map_is_that_of_the_original_and_of_finite_differences(times):
    g, model = MEANFLOW, Map(MEANFLOW["coef"])
    z, t, r = (g[f"{times}_{name}"] for name in ("z", "t", "r"))
    one, h = torch.ones_like(t), 1e-6
    u, dudt = along_map(model, z, t, r, g["v"], one, 0 * one)
    assert relative_error(u, g[f"{times}_u"]) < 1e-12 and relative_error(dudt, g[f"{times}_dudt"]) < 1e-12
    with torch.no_grad():
        ahead, behind = (model(z + s * g["v"], t + s, r) for s in (h, -h))
    assert relative_error((ahead - behind) / (2 * h), dudt) < 1e-7


@pytest.mark.parametrize("sampler", ["v0", "v1"])
def test_times_are_drawn_as_in_the_original(sampler):
    g = MEANFLOW
    names = ("P_mean_t", "P_std_t", "P_mean_r", "P_std_r", "ratio")
    objective = MeanFlow(sampler, **dict(zip(names, g[f"sampler_{sampler}_settings"].tolist(), strict=True)))
    draws = Given(g["sampler_normal_t"], g["sampler_normal_r"], uniform=g["sampler_uniform"])
    t, r, _ = objective.draw_times(draws, torch.float64)
    assert relative_error(t, g[f"sampler_{sampler}_t"]) < 1e-10
    assert relative_error(r, g[f"sampler_{sampler}_r"]) < 1e-10

    t, r, _ = objective.draw_times(Draws(0, 10**6), torch.float64)
    assert (r < t).double().mean().item() == pytest.approx(g[f"sampler_{sampler}_share_different"].item(), abs=5e-3)
    means, deciles = torch.stack([t.mean(), r.mean(), (t - r).mean()]), torch.linspace(0.1, 0.9, 9).double()
    assert torch.allclose(means, g[f"sampler_{sampler}_means"], atol=5e-3)
    for name, drawn in (("t", t), ("r", r)):
        assert torch.allclose(drawn.quantile(deciles), g[f"sampler_{sampler}_deciles_{name}"], atol=5e-3)


def test_first_steps_are_flow_matching():
    """objective.flow: no derivative is computed, and the loss is that of rows with r = t; then it is MeanFlow's."""
    model, x = Map(MEANFLOW["coef"]), MEANFLOW["x0"]
    first, after = MeanFlow(flow=5), MeanFlow()
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    loss = first(model, x, step=4, draws=Draws(0, len(x))).loss
    assert len(calls) == 1 and torch.equal(calls[0][1], calls[0][2])  # z, t, r
    t, noise = calls[0][1], torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    given = [o(model, x, step=s, t=t, r=t, noise=noise).loss.detach() for o, s in ((first, 4), (first, 5), (after, 4))]
    assert relative_error(given[0], given[1]) < 1e-12 and relative_error(given[1], given[2]) < 1e-12
    assert loss.isfinite().all()
    later = [o(model, x, step=5, draws=Draws(0, len(x))).loss for o in (first, after)]
    assert torch.equal(*later)


def test_a_difference_stands_for_the_derivative(monkeypatch):
    """objective.derivative: its loss and gradient are the exact ones' but for the gap, a tenth of which leaves a tenth;
    u is asked for at the same r, on the way back along v, never before r."""
    model, x, noise = Map(MEANFLOW["coef"]), MEANFLOW["x0"], MEANFLOW["noise"]
    t = torch.linspace(0.1, 1, len(x), dtype=x.dtype)
    r = torch.where(torch.arange(len(x)) % 2 == 0, t - 0.004, 0.3 * t)
    given = {"t": t, "r": r, "noise": noise}
    exact, errors = trained(MeanFlow(), model, x, **given), []
    for gap in (0.01, 0.001):
        monkeypatch.setattr(meanflow, "GAP", gap)
        found = trained(MeanFlow(derivative="difference"), model, x, **given)
        errors.append([relative_error(*pair) for pair in zip(found, exact, strict=True)])
    assert all(1e-6 < error < 0.03 for error in errors[0])
    assert all(5 < a / b < 20 for a, b in zip(*errors, strict=True))

    monkeypatch.setattr(meanflow, "GAP", 0.01)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    MeanFlow(derivative="difference")(model, x, **given)
    (z, *first), (before, *second) = calls
    assert torch.equal(first[1], second[1]) and torch.equal(second[0], torch.maximum(t - 0.01, r))
    back = append_dims(t - second[0], x) * (noise - x)
    assert relative_error(before, z - back) < 1e-12


def test_where_two_samplers_differ():
    """v0 swaps before rows become equal; v1 keeps t, so rows with r > t are equal too."""
    t, r = torch.tensor([0.2, 0.2, 0.6, 0.6]), torch.tensor([0.5, 0.5, 0.1, 0.1])
    equal = torch.tensor([True, False, True, False])
    assert torch.equal(
        torch.stack(time_pair(t, r, equal, "v0")), torch.tensor([[0.5, 0.5, 0.6, 0.6], [0.5, 0.2, 0.6, 0.1]])
    )
    assert torch.equal(
        torch.stack(time_pair(t, r, equal, "v1")), torch.tensor([[0.2, 0.2, 0.6, 0.6], [0.2, 0.2, 0.6, 0.1]])
    )


# SoFlow ---------------------------------------------------------------------------------------------------------------


def soflow(preset, **changes):
    """SoFlow with a preset's settings, of the golden file."""
    p, eps, *rho = SOFLOW[f"{preset}_settings"].tolist()[:4]
    means, stds = SOFLOW[f"{preset}_settings"].tolist()[4:7], SOFLOW[f"{preset}_settings"].tolist()[7:]
    times = {
        f"P_{which}_{name}": value
        for which, row in (("mean", means), ("std", stds))
        for name, value in zip("vrt", row, strict=True)
    }
    return SoFlow(int(SOFLOW[f"{preset}_total_steps"]), rho, p=p, eps=eps, **times, **changes)


PRESETS = sorted({key.split("_")[0] for key in SOFLOW if key.endswith("_settings")})
STEPS = [key.removesuffix("_loss") for key in SOFLOW if re.search(r"_k\d+_loss$", key)]


@pytest.mark.parametrize("key", STEPS)
def test_soflow_matches_the_original(key):
    g, (preset, k) = SOFLOW, key.split("_k")
    given = {"t": g[f"{preset}_t"], "r": g[f"{preset}_s"], "noise": g["noise"], "step": int(k)}
    objective = soflow(preset)
    assert objective.rho(int(k)) == pytest.approx(g[f"{key}_rho"].item(), rel=1e-12)
    loss, gradient = trained(objective, Map(g["coef"]), g["x0"], **given)
    assert relative_error(loss, g[f"{key}_loss"]) < 1e-10
    assert relative_error(gradient, g[f"{key}_grad"]) < 1e-10
    total, count = objective(Map(g["coef"]), g["x0"], **given).log["log_q2"]
    assert (total / count).item() == pytest.approx(g[f"{key}_mse"].log().mean().item(), rel=1e-9)


@pytest.mark.parametrize("key", STEPS)
def test_in_forward_mode_soflow_is_near_and_nearer_in_narrow_gaps(key):
    g, (preset, k) = SOFLOW, key.split("_k")
    objective = soflow(preset, difference="forward_mode")
    given = {"t": g[f"{preset}_t"], "r": g[f"{preset}_s"], "noise": g["noise"], "step": int(k)}
    _, gradient = trained(objective, Map(g["coef"]), g["x0"], **given)
    assert relative_error(gradient, g[f"{key}_grad"]) < max(0.1 * objective.rho(int(k)) ** 2, 1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_soflows_velocity_part_and_whole_step_match_the_original(preset):
    g, objective = SOFLOW, soflow(preset)
    t = g[f"{preset}_velocity_t"]
    loss, gradient = trained(objective, Map(g["coef"]), g["x0"], t=t, r=t, noise=g["noise"])
    assert relative_error(loss, g[f"{preset}_velocity_loss"]) < 1e-10
    assert relative_error(gradient, g[f"{preset}_velocity_grad"]) < 1e-10
    velocity_rows = torch.arange(len(t)) < g[f"{preset}_step_velocity_count"]
    given = {"t": torch.where(velocity_rows, t, g[f"{preset}_t"]), "r": torch.where(velocity_rows, t, g[f"{preset}_s"])}
    step = int(g[f"{preset}_step_k"])
    loss, gradient = trained(objective, Map(g["coef"]), g["x0"], **given, noise=g["noise"], step=step)
    assert loss.mean().item() == pytest.approx(g[f"{preset}_step_total"].item(), rel=1e-10)
    assert relative_error(gradient, g[f"{preset}_step_grad"]) < 1e-10


@pytest.mark.parametrize("preset", PRESETS)
def test_soflows_times_are_the_originals(preset):
    g = SOFLOW
    t, r, first = soflow(preset).draw_times(Given(g[f"{preset}_normal_t"], g[f"{preset}_normal_s"]))
    assert relative_error(t, g[f"{preset}_t"]) < 1e-12 and relative_error(r, g[f"{preset}_s"]) < 1e-12 and first == 0
    normal = (g[f"{preset}_{name}"] for name in ("normal_t", "normal_s", "velocity_normal"))
    t, r, first = soflow(preset, velocity_share=0.75).draw_times(Given(*normal))
    assert first == int(0.75 * len(t)) and torch.equal(t[:first], r[:first])
    assert relative_error(t[:first], g[f"{preset}_velocity_t"][:first]) < 1e-12
    assert relative_error(r[first:], g[f"{preset}_s"][first:]) < 1e-12


@pytest.mark.parametrize("key", [key for key in SOFLOW if re.match(r"schedule_[A-Z]", key)])
def test_rho_is_the_originals(key):
    _, name, preset = key.split("_")
    schedule = {"Exponent": "exponential", "Const": "constant"}.get(name, name.lower())
    K, ends = int(SOFLOW["schedule_total_steps"]), SOFLOW[f"{preset}_settings"][2:4].tolist()
    found = [soflow_rho(int(k), K, ends, schedule) for k in SOFLOW["schedule_k"]]
    assert found == pytest.approx(SOFLOW[key].tolist(), rel=1e-10)


# iMF ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "start", "end"), [(2, "head", ""), (1, "boundary", "_u")])
def test_imf_matches_the_original(heads, start, end):
    g = IMF
    for p, eps in settings_of(g):
        model = Map(g["coef"] if heads == 2 else g["coef"][:3])
        loss, gradient = trained(ImprovedMeanFlow(p=p, eps=eps), model, g["x0"], t=g["t"], r=g["r"], noise=g["noise"])
        assert relative_error(loss, g[key_of(g, start, p, eps, f"loss{end}")]) < 1e-10
        wanted = g[key_of(g, start, p, eps, f"grad{end}")]
        assert relative_error(gradient, wanted[: len(gradient)]) < 1e-10


def test_imfs_times_are_the_originals():
    seen = []

    class Told(Map):
        def both(self, z, t, r):
            seen.append((t, r))
            return super().both(z, t, r)

    P_mean, P_std, share = IMF["sampler_settings"].tolist()
    draws = Given(IMF["normal_t"], IMF["normal_r"], IMF["noise"])
    out = ImprovedMeanFlow(P_mean, P_std, share)(Told(IMF["coef"]), IMF["x0"], draws=draws)
    assert relative_error(seen[0][0], IMF["t"]) < 1e-10 and relative_error(seen[0][1], IMF["r"]) < 1e-10
    assert torch.equal(seen[0][0] == seen[0][1], IMF["flow_matching"])
    key = key_of(IMF, "head", 1.0, 0.01, "loss")
    assert relative_error(out.loss.detach(), IMF[key]) < 1e-10


# Flow matching and teachers -------------------------------------------------------------------------------------------


def test_flow_matching_is_a_regression_on_the_velocity():
    g, model = MEANFLOW, Map(MEANFLOW["coef"])
    t = g["v0_t"]
    loss, _ = trained(FlowMatching(), model, g["x0"], t=t, noise=g["noise"])
    z = append_dims(1 - t, g["x0"]) * g["x0"] + append_dims(t, g["x0"]) * g["noise"]
    assert torch.allclose(loss, (model(z, t, t) - g["v"]).square().mean((1, 2, 3)).detach(), rtol=1e-12)
    t, seen = torch.tensor(0.0), FlowMatching(0.5, 0.7)
    seen(lambda z, time, r: (t.set_(time), z)[1], torch.zeros(10**5, 1), draws=Draws(0, 10**5))
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(0.5, abs=0.01) and logit.std().item() == pytest.approx(0.7, abs=0.01)


def test_a_denoisers_velocity_is_that_of_its_flow():
    """Of normal data of variance 0.36: D = 0.36 x / (0.36 + s^2), v = (t - 0.36 (1 - t)) z / ((1 - t)^2 0.36 + t^2)."""
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.98]).double()
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    v = velocity(lambda x, s: 0.36 * x / (0.36 + append_dims(s, x) ** 2), z, t)
    a = append_dims(t, z)
    assert relative_error(v, (a - 0.36 * (1 - a)) * z / (0.36 * (1 - a) ** 2 + a**2)) < 1e-9

    def highest(x, s):
        assert s.max() <= 80 * (1 + 1e-9) and torch.isfinite(x).all()
        return 0 * x

    ends = torch.tensor([0.0, 1.0]).double()
    assert torch.isfinite(velocity(highest, z[:2], ends)).all()
    net = Map(MEANFLOW["coef"])
    assert torch.equal(velocity(net, z, t), net(z, t, t))


def test_a_teachers_velocity_takes_the_datas_place():
    g, teacher = MEANFLOW, Preconditioner(Analytic(0.7))
    model, t, r = Map(g["coef"]), g["v0_t"], g["v0_r"]
    loss, gradient = trained(MeanFlow(teacher=teacher), model, g["x0"], t=t, r=r, noise=g["noise"])
    v = velocity(teacher, g["v0_z"], t).detach()
    wanted = trained_on_velocity(model, g["v0_z"], t, r, v, v, 0.75, 1e-3)
    assert relative_error(loss, wanted[0]) < 1e-10 and relative_error(gradient, wanted[1]) < 1e-10
    assert relative_error(loss, trained(MeanFlow(), model, g["x0"], t=t, r=r, noise=g["noise"])[0]) > 0.01


def test_curves_are_binned_by_time():
    t = torch.tensor([0.0, 0.2, 0.25, 0.6, 0.75, 1.0]).double()
    log = MeanFlow()(Map(MEANFLOW["coef"]), torch.zeros(6, 3).double(), t=t, r=0 * t).log
    bins = {name: value[1].item() for name, value in log.items() if name.startswith("loss_by_t/")}
    assert bins == {"loss_by_t/0-0.25": 2, "loss_by_t/0.25-0.5": 1, "loss_by_t/0.5-0.75": 1, "loss_by_t/0.75-1": 2}


# FACM's anchor --------------------------------------------------------------------------------------------------------


def test_the_anchor_is_flow_matching_told_the_time_turned():
    """2507.03738's flow_matching_loss, at time -t in TrigFlow's clock, written out again."""
    x, noise = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    t, told = torch.tensor([0.2, 0.7, 1.1, 1.5]).double(), []

    class Net(Analytic):
        def forward(self, u, c, *labels):
            told.append(c)
            return super().forward(u, c + 0.3, *labels)

    model = Preconditioner(Net(0.8), precond="trigflow", c_noise="t")
    objective = ContinuousConsistency(weight=lambda t: 0 * t)
    plain = objective(model, x, t=t, noise=noise)
    told.clear()
    objective.anchor = 0.5
    out = objective(model, x, t=t, noise=noise)
    assert torch.allclose(told[-1], -t)
    cos, sin = (append_dims(f(t), x) for f in (torch.cos, torch.sin))
    F = 0.8 * torch.tanh((cos * x + 0.5 * sin * noise) / 0.5) * append_dims((0.3 - t).cos(), x)
    slope = (cos * 0.5 * noise - sin * x) / 0.5
    cosine = (F * slope).sum(1) / (F.norm(dim=1) * slope.norm(dim=1))
    anchor = (F - slope).square().mean((1, 2, 3)) + (1 - cosine).mean((1, 2))
    assert torch.allclose(out.loss, plain.loss + 0.5 * anchor, rtol=1e-9)
    assert out.log["anchor"].item() == pytest.approx(anchor.mean().item())
    before = torch.autograd.grad(plain.loss.sum(), model.model.a)[0]
    after = torch.autograd.grad(out.loss.sum(), model.model.a)[0]
    assert not torch.allclose(before, after)
    assert math.isfinite(anchor_loss(x[:, 0, 0, 0], noise[:, 0, 0, 0]).sum().item())


# Config ---------------------------------------------------------------------------------------------------------------


LABELLED = {"data": {"conditional": True}}


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        ({"name": "meanflow", "guidance": 2.0}, {}, "objective.guidance: guides by class labels"),
        (
            {"name": "soflow", "guidance": 2.0},
            {**LABELLED, "network": {"label_dropout": 0.1}},
            "network.label_dropout: objective soflow drops labels itself",
        ),
        ({"name": "meanflow", "interval": [0.5, 0.5]}, {}, "objective.interval: must rise"),
        ({"name": "meanflow", "teacher": "a.ckpt", "kappa": 0.5}, {}, "objective.kappa: mixes in"),
        ({"name": "soflow", "teacher": "a.ckpt"}, {}, "objective.teacher: there is no such setting"),
        ({"name": "soflow", "rho": [0.1, 0.5]}, {}, "objective.rho: must not rise"),
        ({"name": "sct", "anchor": 1.0}, {}, "objective.anchor: its cosine blows up"),
        ({"name": "sct", "anchor": 1.0}, {"network": {"precond": "trigflow"}}, "objective.anchor: is told apart"),
        (
            {"name": "meanflow", "guidance": 2.0},
            {**LABELLED, "sample": {"guidance": 2.0}},
            "sample.guidance: objective meanflow is guided in training",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(objective, more, said):
    with pytest.raises(config.ConfigError, match=re.escape(said)):
        config.parse({"objective": objective, **more})
