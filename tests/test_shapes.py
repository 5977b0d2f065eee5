"""Every objective and sampler takes data of any shape; how a sample's elements are arranged changes no number."""

import functools
import math

import pytest
import torch
from conftest import TAUGHT

import config
import sampler
from config.schema import FLOW_MAPS
from objectives.draws import Draws
from training.build import build_objective

B = 8
SHAPES = [(B,), (B, 2), (B, 5, 3), (B, 1, 4, 4), (B, 2, 3, 4, 4)]
SETTINGS = {"cmt": {"steps": 4}, "sct": {"warmup": 0}, "scd": {"warmup": 0}, "soflow": {"velocity_share": 0.3}}
NAMES = [name for name in config.kinds("objective") if name != "autoencoder"]  # which is of images alone


class Model(torch.nn.Module):
    """Works on each element alone, so that an arrangement cannot matter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def forward(self, x, sigma, state=None):
        s = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        shift = 0 if state is None else state.mean(1).reshape(s.shape)
        return self.scale * torch.tanh(x / (1 + s)) + 0.1 * x / (1 + s**2) + shift


@functools.cache
def elements(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.rand(B, 7, generator=generator).double()


class FlowMap(Model):
    """The same for a flow map, told two times."""

    def forward(self, z, t, r, state=None):
        apart = (1 + t - r).to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        return super().forward(z, t, state) * apart


def kind(name):
    """The stand-in that an objective trains."""
    return FlowMap if name in FLOW_MAPS else Model


def build(name, model):
    needs_teacher = name in TAUGHT
    raw = {"name": name, **SETTINGS.get(name, {}), **({"teacher": "unread.ckpt"} if needs_teacher else {})}
    cfg = config.parse({"objective": raw, "train": {"steps": 100}})
    return build_objective(cfg, model, Model() if needs_teacher else None).double()


def run(name, x, state):
    """Loss, gradient and logs of a step in the middle of a run."""
    model = kind(name)()
    objective = build(name, model)
    out = objective(model, x, step=50, draws=Draws(3, B), state=state)
    assert out.loss.shape == (B,)
    out.loss.mean().backward()
    if hasattr(objective, "after_step"):
        objective.after_step(model, step=50)
    logs = {
        k: float(torch.as_tensor(v[0] / v[1].clamp(min=1) if isinstance(v, tuple) else v).detach())
        for k, v in out.log.items()
    }
    return out.loss.mean().item(), model.scale.grad.item(), logs


def test_every_objective_is_here():
    assert len(NAMES) == 15


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_objective_takes_any_shape(name, shape):
    x, state = elements(shape)
    loss, gradient, logs = run(name, x, state)
    assert math.isfinite(loss) and gradient != 0 and all(map(math.isfinite, logs.values()))
    flat = run(name, x.reshape(B, -1), state)  # the draws are the same numbers, in the same order
    assert (loss, gradient) == pytest.approx(flat[:2], rel=1e-10) and logs == pytest.approx(flat[2], rel=1e-10)
    assert run(name, x, state + 1)[0] != loss  # conditions reach the model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", ["one step", "multistep", "heun", "dpm", "guided"])
def test_a_sampler_takes_any_shape(solver, shape):
    def draw(z, state):
        with torch.no_grad():
            if solver in ("one step", "multistep"):
                noise = elements(shape)[0].flip(0).reshape(z.shape)
                sigmas = [80.0] if solver == "one step" else [80.0, 3.0, 0.5]
                return sampler.multistep(Model(), z, sigmas, lambda i: noise * i, state=state)
            if solver == "heun":
                return sampler.heun(Model(), z, [80.0, 3.0, 0.5], state=state)
            if solver == "dpm":
                points, _, end = sampler.dpm_solver_trajectory(Model(), 80 * z, 5, state=state)
                assert points.shape == (5, *z.shape)
                return end
            labelled = lambda x, sigma, class_labels=None: Model()(x, sigma, class_labels)  # noqa: E731
            return sampler.heun(sampler.guided(labelled, 2.0), z, [80.0, 0.5], class_labels=state)

    z, state = elements(shape)
    x = draw(z, state)
    assert x.shape == shape and torch.isfinite(x).all() and x.dtype == torch.float64
    assert torch.allclose(x.reshape(B, -1), draw(z.reshape(B, -1), state), rtol=1e-10)
    alone = draw(z, state.index_fill(0, torch.tensor([2]), 0.0))  # a sample sees its own condition alone
    changed = (alone - x).reshape(B, -1).abs().amax(1) > 0
    assert changed.tolist() == [i == 2 for i in range(B)]
