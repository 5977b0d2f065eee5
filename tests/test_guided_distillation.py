"""Guided distillation with w told to the student: targets written out, draws, the networks, sampling, and refusals."""

import pytest
import torch
from conftest import Map, every_objective, golden, relative_error, tiny, trained, trained_on_velocity

import checkpoints
import config
import edit
import generate
import networks
from config import ConfigError
from objectives import ConsistencyDistillation, ContinuousConsistency, MeanFlow, losses
from objectives.common import append_dims
from objectives.draws import Draws
from sampling.drawing import Drawing
from training import trainer

LABELS = torch.eye(3, dtype=torch.float64).repeat(8, 1)  # of 24 samples
X, NOISE = (torch.randn(24, 2, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
TOLD = [1.5, 4.0]


class Denoiser(torch.nn.Module):
    """D = a tanh(x) / (1 + sigma) + a label's shift + b ln w sin(x), and remembers what each call was told."""

    def __init__(self, a):
        super().__init__()
        self.coef = torch.nn.Parameter(torch.tensor([a, 0.3], dtype=torch.float64))
        self.calls = []

    def forward(self, x, sigma, class_labels=None, **told):
        a, b = self.coef
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            self.calls.append((x.detach(), sigma, class_labels, told))
        shift = 0 * sigma if class_labels is None else class_labels @ x.new_tensor([0.3, -0.2, 0.5])
        D = a * torch.tanh(x) / append_dims(1 + sigma, x) + append_dims(shift, x)
        return D + append_dims(told["guidance"].log(), x) * b * x.sin() if told else D


def weights(model):
    """What each call of the student was told: the same for all, one number a sample between the ends of TOLD."""
    told = [call[3]["guidance"] for call in model.calls]
    assert all(torch.equal(w, told[0]) for w in told)
    w = told[0]
    assert w.shape == (24,) and w.unique().numel() == 24 and TOLD[0] <= w.min() < 2 and 3.2 < w.max() <= TOLD[1]
    return w


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_cds_target_is_a_guided_step_of_the_teacher(solver):
    """LCM's algorithm 1 in EDM's clock, with our w: the teacher's D is D_null + w (D - D_null) at both ends."""
    model, teacher = Denoiser(1.0), Denoiser(0.7)
    objective = ConsistencyDistillation(model, teacher, losses.l2, N=18, solver=solver, guidance=TOLD)
    loss, gradient = trained(objective, model, X, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    x_high, high, _, _ = model.calls[0]
    x_low, low, _, _ = objective.target.calls[0]
    w = weights(model)
    assert torch.equal(objective.target.calls[0][3]["guidance"], w)
    assert all(not told for *_, told in teacher.calls) and len(teacher.calls) == (4 if solver == "heun" else 2)
    wide = lambda v: v.reshape(-1, 1, 1)  # noqa: E731

    def slope(x, sigma):
        with torch.no_grad():
            D, null = teacher(x, sigma, LABELS), teacher(x, sigma)
        return (x - (null + wide(w) * (D - null))) / wide(sigma)

    first = slope(x_high, high)
    wanted = x_high + wide(low - high) * first
    if solver == "heun":
        wanted = x_high + wide(low - high) * (first + slope(wanted, low)) / 2
    assert relative_error(x_low, wanted) < 1e-10
    model.zero_grad()
    with torch.no_grad():
        target = objective.target(wanted, low, LABELS, guidance=w)
    by_hand = (model(x_high, high, LABELS, guidance=w) - target).square().flatten(1).mean(1)
    by_hand.mean().backward()
    assert relative_error(loss, by_hand.detach()) < 1e-10 and relative_error(gradient, model.coef.grad) < 1e-10


def test_scds_tangent_is_the_guided_teachers():
    sd, model, teacher = 0.5, Denoiser(1.0), Denoiser(0.7)
    objective = ContinuousConsistency(sd, warmup=0, teacher=teacher, guidance=TOLD, weight=lambda t: 0 * t)
    loss, gradient = trained(objective, model, X, step=1, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    w, t = weights(model), torch.atan(model.calls[0][1] / sd)
    cos, sin = append_dims(t.cos(), X), append_dims(t.sin(), X)
    x_t = cos * X + sin * sd * NOISE
    with torch.no_grad():
        D, null = teacher(x_t / cos, sd * t.tan(), LABELS), teacher(x_t / cos, sd * t.tan())
        dxdt = (cos * x_t - null - append_dims(w, X) * (D - null)) / sin

    def F(x, t):
        cos, sin = append_dims(t.cos(), x), append_dims(t.sin(), x)
        return (cos * x - model(x / cos, sd * t.tan(), LABELS, guidance=w)) / (sin * sd)

    with torch.no_grad():
        F_t, dF = torch.func.jvp(F, (x_t, t), (dxdt, torch.ones_like(t)))
        g = -(cos**2) * (sd * F_t - dxdt) - cos * sin * (x_t + sd * dF)
        g = g / append_dims(g.flatten(1).norm(dim=1) + 0.1, g)
    model.zero_grad()
    by_hand = (F(x_t, t) - F_t - g).square().flatten(1).mean(1)
    by_hand.mean().backward()
    assert relative_error(loss, by_hand.detach()) < 1e-10 and relative_error(gradient, model.coef.grad) < 1e-10


class Told(Map):
    """A flow map that is told w alone."""

    calls = ()

    def forward(self, z, t, r, guidance=None, **conditions):
        if type(z) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(z):
            self.calls = [*self.calls, (z, t, r, {"guidance": guidance, **conditions})]
        shift = 0 if guidance is None else append_dims(guidance.log(), z) * self.coef[2] * z.sin()
        return super().forward(z, t, r, **conditions) + shift


@pytest.mark.parametrize("taught", [False, True])
def test_meanflows_target_is_guided_by_the_w_that_is_told(taught):
    coef = golden("meanflow_losses")["coef"]
    model, teacher = Told(coef), Told(coef + 0.2) if taught else None
    objective = MeanFlow(guidance=TOLD, interval=(0.1, 1.0), label_dropout=0.3, ratio=0.4, teacher=teacher)
    loss, gradient = trained(objective, model, X, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    z, t, r, told = model.calls[0]
    w, labels = weights(model), told["class_labels"]
    kept = append_dims((labels.sum(1) > 0) & (t >= 0.1), z) > 0
    assert 0 < kept.sum() < 24 and (not taught or all(call[3]["guidance"] is None for call in teacher.calls))
    with torch.no_grad():
        v = teacher(z, t, t, class_labels=labels) if taught else NOISE - X
        null = teacher(z, t, t) if taught else model(z, t, t, guidance=w)
        v = torch.where(kept, append_dims(w, z) * v + append_dims(1 - w, z) * null, v)
    wanted = trained_on_velocity(model, z, t, r, v, v, 0.75, 1e-3, **told)
    assert relative_error(loss, wanted[0]) < 1e-10 and relative_error(gradient, wanted[1]) < 1e-10


def test_each_sample_has_its_w_whatever_the_split():
    whole = Draws(5, 24).told(TOLD, torch.float32)["guidance"]
    parts = [Draws(5, 8, start, 24).told(TOLD, torch.float32)["guidance"] for start in (0, 8, 16)]
    assert torch.equal(torch.cat(parts), whole)
    many = Draws(6, 40_000).told(TOLD, torch.float32)["guidance"]
    assert many.mean().item() == pytest.approx(2.75, abs=0.02) and many.std().item() == pytest.approx(0.7217, abs=0.01)
    assert Draws(5, 24).told(2.0, torch.float32) == Draws(5, 24).told(None, torch.float32) == {}
    drawn = Draws(5, 24)
    drawn.told(2.0, torch.float32)
    assert torch.equal(drawn.uniform((24,)), Draws(5, 24).uniform((24,)))  # one weight for all draws nothing


# The networks -------------------------------------------------------------------------------------------------------

UNET = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
DIT = {"hidden": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
NETS = {
    "song": {"name": "song_unet", **UNET},
    "ncsn": {"name": "song_unet", **UNET, "embedding_type": "fourier", "c_noise": "log"},
    "adm": {"name": "dhariwal_unet", **UNET, "channels_per_head": 8, "precond": "cm", "c_noise": "log250"},
    "edm2": {"name": "edm2_unet", **UNET, "channels_per_head": 8},
    "dit": {"name": "dit", **DIT},
}
IMAGES, SIGMA = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0.1, 0.6, 3.0, 40.0])
CLASSES = {"class_labels": torch.eye(3)[[0, 1, 2, 0]]}
SHAPE = {"resolution": 8, "channels": 1, "label_dim": 3}


def stirred(model):
    """The model with weights that all matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return model.eval().requires_grad_(False)


def settings(net, told, **objective):
    raw = {"name": "cd", "teacher": "x", "guidance": [1, 4] if told else None, **objective}
    return config.parse({"network": NETS[net], "objective": raw, "data": {"conditional": True}})


def made(net, told, **objective):
    """(config, model)."""
    cfg = settings(net, told, **objective)
    torch.manual_seed(0)
    return cfg, stirred(networks.build(cfg.network.model_dump(), **SHAPE))


def saved(path, cfg, model, trained=True):
    """The checkpoint of a model that was trained by cfg."""
    data = {"shape": {**SHAPE, "augment_dim": 0}, "class_counts": [1] * 3, "scaling": None}
    own = model.state_dict()
    rest = {"objective": {}, "optimizer": {"state": 1} if trained else {}, "scaler": {}}
    state = {"step": 1, "config": cfg.model_dump(), "data": data, "model": own, "ema": [own], **rest}
    checkpoints.write_state(path, state)
    return path


@pytest.mark.parametrize("net", NETS)
def test_every_network_is_told_w_and_starts_as_its_teacher(net, tmp_path):
    """At the start w changes nothing and D is the teacher's bit for bit but for rounding; trained, it matters."""
    cfg, plain = made(net, told=False)
    assert cfg.network.guidance_inputs is False and "guidance_inputs" in cfg.network.model_dump()
    student = networks.build(settings(net, told=True).network.model_dump(), **SHAPE).eval().requires_grad_(False)
    assert checkpoints.initialise(student, saved(tmp_path / "t.ckpt", cfg, plain)) == ""
    w, D = torch.tensor([1.0, 2.0, 3.0, 4.0]), plain(IMAGES, SIGMA, **CLASSES)
    assert relative_error(student(IMAGES, SIGMA, **CLASSES, guidance=w), D) < 1e-5
    assert relative_error(student(IMAGES, SIGMA, **CLASSES), D) < 1e-5
    stirred(student)
    at = [student(IMAGES, SIGMA, **CLASSES, guidance=w) for w in (None, 1.0, torch.ones(4), torch.full((4,), 3.0))]
    assert torch.equal(at[0], at[1]) and torch.equal(at[0], at[2])
    assert ((at[3] - at[0]).flatten(1).norm(dim=1) > 1e-3).all()  # in every sample
    alone = student(IMAGES[2:3], SIGMA[2:3], CLASSES["class_labels"][2:3], guidance=w[2:3])
    assert relative_error(alone, student(IMAGES, SIGMA, **CLASSES, guidance=w)[2:3]) < 1e-5  # its own w
    with pytest.raises(ValueError, match="this network is not told guidance"):
        plain(IMAGES, SIGMA, guidance=w)
    with pytest.raises(ValueError, match=r"guidance has shape \(2,\); a batch of 4 needs \(4,\)"):
        student(IMAGES, SIGMA, guidance=w[:2])


@pytest.mark.parametrize("net", NETS)
def test_the_derivative_is_that_of_the_told_network(net):
    """Forward mode at w against differences in float64; w itself stays as it is."""
    _, model = made(net, told=True)
    model = model.double()
    x, sigma, w = IMAGES.double(), SIGMA.double(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    dx, dsigma = torch.ones_like(x), 0.5 * sigma
    told = {"class_labels": CLASSES["class_labels"].double(), "guidance": w}
    D, dD = model.jvp(x, sigma, dx, dsigma, **told)
    at = lambda h: model(x + h * dx, sigma + h * dsigma, **told)  # noqa: E731
    assert relative_error(D, at(0)) < 1e-10 and relative_error(dD, (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-6


def test_what_is_told_is_ln_w_in_the_labels_unit():
    seen = []

    class Echo(torch.nn.Linear):
        def forward(self, x, c_noise, *labels):
            seen.append(c_noise)
            return x

    w, sigma = torch.tensor([1.0, 2.0]), torch.ones(2)
    for c_noise, unit in (("log", 1), ("t", 1), ("log250", 1000)):
        networks.Preconditioner(Echo(1, 1), c_noise=c_noise, guidance_inputs=True)(torch.ones(2, 1), sigma, guidance=w)
        assert torch.allclose(seen[-1][:, 1], unit * torch.tensor([0, 0.6931472]))
        networks.Preconditioner(Echo(1, 1), c_noise=c_noise)(torch.ones(2, 1), sigma)
        assert torch.equal(seen[-1], seen[-2][:, 0])  # the noise label is as without
    with pytest.raises(ValueError, match="the network is told 2 numbers a sample"):
        networks.Preconditioner(networks.MLP((3,), told=2))


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: a teacher that knows the null label, and students that were told [1.5, 4], or guided by 2.

    They are short; their weights are stirred, so that all they are told matters.
    """
    folder = tmp_path_factory.mktemp("runs")
    own = {"data": {"conditional": True}}
    trainer.train(tiny(folder / "teacher", **own, objective={"name": "edm"}, network={"label_dropout": 0.2}))
    taught = {"teacher": str(folder / "teacher/checkpoints/last.ckpt")}
    for name, objective in {
        "cd": {**taught, "N": 6, "mu": 0.5, "guidance": TOLD},
        "scd": {**taught, "warmup": 4, "guidance": TOLD},
        "meanflow": {"guidance": TOLD},
        "fixed": {"name": "cd", **taught, "N": 6, "guidance": 2.0},
    }.items():
        train = {"steps": 2, "save_every": 2}
        network = {"precond": "trigflow"} if name == "scd" else {}
        trainer.train(tiny(folder / name, **own, objective={"name": name, **objective}, train=train, network=network))
        path = folder / name / "checkpoints" / "last.ckpt"
        state = checkpoints.load(path)
        for value in state["ema"][0].values():
            value += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
        checkpoints.write_state(path, state)
    return folder


def sample(run, out, *more, cfg=None):
    options = [*map(str, more), "--num", "12", "--format", "npz", "--out", str(out)]
    return generate.main(
        ["--cfg", str(cfg or run / "config.yml"), "--ckpt", str(run / "checkpoints/last.ckpt"), *options]
    )


@pytest.mark.parametrize("name", ["cd", "scd", "meanflow"])
def test_sampling_chooses_w_in_one_evaluation(runs, name, tmp_path, capsys):
    model = checkpoints.load_model(runs / name / "checkpoints/last.ckpt")
    told, calls = [], model.model.forward
    model.model.forward = lambda x, c, *rest, **more: (
        told.append(c[:, 1 if name != "meanflow" else 2]) or calls(x, c, *rest, **more)
    )
    levels = [1.0] if name == "meanflow" else [80.0]
    drawn = Drawing(
        model, 0, 4, levels, "jumps" if name == "meanflow" else "multistep", torch.zeros(4).long(), guidance=3.0
    )
    drawn.draw(0, 4)
    label = torch.full((4,), 2 / 3 if name == "meanflow" else 3.0)
    assert len(told) == 1 and torch.allclose(told[0], label if name == "meanflow" else label.log())
    assert drawn.nfe == 1
    assert sample(runs / name, tmp_path / "a", "--guidance", 3) == 0
    assert "1 evaluations each, seed 0, guidance 3" in capsys.readouterr().out
    assert sample(runs / name, tmp_path / "b") == 0
    assert "1 evaluations each, seed 0, guidance 1.5" in capsys.readouterr().out  # the least it was told
    a, b = (next((tmp_path / x).rglob("*.npz")).read_bytes() for x in "ab")
    assert a != b


def test_a_mixed_model_says_its_two_evaluations(runs):
    model = checkpoints.load_model(runs / "teacher/checkpoints/last.ckpt")
    made = lambda w: Drawing(model, 0, 4, [80.0, 1.0], "heun", guidance=w).nfe  # noqa: E731
    assert (made(None), made(1.0), made(2.0)) == (3, 3, 6)


@pytest.mark.parametrize(("name", "more", "said"), [
    ("cd", ["--guidance", 5], "sample.guidance: 5 is outside of objective.guidance [1.5, 4.0]"),
    ("cd", ["--guidance", 1], "sample.guidance: 1 is outside of objective.guidance [1.5, 4.0]"),
    ("meanflow", ["--guidance", 5], "sample.guidance: 5 is outside of objective.guidance [1.5, 4.0]"),
    ("meanflow", ["--interval", "0,1"], "sample.interval: objective meanflow tells the network its guidance alone"),
    ("fixed", ["--guidance", 2], "sample.guidance: objective cd is guided in training (objective.guidance)"),
])  # fmt: skip
def test_generate_refuses_a_w_outside_and_guidance_twice(runs, name, more, said, tmp_path, capsys):
    assert sample(runs / name, tmp_path / "a", *more) == 2
    assert said in capsys.readouterr().err


def test_the_checkpoints_own_range_counts_whatever_the_config_says(runs, tmp_path, capsys):
    assert sample(runs / "cd", tmp_path / "b", "--guidance", 8, "objective.guidance=[1, 9]") == 2
    assert "8 is outside of objective.guidance [1.5, 4.0]" in capsys.readouterr().err


def test_sweep_and_edit_are_told_w_once(runs, tmp_path, capsys):
    run = runs / "cd"
    asked = ["--cfg", str(run / "config.yml"), "--ckpt", str(run / "checkpoints/last.ckpt")]
    from PIL import Image

    Image.new("L", (8, 8), 128).save(tmp_path / "a.png")
    more = ["--input", str(tmp_path / "a.png"), "--mask", "0,0,4,4", "--steps", "4", "--num", "2"]
    for w, out in ((1.5, "a"), (4.0, "b")):
        assert edit.main(["inpaint", *asked, *more, "--out", str(tmp_path / out), f"sample.guidance={w}"]) == 0
        assert "2 results, 4 evaluations each" in capsys.readouterr().out
    assert (tmp_path / "a/a_00.png").read_bytes() != (tmp_path / "b/a_00.png").read_bytes()


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "said"), [
    ({"name": "cd", "guidance": [1, 4]}, "guidance needs images|objective.guidance: guides by class labels"),
    ({"name": "soflow", "guidance": [1, 4]}, "objective.guidance: "),
    ({"name": "cd", "guidance": [4, 1]}, "a number from 0, or .w_min, w_max. with 1 <= w_min < w_max"),
    ({"name": "scd", "guidance": [0.5, 4]}, "a number from 0, or .w_min, w_max. with 1 <= w_min < w_max"),
])  # fmt: skip
def test_pairs_that_make_no_sense_are_refused(objective, said):
    data = {"conditional": objective["name"] != "cd" or objective["guidance"] == [4, 1]}
    taught = {} if objective["name"] == "soflow" else {"teacher": "x"}
    with pytest.raises(ConfigError, match=said):
        config.parse({"objective": {**objective, **taught}, "data": data})


def test_what_does_not_go_with_a_pair():
    own = {"data": {"conditional": True}, "objective": {"name": "meanflow", "guidance": [1, 4]}}
    cfg = config.parse(own)
    assert cfg.network.guidance_inputs is True and cfg.sample.guidance == 1 and config.parse(cfg.model_dump()) == cfg
    with pytest.raises(ConfigError, match=r"objective\.kappa: would make the guidance another"):
        config.parse({**own, "objective": {**own["objective"], "kappa": 0.5}})
    with pytest.raises(ConfigError, match=r"network\.guidance_inputs: objective meanflow tells the network its guid"):
        config.parse({**own, "network": {"guidance_inputs": False}})


@pytest.mark.parametrize(("method", "teacher", "said"), [
    ("cd", "ect", r"is a consistency model \(objective ect\); cd needs a diffusion model \(objective edm, trigflow\)"),
    ("cd", "meanflow", r"is a flow model \(objective meanflow\); cd needs a diffusion model"),
    ("cd", "pd", r"is distilled already \(objective pd\); cd needs a diffusion model"),
    ("scd", "sct", r"is a consistency model \(objective sct\); scd needs a diffusion model"),
    ("cmt", "ict", r"is a consistency model \(objective ict\); cmt needs a diffusion model"),
    ("pd", "cd", r"is a consistency model \(objective cd\); pd needs a diffusion model \(objective edm, tr"),
    ("meanflow", "ct", r"is a consistency model \(objective ct\); meanflow needs a diffusion or flow model"),
    ("tcm", "flow", r"is a flow model \(objective flow\); tcm needs a consistency model"),
    ("tcm", "edm", r"is a diffusion model \(objective edm\); tcm needs a consistency model \(objective ect or ict\)"),
    *((name, right, None) for name, right in (
        ("cd", "edm"), ("tcm", "ect"), ("tcm", "ict"), ("tcm", "cd"), ("pd", "pd"),
        ("scd", "trigflow"), ("meanflow", "flow"),
    )),
])  # fmt: skip
def test_a_teacher_of_another_kind_is_refused(method, teacher, said, tmp_path):
    path = tmp_path / "t.ckpt"
    other = every_objective(tmp_path, teacher, "x", data={"conditional": True})
    model = networks.build(other.network.model_dump(), **{**SHAPE, "label_dim": 10})
    saved(path, other, model)
    state = checkpoints.load(path)
    state["data"] |= {"shape": {**SHAPE, "label_dim": 10, "augment_dim": 0}, "class_counts": [1] * 10}
    checkpoints.write_state(path, state)
    cfg = every_objective(tmp_path / "run", method, str(path), data={"conditional": True})
    if method == "meanflow":
        cfg = tiny(tmp_path / "run", objective={"name": "meanflow", "teacher": str(path)}, data={"conditional": True})
    if said is None:
        trainer.Trainer(cfg)
        return
    with pytest.raises(ConfigError, match=rf"objective\.teacher: {path}: {said}"):
        trainer.Trainer(cfg)


def test_guidance_of_a_guided_or_unknowing_teacher_is_refused(runs, tmp_path):
    own = {"data": {"conditional": True}}
    guided = str(runs / "meanflow/checkpoints/last.ckpt")
    asked = {"name": "meanflow", "teacher": guided, "guidance": 2.0}
    with pytest.raises(ConfigError, match=r"is guided already \(objective.guidance \[1.5, 4.0\]\)"):
        trainer.Trainer(tiny(tmp_path / "a", **own, objective=asked))
    trainer.train(tiny(tmp_path / "t", **own, objective={"name": "edm"}, train={"steps": 2, "save_every": 2}))
    asked = {"name": "cd", "N": 6, "teacher": str(tmp_path / "t/checkpoints/last.ckpt"), "guidance": [1, 4]}
    with pytest.raises(ConfigError, match="never saw the null label"):
        trainer.Trainer(tiny(tmp_path / "b", **own, objective=asked))


def test_nearest_of_too_few_samples_is_bad_input(runs, tmp_path, capsys):
    run = runs / "teacher"
    asked = ["--cfg", str(run / "config.yml"), "--ckpt", str(run / "checkpoints/last.ckpt"), "--num", "8", "--nearest"]
    assert generate.main([*asked, "--out", str(tmp_path / "a")]) == 2
    assert "--nearest: 8 samples are too few" in capsys.readouterr().err and not (tmp_path / "a").exists()
