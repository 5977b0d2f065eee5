"""Devices that are not here: every objective's step on tensors that only say where they are, on `cuda` and on `mps`.

FakeTensorMode knows shape, dtype and device of every result, and fails where two devices meet or a value is read.
"""

import itertools

import pytest
import torch
from conftest import EVERY, TAUGHT, analytic, every_objective
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import checkpoints
import config
from objectives import ct, draws, ect, ict, pd, soflow, tcm
from objectives.schedules import ect_pair
from sources.augment import _doubling
from sources.codecs import ImageCodec
from training.build import build_model, build_objective, load_teacher
from training.devices import pick_precision
from training.step import TrainingStep


class Rules(TorchDispatchMode):
    """Refuses what the device has not (float64 on mps) and, once `running`, what makes a host wait for a GPU."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.running = kind, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor)]
        there = [t for t in tensors if t.device.type == "cuda"]
        if self.kind == "mps":
            assert all(t.dtype != torch.float64 for t in there), f"{function} makes float64 on mps"
        elif self.running and function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            crosses = source.device.type != tensors[0].device.type
            assert not (crosses and waits), f"{function} from {source.device} to {tensors[0].device} waits"
        return out


class NoGenerator:
    """Stands for a torch.Generator, which wants a driver; None is the device's own."""

    def __init__(self, device: object = None):
        pass

    def manual_seed(self, seed: int) -> None:
        return None


def moved(module: torch.nn.Module, move) -> torch.nn.Module:
    """Module._apply, which cannot swap fake parameters in their place: new ones."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = p if p is None else torch.nn.Parameter(move(p.data), requires_grad=p.requires_grad)
        part._buffers.update({name: b if b is None else move(b) for name, b in part._buffers.items()})
    return module


def copied(tensor: FakeTensor, memo: dict) -> torch.Tensor:
    """Tensor.__deepcopy__, which would copy the mode too."""
    new = tensor.detach().clone()
    memo[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new
    return memo[id(tensor)]


def backward(loss: torch.Tensor) -> None:
    """Tensor.backward node by node, as torch's engine does it; that one asks the driver for the device's streams."""
    order, todo = {}, [(loss.grad_fn, False)]
    while todo:
        node, done = todo.pop()
        if done:
            order[node] = [None] * len(node._input_metadata)
        elif node not in order:
            todo += [
                (node, True),
                *((next_, False) for next_, _ in node.next_functions if next_ and next_ not in order),
            ]
    nodes = list(dict.fromkeys(reversed(order)))
    order[loss.grad_fn][0] = torch.ones_like(loss)
    with torch.no_grad():
        for node in nodes:
            found = node(*order.pop(node))
            if node.name().endswith("AccumulateGrad"):
                continue
            for (next_, i), grad in zip(
                node.next_functions, found if isinstance(found, tuple) else (found,), strict=True
            ):
                if next_ is None or grad is None:
                    continue
                like = next_._input_metadata[i]
                assert grad.device == like.device, (
                    f"{node.name()} of a tensor on {like.device} gives one on {grad.device}"
                )
                grad = grad.sum_to_size(like.shape).to(like.dtype)
                order[next_][i] = grad if order[next_][i] is None else order[next_][i] + grad


@pytest.fixture(params=["cuda", "mps"])
def kind(request, monkeypatch):
    """What the device is to be: `cuda`, or `mps`, for which `cuda` stands in, as torch cannot fake mps everywhere."""
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr(torch.nn.Module, "_apply", moved)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(tcm, "truncated_student_t", lambda *law: torch.zeros(4097, dtype=torch.float64))  # by scipy
    if request.param == "mps":
        for module, name in itertools.product((ct, ect, ict, pd, soflow, tcm), ("wide", "home")):
            answer = getattr(draws, name)(torch.device("mps"))
            monkeypatch.setattr(module, name, lambda device, answer=answer: answer, raising=False)
    _doubling.cache_clear()  # a table of this test's fakes
    yield request.param
    _doubling.cache_clear()


def fake_step(cfg: config.Config, device: torch.device, precision: str, monkeypatch) -> TrainingStep:
    """The step of a config on the device; its teacher has fresh weights."""

    def codec():
        return ImageCodec(8, 1, 10 if cfg.data.conditional else 0, 9, augment=cfg.data.augment).to(device)

    def teacher(state, path):
        untaught = cfg.model_copy(update={"objective": config.parse(state["config"]).objective})
        return build_model(untaught, codec(), device, "fp32").eval()

    monkeypatch.setattr(checkpoints, "initialise", lambda model, path: None)
    imported = {"config": {"objective": {"name": TAUGHT.get(cfg.objective.name, "edm")}}, "optimizer": None}
    monkeypatch.setattr(checkpoints, "load", lambda path: imported)
    monkeypatch.setattr(checkpoints, "model_from", teacher)
    model = build_model(cfg, codec(), device, precision)
    objective = build_objective(cfg, model, load_teacher(cfg, model)).to(device)
    with monkeypatch.context() as patch:
        patch.setattr(
            FakeTensor, "__bool__", lambda tensor: True, raising=False
        )  # the optimizer asks if its rate is one
        return TrainingStep(cfg, model.codec, model, objective, precision)


CASES = [(name, {}) for name in EVERY]
CASES += [(name, {"difference": "forward_mode"}) for name in ("ect", "ict", "soflow")]
CASES += [(name, {"guidance": 2.0}) for name in ("meanflow", "soflow", "imf")]
CASES += [("cd", {"solver": "euler"}), ("tcm", {"weighting": "c_out"})]


@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_step_stays_on_its_device_and_reads_nothing_back(name, more, kind, tmp_path, monkeypatch):
    """Forward, backward, update, after_step and EMA, twice; dropout, labels, augmentation, clipping."""
    data = {"augment": 0.5, "conditional": True}
    train = {"grad_clip": 1.0, "precision": "auto"}
    cfg = every_objective(tmp_path, name, "teacher.ckpt", data=data, train=train)
    cfg.objective = cfg.objective.model_copy(update=more)
    if name not in TAUGHT and "guidance" not in more:
        cfg.network.label_dropout = 0.2
    cfg.network.guidance_inputs = name == "imf" and "guidance" in more
    device = torch.device("cuda", 0)
    with FakeTensorMode(), Rules(kind) as rules:
        step = fake_step(cfg, device, "bf16" if kind == "cuda" else "fp32", monkeypatch)
        images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8, device=device)
        labels = torch.zeros(16, dtype=torch.int64, device=device)
        step(images, labels)  # tables that are made once may wait
        if kind == "cuda":
            rules.running = True
            step(images, labels)
        assert step.step == 1 + (kind == "cuda") and step.flat.vector.device == device
        state = {**step.model.state_dict(), **step.objective.state_dict(), **step.emas[0].module.state_dict()}
        assert all(value.device == device for value in state.values())


def test_the_rules_see_what_they_refuse(kind, monkeypatch):
    """Mixed devices, values read, copies that wait, float64 where there is none; and `backward` is the engine's."""
    with FakeTensorMode(), Rules(kind) as rules:
        x = torch.randn(3, device="cuda")
        rules.running = True
        for call in (lambda: x + torch.ones(3), lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x[x > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                call()
        refused = (
            (x.cpu, lambda: torch.ones(3).cuda()) if kind == "cuda" else (x.double, lambda: x.new_ones(3).double())
        )
        for call in refused:
            with pytest.raises(AssertionError, match=r"waits|float64"):
                call()
        torch.ones(3).to("cuda", non_blocking=True)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Conv2d(4, 1, 3)]
    network, inputs = torch.nn.Sequential(*layers), torch.randn(2, 2, 6, 6)

    def gradient(how):
        network.zero_grad()
        out = network(inputs)
        how((out * (1 + out[:1]) * network[1].weight.sum()).square().mean())
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    assert torch.allclose(gradient(backward), gradient(torch.autograd.backward))


def test_in_float32_the_gap_does_not_cancel(monkeypatch):
    """As on mps: ECT's last stage, whose t and r are 1e-6 apart, and TCM's rows at t' are those of float64."""
    t = torch.tensor([0.01, 0.5, 5.0, 80.0], dtype=torch.float64)
    for stage in (0, 3, 19):
        r, gap = ect_pair(t, stage)
        r_32, gap_32 = ect_pair(t.float(), stage)
        assert torch.allclose(gap_32.double(), gap, rtol=1e-5, atol=0)
        assert torch.allclose(r_32.double(), r, rtol=1e-6, atol=0)
    monkeypatch.setattr(tcm, "wide", lambda device: torch.float32)
    for t_prime in (0.9, 1.0):
        taught = tcm.TruncatedConsistency(analytic(), t_prime, df=2.0)
        t = taught.draw_t(draws.Draws(3, 64))
        log = taught(analytic().float(), torch.zeros(64, 3, 8, 8), draws=draws.Draws(3, 64)).log
        assert t.dtype == torch.float32 and t.min() == torch.tensor(t_prime) and log["boundary"][1] == 16


def test_an_apple_gpu_has_no_float64():
    with pytest.raises(config.ConfigError, match=r"train\.precision: fp64: an Apple GPU has no float64"):
        pick_precision("fp64", torch.device("mps"))
    assert pick_precision("auto", torch.device("mps")) == "fp32"
