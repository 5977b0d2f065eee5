"""CD, PD, sCM, TCM and CMT against the original numbers and their definitions."""

import math
import shutil

import pytest
import torch
from conftest import analytic, as_ect, golden, relative_error, tiny
from test_objectives import CT, per_sample

import checkpoints
import config
import networks
import sampler
from checkpoints.starting import OUTPUT_LAYER
from config import ConfigError
from objectives import losses
from objectives.cd import ConsistencyDistillation
from objectives.cmt import MidTraining
from objectives.common import append_dims
from objectives.draws import Draws
from objectives.pd import ProgressiveDistillation
from objectives.schedules import ect_r
from objectives.scm import AdaptiveWeight, ContinuousConsistency
from objectives.tcm import TruncatedConsistency
from sampler import karras_sigmas
from training import trainer
from training.build import build_objective
from training.step import TrainingStep

SCM = golden("scm_tangents")
CMT, TCM = golden("cmt_trajectory"), golden("tcm_losses")


def cd(**kw):
    target = analytic(0.9, "cm")
    for N in range(2, 400):  # the golden pairs lie on one Karras grid
        index = N - 2 - CT["indices"]
        if index.min() >= 0 and torch.allclose(karras_sigmas(N).flip(0)[index + 1], CT["sigma_t"], rtol=1e-9):
            return ConsistencyDistillation(target, analytic(0.7), losses.l2, N=N, **kw), index
    raise AssertionError("no Karras grid holds the golden noise levels")


def test_cd_matches_the_original():
    objective, index = cd()
    loss = per_sample(objective, analytic(1.0, "cm"), CT["x0"], index=index, noise=CT["noise"])
    assert relative_error(loss, CT["cd_heun_loss_uniform_l2"]) < 1e-6


def test_cd_euler_is_the_first_half_of_heun():
    (heun, index), (euler, _) = cd(), cd(solver="euler")
    grid = karras_sigmas(heun.N).flip(0)
    high, low = grid[index + 1], grid[index]
    x_high = CT["x0"] + append_dims(high, CT["x0"]) * CT["noise"]
    D = analytic(0.7)(x_high, high)
    expected = x_high + append_dims((low - high) / high, x_high) * (x_high - D)
    got = euler.lower_point(x_high, high, low, CT["x0"], CT["noise"], {})
    assert relative_error(got, expected.detach()) < 1e-12
    assert relative_error(heun.lower_point(x_high, high, low, CT["x0"], CT["noise"], {}), got) > 1e-6


def test_cd_guidance_asks_the_teacher_with_and_without_labels():
    class Teacher(torch.nn.Module):
        def forward(self, x, sigma, class_labels=None):
            return torch.full_like(x, 1.0 if class_labels is None else 3.0)

    objective = ConsistencyDistillation(analytic(), Teacher(), losses.l2, solver="euler", guidance=1.5)
    x, high, low = torch.zeros(2, 1, 4, 4), torch.full((2,), 2.0), torch.full((2,), 1.0)
    got = objective.lower_point(x, high, low, x, x, {"class_labels": torch.ones(2, 3)})
    assert torch.allclose(got, (0 - (1 + 1.5 * 2)) / 2 * torch.full_like(x, -1.0))


def test_pd_matches_the_original():
    objective = ProgressiveDistillation(analytic(0.7), 100, weighting="uniform")
    objective.intervals = lambda step: 18
    loss = per_sample(objective, analytic(1.0, "cm"), CT["x0"], index=CT["pd_indices"], noise=CT["noise"])
    assert relative_error(loss, CT["pd_loss_uniform_l2"]) < 1e-6


def test_pd_halves_its_grid_and_passes_the_student_on():
    objective = ProgressiveDistillation(analytic(0.5), total_steps=8, N=8)
    assert [objective.intervals(k) for k in range(9)] == [8, 8, 4, 4, 2, 2, 1, 1, 1]
    student = analytic(0.25)
    objective.after_step(student, step=0)
    assert objective.teacher.model.a.item() == 0.5
    objective.after_step(student, step=1)
    assert objective.teacher.model.a.item() == 0.25


def test_pd_passes_on_to_a_teacher_that_was_trained_with_augmentation_labels():
    """The teacher has a map of them, which a student without has not; its buffers too become the student's."""
    settings = {"embedding_type": "fourier", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    cfg = config.parse({"network": {**settings, "attn_resolutions": []}}).network
    shape = {"resolution": 8, "channels": 1, "label_dim": 0}
    teacher, student = (networks.build(cfg.model_dump(), **shape, augment_dim=dim) for dim in (9, 0))
    objective = ProgressiveDistillation(teacher, total_steps=4, N=2)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0])
    student.train(False)
    for value in student.parameters():
        value.data += 0.1
    assert not torch.allclose(objective.teacher(x, sigma), student(x, sigma), atol=1e-3)
    objective.after_step(student, step=1)
    assert torch.allclose(objective.teacher(x, sigma), student(x, sigma), atol=1e-6)


def test_pd_refuses_a_teacher_in_another_clock(teachers, tmp_path):
    settings = {"objective": {"name": "pd", "N": 4, "teacher": teachers}, "data": {"conditional": True}}
    with pytest.raises(ConfigError, match=r"network\.precond: is trigflow, and objective\.teacher's is edm"):
        trainer.Trainer(tiny(tmp_path, **settings, network={"precond": "trigflow"}))


def test_cmt_takes_whole_trajectories_on_every_device(teachers, tmp_path, monkeypatch):
    settings = {"objective": {"name": "cmt", "steps": 16, "teacher": teachers}, "data": {"conditional": True}}
    trainer.Trainer(tiny(tmp_path, **settings))
    monkeypatch.setattr("training.step.rank_and_world", lambda: (0, 2))
    with pytest.raises(ConfigError, match=r"a pass of 8 images on each of 2 devices is no multiple of the 16"):
        trainer.Trainer(tiny(tmp_path, **settings))


def test_a_run_whose_teacher_has_moved_goes_on(teachers, tmp_path):
    settings = {"objective": {"name": "cd", "N": 6, "teacher": teachers}, "data": {"conditional": True}}
    trainer.train(tiny(tmp_path / "r", **settings))
    settings["objective"]["teacher"] = str(shutil.copy(teachers, tmp_path / "moved.ckpt"))
    trainer.train(tiny(tmp_path / "r", **settings, train={"steps": 8}), resume=True)
    assert checkpoints.load(tmp_path / "r" / "checkpoints" / "last.ckpt")["step"] == 8


class TrigStandIn(torch.nn.Module):
    """F(u, t) = tanh(u) cos(t) + 0.3 sin(2t) u, behind the interface of a preconditioned network."""

    def raw(self, x, sigma):
        t = torch.atan(sigma / 0.5)
        u = x * append_dims(t.cos(), x) / 0.5
        return torch.tanh(u) * append_dims(t.cos(), x) + 0.3 * append_dims((2 * t).sin(), x) * u


class LinearWeight(torch.nn.Module):
    def forward(self, t):
        return 0.1 * t


@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
def test_sct_matches_the_papers_algorithm(r):
    objective = ContinuousConsistency(warmup=10, weight=LinearWeight())
    F, g = objective.tangent(TrigStandIn(), SCM["x_t"], SCM["t"], SCM["dxdt"], r, {})
    assert relative_error(F, SCM["F"]) < 1e-6 and relative_error(g, SCM[f"g_r{r}"]) < 1e-6
    norm = g.flatten(1).norm(dim=1)
    assert relative_error(g / append_dims(norm + 0.1, g), SCM[f"g_normalized_r{r}"]) < 1e-6
    given = {"t": SCM["t"], "noise": SCM["z"] / 0.5}
    loss = objective(TrigStandIn(), SCM["x0"], step=int(10 * r), **given).loss
    assert relative_error(loss, SCM[f"loss_r{r}"]) < 1e-6


def test_scm_warms_up_over_h_steps_and_then_stays():
    objective = ContinuousConsistency(warmup=10)
    seen = []
    objective.tangent = lambda model, x_t, t, dxdt, r, c: (
        seen.append(r) or (torch.zeros_like(x_t), torch.zeros_like(x_t))
    )
    for step in (0, 5, 10, 99):
        objective(TrigStandIn(), SCM["x0"], step=step, draws=Draws(0, 6))
    assert seen == [0.0, 0.5, 1.0, 1.0]


def test_scm_takes_the_tangent_under_the_students_dropout_mask():
    masks = []

    def model(x, sigma):
        masks.append(torch.nn.functional.dropout(torch.ones(100)))
        return x

    ContinuousConsistency()(model, SCM["x0"], draws=Draws(0, 6))
    assert len(masks) == 2 and torch.equal(masks[0], masks[1])


def test_scd_takes_its_slope_from_the_teacher():
    """With the ideal denoiser of one point x0 the ODE's slope is the pair's own, so sCD is sCT."""
    x0 = torch.full((6, 3, 8, 8), 0.3, dtype=torch.float64)

    class Ideal(torch.nn.Module):
        def forward(self, x, sigma):
            return torch.full_like(x, 0.3)

    draws = [Draws(1, 6), Draws(1, 6)]
    sct = ContinuousConsistency(weight=LinearWeight())(TrigStandIn(), x0, step=5000, draws=draws[0])
    scd = ContinuousConsistency(teacher=Ideal(), weight=LinearWeight())(TrigStandIn(), x0, step=5000, draws=draws[1])
    assert scd.loss.mean().item() == pytest.approx(sct.loss.mean().item(), rel=1e-9)


def test_scm_of_a_denoiser_without_raw_output_is_the_same():
    model = TrigStandIn()

    def denoiser(x, sigma):
        t = torch.atan(sigma / 0.5)
        return append_dims(t.cos() ** 2, x) * x - append_dims(t.sin(), x) * 0.5 * model.raw(x, sigma)

    objective = ContinuousConsistency(weight=LinearWeight())
    a = objective(model, SCM["x0"], step=10_000, draws=Draws(0, 6)).loss.mean()
    b = objective(denoiser, SCM["x0"], step=10_000, draws=Draws(0, 6)).loss.mean()
    assert b.item() == pytest.approx(a.item(), rel=1e-6)


def test_the_learned_weight_starts_at_zero_and_learns():
    weight = AdaptiveWeight()
    t = torch.linspace(0.01, 1.5, 20)
    assert weight(t).abs().max() == 0
    (weight(t) * torch.linspace(-1, 1, 20)).sum().backward()
    assert weight.linear.weight.grad.abs().sum() > 0


def trigflow_pair():
    """One network as an EDM denoiser and, its output's sign turned, as a TrigFlow one."""
    torch.manual_seed(0)
    net = networks.SongUNet(8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    turned = networks.SongUNet(8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    turned.load_state_dict({k: -v if OUTPUT_LAYER.fullmatch(f"model.{k}") else v for k, v in net.state_dict().items()})
    pair = networks.Preconditioner(net), networks.Preconditioner(turned, "trigflow")
    return [model.double().eval().requires_grad_(False) for model in pair]


def test_trigflow_is_edm_in_another_clock():
    edm, trig = trigflow_pair()
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.01, 0.8, 1.56], dtype=torch.float64)
    sigma = 0.5 * t.tan()
    assert relative_error(trig(x, sigma), edm(x, sigma)) < 1e-12
    x_trig = append_dims(t.cos(), x) * x  # D = cos(t) x_t - sin(t) sd F(x_t / sd), 2410.11081 eq. 3
    by_hand = append_dims(t.cos(), x) * x_trig - append_dims(t.sin(), x) * 0.5 * trig.raw(x, sigma)
    assert relative_error(trig(x, sigma), by_hand) < 1e-12
    assert torch.allclose(networks.Preconditioner(trig.model, "trigflow", "t").noise_label(sigma), t)


def test_tcm_takes_targets_below_t_prime_from_the_frozen_stage():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, x, sigma):
            return torch.full_like(x, 1.0) * self.value

    student, stage1 = Constant(2.0), Constant(5.0)
    objective = TruncatedConsistency(stage1, boundary_weight=0.1)
    x = torch.zeros(1, 4)
    at = lambda t: objective(student, x, t=torch.tensor([t], dtype=torch.float64)).loss.item()  # noqa: E731
    gap = lambda t: t * 0.001 * (1 + 8 * torch.sigmoid(torch.tensor(-t)).item())  # noqa: E731
    assert at(1.0) == pytest.approx(0.1 * math.sqrt(4 * 9) / gap(1.0), rel=1e-6)  # on the boundary: stage 1, weight 0.1
    assert at(1.0005) == pytest.approx(math.sqrt(4 * 9) / gap(1.0005), rel=1e-6)  # r is below t': stage 1
    assert at(1.1) == pytest.approx(0, abs=1e-12)  # r is above t': the student itself
    assert not stage1.value.requires_grad


def test_tcm_draws_at_and_above_t_prime():
    objective = TruncatedConsistency(analytic())
    t = objective.draw_t(Draws(0, 20_000))
    assert t.min() == 1.0 and t.max() <= 80.0
    assert (t == 1.0).sum() == 5000 and (t[:400] == 1.0).sum() == 100  # a share of the batch, spread over it
    from scipy.stats import t as student

    law = student(df=0.01, scale=0.2)
    expected = [(law.cdf(math.log(b)) - law.cdf(0)) / (law.cdf(math.log(80)) - law.cdf(0)) for b in (1.5, 5, 30)]
    drawn = t[t > 1.0]
    assert [(drawn <= b).double().mean().item() for b in (1.5, 5, 30)] == pytest.approx(expected, abs=0.012)


def test_cmt_maps_every_point_of_a_trajectory_onto_its_own_end():
    teacher = analytic(0.7)
    x, noise = CT["x0"].repeat(2, 1, 1, 1)[:8], torch.randn(8, 3, 8, 8, dtype=torch.float64)
    seen = {}
    objective = MidTraining(teacher, lambda a, b: seen.update(target=b) or losses.l2(a, b), steps=4)

    def student(points, sigma):
        seen.update(points=points.detach(), sigma=sigma)
        return points

    objective(student, x, noise=noise)
    assert seen["sigma"].tolist() == pytest.approx(
        sorted(torch.logspace(math.log10(80), math.log10(0.002), 5)[:4].tolist() * 2, reverse=True), rel=1e-5
    )
    for i, row in enumerate((0, 4)):  # a trajectory starts from every fourth image
        start = x[row : row + 1] + 80 * noise[row : row + 1]
        points, _, end = sampler.dpm_solver_trajectory(teacher, start, 4)
        assert torch.allclose(seen["points"][i::2], points.flatten(0, 1)) and torch.allclose(
            seen["target"][i::2], end.expand(4, -1, -1, -1)
        )
    assert not torch.allclose(seen["target"][0], seen["target"][1])


def test_cmt_tells_the_student_the_label_of_its_trajectory_and_the_teacher_nothing():
    told, seen = [], {}

    class Teacher(torch.nn.Module):
        def forward(self, x, sigma, **conditions):
            told.append(conditions)
            return 0 * x

    def student(x, sigma, class_labels, dropout_keys):
        seen.update(label=class_labels.argmax(1), keys=dropout_keys)
        return x

    given = {"class_labels": torch.eye(8), "dropout_keys": torch.arange(8)}
    MidTraining(Teacher(), losses.l2, steps=2)(student, torch.zeros(8, 1, 4, 4), draws=Draws(0, 8), **given)
    assert seen["label"].tolist() == [0, 2, 4, 6] * 2  # a trajectory starts from every second image
    assert told == [{}, {}] and seen["keys"].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]  # each for itself


def cmt_teacher(x, sigma, a=0.36, b=0.1):
    s = append_dims(sigma, x)
    return a * x / (0.36 + s**2) + b * torch.tanh(x) * s / (1 + s)


@pytest.mark.parametrize("key", [k.removesuffix("_end") for k in CMT if k.endswith("_end") and "sigma" not in k])
def test_cmt_follows_the_originals_trajectory(key):
    """sony/cmt's points, end and losses: DPM-Solver++ of order 3 with lower_order_final."""
    known = {name.removeprefix(f"{key}_"): value for name, value in CMT.items() if name.startswith(f"{key}_")}
    ends = known["sigma"] if "levels" in known else torch.cat([known["sigma"], known["sigma_end"].reshape(1)])
    steps = len(ends) - 1
    high, low = float(ends[0]), float(ends[-1])
    start = CMT["x0"] + high * CMT["noise"]
    points, sigmas, end = sampler.dpm_solver_trajectory(cmt_teacher, start, steps, low, high)
    assert relative_error(sigmas, ends[:-1]) < 1e-9 and relative_error(end, known["end"]) < 1e-9
    if "points" not in known:
        return
    assert relative_error(points, known["points"]) < 1e-9
    student = torch.nn.Parameter(CMT["student"].clone())
    of_all = lambda x: x.repeat_interleave(steps, 0)  # noqa: E731  # every one of `steps` images starts a trajectory
    for metric, root in (("mse", 1), ("mae", 0.5)):
        distance = lambda a, b, root=root: (a - b).square().flatten(1).sum(1) ** root  # noqa: E731
        teacher = torch.nn.Identity()
        teacher.forward = cmt_teacher
        objective = MidTraining(teacher, distance, steps, low, high)
        model = lambda x, s: cmt_teacher(x, s, *student)  # noqa: E731
        loss = objective(model, of_all(CMT["x0"]), noise=of_all(CMT["noise"])).loss
        assert relative_error(loss.detach(), known[f"loss_{metric}"].flatten()) < 1e-6
        student.grad = None
        loss.mean().backward()
        assert student.grad[0].item() == pytest.approx(float(known[f"grad_{metric}"]), rel=1e-6)


@pytest.mark.parametrize("key", [k.removesuffix("_settings") for k in TCM if k.endswith("_settings")])
def test_tcm_matches_the_original(key):
    """NVlabs/TCM's rows: r, both means, their sum and its gradient."""
    t_prime, q, huber_c, share, weight = TCM[f"{key}_settings"].tolist()
    student, stage1 = analytic(float(TCM["student"])), analytic(float(TCM["stage1"]))
    how = (t_prime, q, share, weight)
    weighting = "c_out" if key == "imagenet" else "gap"
    objective = TruncatedConsistency(stage1, *how, huber_c=huber_c, weighting=weighting)
    assert stage1.training and relative_error(ect_r(TCM[f"{key}_t"], 0, q), TCM[f"{key}_r"]) < 1e-9
    out = objective(student, TCM["x0"], t=TCM[f"{key}_t"], noise=TCM["noise"])
    main, boundary = (float(total / count) for total, count in (out.log["main"], out.log["boundary"]))
    assert (main, boundary) == pytest.approx((float(TCM[f"{key}_main"]), float(TCM[f"{key}_boundary"])), rel=1e-6)
    total = out.loss.mean()
    assert total.item() == pytest.approx(float(TCM[f"{key}_total"]), rel=1e-6)
    total.backward()
    assert student.model.a.grad.item() == pytest.approx(float(TCM[f"{key}_grad"]), rel=1e-6)


def test_dpm_solver_converges_to_the_ode():
    """For data N(0, 0.6^2) the ODE is known: x scales with sqrt(0.36 + sigma^2)."""
    denoiser = lambda x, s: 0.36 * x / (0.36 + append_dims(s, x) ** 2)  # noqa: E731
    start = 80 * torch.randn(4, 3, dtype=torch.float64)
    exact = start * math.sqrt((0.36 + 0.002**2) / (0.36 + 80**2))
    errors = [relative_error(sampler.dpm_solver_trajectory(denoiser, start, n)[2], exact) for n in (16, 32, 64)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3  # second order


OBJECTIVES = {
    "cd": {"name": "cd", "N": 6},
    "scd": {"name": "scd", "warmup": 4},
    "tcm": {"name": "tcm"},
    "cmt": {"name": "cmt", "steps": 4},
    "pd": {"name": "pd", "N": 4},
}


class OfTheLabel(torch.nn.Module):
    """A denoiser that hears its labels and keeps what it was given."""

    def __init__(self, scale=0.5, seen=None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.keep = (lambda labels: None) if seen is None else seen.append

    def forward(self, x, sigma, class_labels=None):
        self.keep(class_labels)
        louder = 1.0 if class_labels is None else append_dims(1 + 0.1 * class_labels.argmax(1), x)
        return louder * self.scale * x / (1 + append_dims(sigma, x))


def build(folder, name, model, teacher, **options):
    """The objective that a config makes."""
    needs_teacher = {"teacher": "a.ckpt"} if name in OBJECTIVES else {}
    section = {"name": name, **needs_teacher, **options}
    cfg = tiny(folder, objective=section, data={"conditional": True}, train={"init_from": "a.ckpt"})
    return build_objective(cfg, model, teacher if needs_teacher else None), cfg


PASSES = {"edm": 1, "ct": 2, "ict": 2, "ect": 2, "cd": 4, "sct": 2, "scd": 3, "tcm": 3, "pd": 3}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_gets_the_labels(name, tmp_path):
    """Student, target and teacher alike."""
    seen, labels = [], torch.eye(4)
    model = OfTheLabel(0.5, seen)
    objective, _ = build(tmp_path, name, model, OfTheLabel(0.4, seen))
    objective(model, torch.randn(4, 1, 8, 8), draws=Draws(0, 4), class_labels=labels)
    assert len(seen) == PASSES[name] and all(given is labels for given in seen)


PAIRS = {"metric": "l1", "huber_c": 1.0, "weighting": "snr"}
LOG_NORMAL = {"P_mean": 0.5, "P_std": 0.7}
CHANGES = {  # another value of every option
    "edm": LOG_NORMAL,
    "trigflow": LOG_NORMAL,
    "ct": {**PAIRS, "s0": 4, "s1": 20, "mu0": 0.5},
    "ict": {**LOG_NORMAL, "huber_c": 1.0, "s0": 20, "s1": 20, "difference": "forward_mode"},
    "ect": {
        **LOG_NORMAL, "huber_c": 1.0, "q": 3.0, "double_kimg": 0.02, "stage": 2, "mapping": "const",
        "difference": "forward_mode", "weighting": "c_out",
    },
    "cd": {**PAIRS, "N": 7, "mu": 0.5, "solver": "euler", "guidance": 3.0},
    "sct": {**LOG_NORMAL, "warmup": 10, "c": 0.5, "anchor": 1.0},
    "scd": {**LOG_NORMAL, "warmup": 10, "c": 0.5, "guidance": 3.0, "anchor": 1.0},
    "tcm": {
        "t_prime": 2.0, "q": 500.0, "boundary_share": 0.75, "boundary_weight": 0.5, "df": 5.0, "scale": 1.0,
        "huber_c": 1.0, "weighting": "c_out", "difference": "forward_mode",
    },
    "cmt": {"steps": 8, "metric": "l1", "huber_c": 1.0},
    "pd": {"N": 8, "weighting": "uniform"},
}  # fmt: skip
USUAL = {"ct": {"s1": 8}, "ict": {"s1": 40}, "cmt": {"steps": 4}, "pd": {"N": 4}, "tcm": {"df": 2.0, "q": 20.0}}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, changes in CHANGES.items() for option in changes]
)
def test_every_option_reaches_the_loss(name, option, tmp_path):
    usual = USUAL.get(name, {})
    if option == "huber_c" and "metric" in CHANGES[name]:
        usual = {**usual, "metric": "pseudo_huber"}
    seen = []
    for options in (usual, {**usual, option: CHANGES[name][option]}):
        model = OfTheLabel()
        objective, cfg = build(tmp_path, name, model, OfTheLabel(0.4), **options)
        x, labels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(10)[[3] * 16]
        values = [objective(model, x, step=1, draws=Draws(0, 16), class_labels=labels).loss.mean().item()]
        model.scale.data.fill_(0.8)
        if hasattr(objective, "after_step"):
            objective.after_step(model, step=1)
        seen.append([*values, objective(model, x, step=4, draws=Draws(1, 16), class_labels=labels).loss.mean().item()])
    assert seen[1] != pytest.approx(seen[0], rel=1e-5)
    elsewhere = {"name", "teacher", "lpips_weights", "logvar"}  # logvar: test_edm2.py, by the network that has it
    untried = set(type(cfg.objective).model_fields) - elsewhere - set(CHANGES[name])
    assert not untried, "give these options another value in CHANGES"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    trainer.train(tiny(folder / "edm", objective={"name": "edm"}, data={"conditional": True}))
    return str(folder / "edm" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_distillation_runs_from_a_teacher_and_resumes_bit_for_bit(name, teachers, tmp_path, monkeypatch):
    if name == "tcm":
        as_ect(teachers, tmp_path / "ect.ckpt")
        teachers = str(tmp_path / "ect.ckpt")
    precond = {"precond": "trigflow"} if name == "scd" else {}
    settings = {
        "objective": {**OBJECTIVES[name], "teacher": teachers},
        "network": precond,
        "data": {"conditional": True},
    }
    run = trainer.Trainer(tiny(tmp_path / "start", **settings))
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0])
    teacher = checkpoints.load_model(teachers)
    assert torch.allclose(
        run.train_step.model.eval()(x, sigma), teacher(x, sigma), atol=1e-6
    )  # the student starts as the teacher
    trainer.train(tiny(tmp_path / "a", **settings))
    real = TrainingStep.__call__

    def killed_at_step_3(self, *batch):
        if self.step == 3:
            raise RuntimeError("killed")
        real(self, *batch)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(TrainingStep, "__call__", killed_at_step_3)
        trainer.train(tiny(tmp_path / "b", **settings))
    trainer.train(tiny(tmp_path / "b", **settings), resume=True)
    a, b = (checkpoints.load(tmp_path / part / "checkpoints" / "last.ckpt") for part in ("a", "b"))
    for one, other in ((a["model"], b["model"]), (a["objective"], b["objective"]), (a["ema"][0], b["ema"][0])):
        assert all(torch.isfinite(v).all() for v in one.values())
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(k.startswith(("teacher.", "stage1.")) for k in a["objective"]), "the teacher travels with the checkpoint"


@pytest.mark.parametrize("name", ["sct", "trigflow"])
def test_trigflow_objectives_train_from_scratch(name, tmp_path):
    objective = {"name": "sct", "warmup": 4} if name == "sct" else {"name": name}
    trainer.train(tiny(tmp_path, objective=objective, network={"precond": "trigflow", "c_noise": "t"}))
    state = checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    if name == "sct":
        assert state["objective"]["weight.linear.weight"].abs().sum() > 0  # the weighting is trained too


def test_a_teacher_of_another_kind_is_named(teachers, tmp_path):
    settings = {"objective": {"name": "cd", "teacher": teachers}}
    with pytest.raises(ConfigError, match=r"another network: model\.map_label\.bias has no place"):
        trainer.Trainer(tiny(tmp_path, **settings))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        trainer.Trainer(tiny(tmp_path, objective={"name": "cd", "teacher": "nowhere.ckpt"}))


def test_pixel_normalised_adagn():
    """Scale and shift have unit root mean square over channels, whatever the embedding's size."""
    torch.manual_seed(0)
    block = networks.layers.UNetBlock(
        8, 8, emb_channels=4, init=networks.layers.xavier, zero_scale=1, attention_scale=1, eps=1e-6,
        scale_shift_norm=True, pixel_norm=True,
    ).eval()  # fmt: skip
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    assert torch.allclose(block(x, 10 * emb), block(x, 1000 * emb), atol=1e-3)
    block.pixel_norm = False
    assert not torch.allclose(block(x, 10 * emb), block(x, 1000 * emb), atol=1.0)
