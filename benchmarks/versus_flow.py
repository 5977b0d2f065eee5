"""The pairs of benchmarks/versus.py that tell the network two times: MeanFlow, SoFlow, iMF, ours and theirs."""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from versus_sides import Case, Method, imported, network, on_cpu, ours

import objectives

# Times of the digits, not CIFAR-10's: both sides get the same.
MEANFLOW = {"P_mean_t": -0.6, "P_std_t": 1.6, "P_mean_r": -4.0, "P_std_r": 1.6, "ratio": 0.75}
ADAPTIVE = {"p": 0.75, "eps": 1e-3}
RHO = (1.0, 0.0003125)  # SoFlow's, at the first and the last step


def flow_map(case: Case, **settings: Any) -> torch.nn.Module:
    """The config's network as a flow map that is told t and t - r; the same weights every time."""
    return network(case, **{"precond": "flow", "c_noise": "time", "times": "t,t-r", "heads": 1, **settings})


def one_step(model: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    one = torch.ones(len(z))
    return z - model(z, one, 0 * one)


# MeanFlow -------------------------------------------------------------------------------------------------------------


def our_meanflow(case: Case) -> Method:
    return ours(objectives.MeanFlow(sampler="v1", **MEANFLOW, **ADAPTIVE), flow_map(case), one_step)


def py_meanflow(case: Case) -> Method:
    with imported(case.folder / "py-meanflow" / "meanflow"):
        code = importlib.import_module("models.meanflow")
    model = flow_map(case)
    args = types.SimpleNamespace(tr_sampler="v1", **MEANFLOW, norm_p=ADAPTIVE["p"], norm_eps=ADAPTIVE["eps"])

    def net(z: torch.Tensor, times: tuple[torch.Tensor, torch.Tensor], aug_cond: None) -> torch.Tensor:
        t, h = times
        return model(z, t, t - h)

    theirs = types.SimpleNamespace(net=net, args=args)

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:  # its sample(): z_1 - u(z_1, 1, 1)
        return one_step(average, z)

    return Method(model, lambda x, step: code.MeanFlow.forward_with_loss(theirs, x, None), sample)


# SoFlow ---------------------------------------------------------------------------------------------------------------


def our_soflow(case: Case) -> Method:
    return ours(objectives.SoFlow(case.steps, rho=RHO, **ADAPTIVE), flow_map(case), one_step)


def original_soflow(case: Case) -> Method:
    with imported(case.folder / "soflow", "unet", "dit", SongUNet=lambda **settings: None, DiT=None):
        code = importlib.import_module("models")
    model, theirs = flow_map(case), code.Soflow(model_type="UNet")
    theirs.network = lambda x, t, s, labels, augment: model(x, t.flatten(), s.flatten())
    how = {"labels": None, "cfg_mask": None, "cfg_scale": 1.0, "cfg_decay_time": 1.0, **ADAPTIVE}

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        shape = (len(x), 1, 1, 1)  # times as its train.py draws them, and l
        s, t = ((mean + 1.6 * torch.randn(shape)).sigmoid() for mean in (-4.0, -0.9))
        t = t.clamp(min=1e-4)
        s = torch.min(s, t - 1e-4)
        l = torch.min(theirs.get_middle_time(t, s, step, case.steps, *RHO, method="Exponent"), t - 1e-4)  # noqa: E741
        with on_cpu():
            return theirs.get_consistency_loss(x, t, l, s, **how)[0]

    return Method(model, loss, one_step)


# iMF ------------------------------------------------------------------------------------------------------------------


def our_imf(case: Case, eps: float = 0.01) -> Method:
    # That code has no rows with r = t, of which the paper has half.
    return ours(objectives.ImprovedMeanFlow(equal_share=0.0, eps=eps), flow_map(case, heads=2), one_step)


def our_imf_of_means(case: Case) -> Method:
    """With that code's eps, which stands beside a mean over pixels; the paper's code has it beside a sum."""
    return our_imf(case, eps=0.01 * case.dataset.channels * case.dataset.resolution**2)


def haidog_imf(case: Case) -> Method:
    with imported(case.folder / "haidog"):
        code = importlib.import_module("meanflow")
    model = flow_map(case, heads=2)
    theirs = code.MeanFlow(num_classes=None, cfg_scale=None)

    def net(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, return_v: bool = True, **labels: Any) -> Any:
        return model.both(z, t, r) if return_v else model(z, t, r)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return theirs.loss(net, (x + 1) / 2)[0]  # it takes [0, 1]

    return Method(model, loss, one_step)


PAIRS = {
    "meanflow-py": (our_meanflow, py_meanflow),
    "soflow": (our_soflow, original_soflow),
    "imf-haidog": (our_imf, haidog_imf),
    "imf-haidog-eps": (our_imf_of_means, haidog_imf),
}
