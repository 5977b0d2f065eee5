"""Guidance of flow maps against the originals' formulas, and what the passes of a step share."""

import pytest
import torch
from conftest import Map, every_objective, golden, relative_error, tiny, trained, trained_on_velocity

import networks
from objectives import ImprovedMeanFlow, MeanFlow, SoFlow
from objectives.common import append_dims
from objectives.draws import Draws
from objectives.schedules import soflow_guidance, soflow_rho
from training import trainer
from training.build import build_objective

MEANFLOW, SOFLOW, IMF = (golden(f"{name}_losses")["coef"] for name in ("meanflow", "soflow", "imf"))
LABELS = torch.eye(3, dtype=torch.float64).repeat(8, 1)  # of 24 samples
X, NOISE = (torch.randn(24, 2, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))


class Seen(Map):
    """Remembers what each call was told."""

    def __init__(self, coef, told=False):
        super().__init__(coef, told)
        self.calls = []

    def forward(self, z, t, r, **conditions):
        if type(z) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(z):
            self.calls.append((z, t, r, conditions))
        return super().forward(z, t, r, **conditions)


@pytest.mark.parametrize(
    ("w", "kappa", "interval"), [(1.0, 0.5, (0.0, 1.0)), (0.2, 0.92, (0.0, 0.4)), (2.5, 0.0, (0.1, 1.0))]
)
def test_guided_meanflow_is_the_originals_formula(w, kappa, interval):
    """Gsunshine/meanflow's guidance_fn, cond_drop and forward, written out again."""
    model = Seen(MEANFLOW)
    objective = MeanFlow(guidance=w, kappa=kappa, interval=interval, label_dropout=0.3, ratio=0.4)
    loss, gradient = trained(objective, model, X, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    z, t, r, told = model.calls[0]
    dropped = told["class_labels"].sum(1) == 0
    assert 0 < dropped.sum() < 14 and torch.equal(dropped, torch.arange(24) < dropped.sum())  # from the front
    assert (r == t)[:14].all() and (r < t)[14:].any()  # int(0.6 * 24) rows, and a drawn r above t
    inside = append_dims((t >= interval[0]) & (t <= interval[1]) & ~dropped, z)
    with torch.no_grad():
        null, own = model(z, t, t, class_labels=0 * LABELS), model(z, t, t, class_labels=LABELS)
        v = NOISE - X
        v = v + inside * ((w - 1) * v + (1 - w - kappa) * null + kappa * own)
    wanted = trained_on_velocity(model, z, t, r, v, v, 0.75, 1e-3, class_labels=told["class_labels"])
    assert relative_error(loss, wanted[0]) < 1e-10 and relative_error(gradient, wanted[1]) < 1e-10


def test_a_guided_teacher_is_asked_in_the_networks_place():
    model, teacher = Seen(MEANFLOW), Map(MEANFLOW + 0.2)
    objective = MeanFlow(guidance=2.0, teacher=teacher, ratio=0.4)
    loss, _ = trained(objective, model, X, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    z, t, r, told = model.calls[0]
    with torch.no_grad():
        kept, null = teacher(z, t, t, **told), teacher(z, t, t)
        v = torch.where(told["class_labels"].sum(1).reshape(-1, 1, 1) == 0, kept, null + 2 * (kept - null))
    assert relative_error(loss, trained_on_velocity(model, z, t, r, v, v, 0.75, 1e-3, **told)[0]) < 1e-10


@pytest.mark.parametrize(("share", "mix"), [(0.0, 0.25), (0.5, 0.25), (0.75, 1.0)])
def test_guided_soflow_is_the_originals_formula(share, mix):
    """zlab-princeton/SoFlow's get_velocity_loss and get_consistency_loss, written out again."""
    model = Seen(SOFLOW)
    objective = SoFlow(
        100, (0.1, 0.002), velocity_share=share, guidance=3.0, mix=mix, label_dropout=0.3, p=1.0, eps=0.01
    )
    loss, gradient = trained(objective, model, X, noise=NOISE, draws=Draws(4, 24), class_labels=LABELS, step=50)
    z, t, r, told = model.calls[0]
    labels, count = told["class_labels"], int(share * 24)
    dropped = labels.sum(1) == 0
    assert 0 < dropped.sum() < 24 and dropped[dropped.sum() :].any()  # anywhere
    assert torch.equal(r == t, torch.arange(24) < count)
    g = soflow_guidance(t, 0.8)
    model.zero_grad()
    u = model(z, t, r, class_labels=labels)
    with torch.no_grad():
        v, null, own = NOISE - X, model(z, t, t), model(z, t, t, class_labels=LABELS)
        v_g = mix * (v + append_dims(g, z) * 2 * (v - null)) + (1 - mix) * own
        v_g = torch.where(append_dims(dropped, z) > 0, v, v_g)
        l = torch.minimum(t + (r - t) * soflow_rho(50, 100, (0.1, 0.002)), t - 1e-4)  # noqa: E741
        z_l = z + v_g * append_dims(l - t, z)
        f_t = z + append_dims(r - t, z) * u
        f_l = z_l + append_dims(r - l, z) * model(z_l, l, r, class_labels=labels)
        q = (f_t - f_l) / append_dims(t - l, z)
    mean = lambda a: a.flatten(1).mean(1)  # noqa: E731
    velocity_part, consistency = mean((u - v_g) ** 2), -mean(u * q) / (mean(q**2) + 0.01)
    velocity_part = velocity_part / (velocity_part.detach() + 0.01)
    total = torch.where(torch.arange(24) < count, velocity_part, consistency)
    total.mean().backward()
    assert relative_error(loss, total.detach()) < 1e-8 and relative_error(gradient, model.coef.grad) < 1e-8


def test_soflows_guidance_fades_as_in_the_original():
    t = torch.tensor([0.1, 0.8, 0.9, 0.99, 1.0]).double()
    a = (1 - t[2:4]) / 0.2
    wanted = torch.tensor([1, 1, *(1 - (-0.025 * a / (1 - a)).exp()).tolist(), 0]).double()
    assert torch.allclose(soflow_guidance(t, 0.8), wanted, rtol=1e-10)
    assert torch.equal(soflow_guidance(t, 1.0), torch.ones(5).double())


@pytest.mark.parametrize("heads", [1, 2])
def test_guided_imf_is_the_originals_formula(heads):
    """Lyy-iiis/imeanflow's guidance_fn, cond_drop and forward, written out again."""
    model = Seen(IMF[: 3 * heads], told=True)
    objective = ImprovedMeanFlow(guidance=8.0, label_dropout=0.3)
    loss, gradient = trained(objective, model, X, noise=NOISE, draws=Draws(3, 24), class_labels=LABELS)
    z, t, r, told = model.calls[0]
    labels, w, (low, high) = told["class_labels"], told["guidance"], told["interval"].T
    dropped, equal = labels.sum(1) == 0, torch.arange(24) < 12
    assert torch.equal(dropped, torch.arange(24) < dropped.sum()) and 0 < dropped.sum() < 12
    assert (r == t)[:12].all() and (r < t)[12:].all()
    assert (w >= 1).all() and (w <= 8).all() and w.unique().numel() == 24
    assert (low[equal] == 0).all() and (high[equal] == 1).all() and (low[~equal] > 0).all()
    assert (low <= 0.5).all() and (high >= 0.5).all() and (high[~equal] < 1).all()

    def predicted(labels, w):
        whole = torch.tensor([0.0, 1.0]).double().expand(24, 2)
        asked = {"class_labels": labels, "guidance": w, "interval": whole}
        return model.both(z, t, t, **asked)[1] if heads == 2 else model(z, t, t, **asked)

    with torch.no_grad():
        v, inside = NOISE - X, torch.where((t >= low) & (t <= high), w, 1.0)
        own, null = predicted(LABELS, inside), predicted(None, torch.ones(24).double())
        v_g = torch.where(append_dims(dropped, z) > 0, v, v + append_dims(1 - 1 / inside, z) * (own - null))
    wanted, total = trained_on_velocity(model, z, t, r, v_g, own, 1.0, 0.01, **told)
    if heads == 2:
        model.zero_grad()
        square = (model.both(z, t, r, **told)[1] - v_g).square().flatten(1).sum(1)
        head = square / (square.detach() + 0.01)
        head.mean().backward()
        wanted, total = wanted + head.detach(), total + model.coef.grad
    assert relative_error(loss, wanted) < 1e-10 and relative_error(gradient, total) < 1e-10


TIMES = {"P_mean_t": 0.5, "P_std_t": 0.7, "P_mean_r": -1.0, "P_std_r": 0.7, "p": 0.5, "eps": 0.1}
GUIDED = {"guidance": 3.0, "label_dropout": 0.9}
CHANGES = {  # another value of every option
    "flow": {"P_mean": 0.5, "P_std": 0.7},
    "meanflow": {
        **TIMES, **GUIDED, "sampler": "v0", "ratio": 0.2, "flow": 3, "derivative": "difference", "kappa": 0.5,
        "interval": [0.4, 0.6],
    },
    "soflow": {
        **TIMES, **GUIDED, "rho": [0.5, 0.1], "schedule": "linear", "difference": "forward_mode", "velocity_share": 0.5,
        "P_mean_v": 0.5, "P_std_v": 0.7, "mix": 0.7, "fade": 0.2,
    },
    "imf": {"P_mean": 0.5, "P_std": 0.7, "equal_share": 0.1, "p": 0.5, "eps": 0.1, **GUIDED},
}  # fmt: skip
OF_GUIDED = ("label_dropout", "kappa", "interval", "mix", "fade")  # options that need guidance


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, changes in CHANGES.items() for option in changes]
)
def test_every_option_reaches_the_loss(name, option, tmp_path):
    usual = {"guidance": 2.0} if option in OF_GUIDED else {}
    if option in ("P_mean_v", "P_std_v"):
        usual["velocity_share"] = 0.5
    seen = []
    for options in (usual, {**usual, option: CHANGES[name][option]}):
        cfg = tiny(tmp_path, objective={"name": name, **options}, data={"conditional": True})
        model = Map(IMF if name == "imf" else MEANFLOW, told=cfg.network.guidance_inputs)
        objective = build_objective(cfg, model)
        loss, gradient = trained(objective, model, X, draws=Draws(0, 24), class_labels=LABELS, step=2)
        seen.append([*loss.tolist(), *gradient.tolist()])
    assert seen[1] != pytest.approx(seen[0], rel=1e-5)
    untried = set(type(cfg.objective).model_fields) - {"name", "teacher"} - set(CHANGES[name])
    assert not untried, "give these options another value in CHANGES"


def test_guidance_needs_labels():
    with pytest.raises(ValueError, match="guidance needs class_labels"):
        MeanFlow(guidance=2.0)(Map(MEANFLOW), X)


# What passes share ----------------------------------------------------------------------------------------------------


class OneByOne(Map):
    """Has no dropout, and says so: the rows that need no second pass are left out of it."""

    model = torch.nn.Identity()
    model.dropout = 0


@pytest.mark.parametrize(
    ("objective", "coef"),
    [
        (MeanFlow(guidance=2.0, ratio=0.3), IMF[:3]),
        (SoFlow(100, velocity_share=0.6), IMF[:3]),
        (SoFlow(100, velocity_share=0.6, guidance=2.0, difference="forward_mode"), IMF[:3]),
        (ImprovedMeanFlow(equal_share=0.7), IMF),
    ],
    ids=["meanflow", "soflow", "soflow guided", "imf"],
)
def test_rows_that_need_no_second_pass_change_nothing(objective, coef, monkeypatch):
    given = {"noise": NOISE, "draws": None, "class_labels": LABELS, "step": 30}
    results = [trained(objective, kind(coef), X, **{**given, "draws": Draws(3, 24)}) for kind in (Map, OneByOne)]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*results, strict=True))
    sizes = []
    real = OneByOne.forward
    monkeypatch.setattr(
        OneByOne, "forward", lambda self, z, *rest, **more: sizes.append(len(z)) or real(self, z, *rest, **more)
    )
    trained(objective, OneByOne(coef), X, **{**given, "draws": Draws(3, 24)})
    assert max(sizes) == 24 and min(sizes) < 12


@pytest.mark.parametrize("name", ["meanflow", "soflow", "imf"])
@pytest.mark.parametrize("guided", [False, True])
def test_every_pass_of_a_step_drops_the_same_units(name, guided, tmp_path, monkeypatch):
    """What the first block drops is told by its keys; labels are dropped once, and told to both passes."""
    seen, real = [], networks.FlowMap._given

    def looked(self, x, dtype, class_labels=None, *rest, **more):
        given = real(self, x, dtype, class_labels, *rest, **more)
        seen.append((class_labels, given[1]["dropout_keys"]))
        return given

    monkeypatch.setattr(networks.FlowMap, "_given", looked)
    settings = {"objective": {"guidance": 2.0, "label_dropout": 0.4}} if guided else {}
    cfg = every_objective(tmp_path, name, "", network={"dropout": 0.4}, data={"conditional": guided})
    cfg.objective = cfg.objective.model_copy(update=settings.get("objective", {}))
    cfg.network.guidance_inputs = guided and name == "imf"
    run = trainer.Trainer(cfg)
    run.train_step(run.dataset.images[:16], run.dataset.labels[:16] if guided else None)
    (labels, keys), passes = seen[0], seen[1:]
    assert len(keys) == 16 == len(keys.unique()) and passes
    rows = [torch.isin(keys, k) for _, k in passes]  # some passes are of some rows
    assert all(torch.equal(k, keys[chosen]) for (_, k), chosen in zip(passes, rows, strict=True))
    if guided:
        assert 0 < (labels.sum(1) == 0).sum() < 16
        assert torch.equal(passes[-1][0], labels[rows[-1]])  # the last is along the tangent, or at l


@pytest.mark.parametrize("difference", ["two_passes", "forward_mode"])
@pytest.mark.parametrize("name", ["meanflow", "soflow", "imf"])
def test_passes_share_the_mask_of_a_network_that_draws_from_the_global_generator(name, difference):
    masks = []

    class Dropping(Map):
        def forward(self, z, t, r, **conditions):
            masks.append(torch.nn.functional.dropout(torch.ones(z.shape, dtype=z.dtype), 0.5))
            return super().forward(masks[-1] * z, t, r, **conditions)

    more = {"guidance": 2.0, "ratio": 0.5} if name == "meanflow" else {}
    objectives = {
        "meanflow": MeanFlow(**more),
        "soflow": SoFlow(100, velocity_share=0.5, guidance=2.0, difference=difference),
        "imf": ImprovedMeanFlow(),
    }
    torch.manual_seed(0)
    trained(objectives[name], Dropping(IMF if name == "imf" else MEANFLOW), X, draws=Draws(3, 24), class_labels=LABELS)
    assert len(masks) >= 2 and all(torch.equal(mask, masks[0]) for mask in masks)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.nn.functional.dropout(torch.ones_like(X), 0.5)
    assert torch.equal(after, torch.rand(1))  # as if nothing had been drawn twice


def test_the_first_rows_are_those_of_the_global_batch():
    parts = [Draws(5, 8, start, 24) for start in (0, 8, 16)]
    assert [part.first(13) for part in parts] == [8, 5, 0]
    whole = Draws(5, 24).dropped(0.4)
    assert torch.equal(torch.cat([part.dropped(0.4) for part in parts]), whole)
    assert 0 < whole.sum() < 24 and torch.equal(whole, torch.arange(24) < whole.sum())
