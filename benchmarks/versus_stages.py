"""The pairs of benchmarks/versus.py that start from another model: TCM's second stage, CMT's mid-training."""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from versus_sides import Case, Method, imported, network, on_cpu, start
from versus_sigma import SIGMA_MAX, one_step, our_ect, ours

import networks
import objectives

T_PRIME, SHARE, WEIGHT, HUBER = 1.0, 0.25, 0.1, 1e-8  # TCM's, as its README calls it for CIFAR-10
POINTS = 16  # of CMT's trajectories


def images_of(model: networks.Preconditioner) -> Any:
    """A denoiser called as EDM's code calls its own: (x, sigma of any shape, labels, ...), in float32."""
    return lambda x, sigma, *labels, **augment: model(x.float(), sigma.float().flatten())


# TCM ------------------------------------------------------------------------------------------------------------------


def stage1(case: Case) -> tuple[networks.Preconditioner, networks.Preconditioner]:
    """(student, frozen first stage), both with the weights of one run of our ECT."""
    weights = start(case, "ect", our_ect, 400, 0.004)
    pair = network(case), network(case)
    for model in pair:
        model.load_state_dict(weights)
    return pair[0], pair[1].requires_grad_(False)


def our_tcm(case: Case) -> Method:
    model, frozen = stage1(case)
    settings = {"boundary_share": SHARE, "boundary_weight": WEIGHT, "huber_c": HUBER}
    return ours(objectives.TruncatedConsistency(frozen, T_PRIME, **settings), model)


def nvlabs_tcm(case: Case) -> Method:
    times = {"P_mean": 0.0, "P_std": 0.2, "t_lower": T_PRIME, "t_upper": SIGMA_MAX, "tdist": "t", "df": 0.01}
    with imported(case.folder / "tcm"):
        code = importlib.import_module("training.loss")
        train = code.ECMLoss(**times, c=HUBER, ratio_limit=0.999, boundary_prob=SHARE)
        precond = importlib.import_module("training.networks_tcm").TCMPrecond
    model, frozen = stage1(case)
    train.update_schedule(100)  # its second stage goes on at the first's last, where the limit holds
    both = precond(images_of(frozen), images_of(model), transition_t=T_PRIME)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        with on_cpu():
            _, main, _, _, boundary = train(both, x)
        return main.mean() + WEIGHT * boundary.mean()  # as its training loop does

    return Method(model, loss, one_step)


# CMT ------------------------------------------------------------------------------------------------------------------


def our_edm(case: Case) -> Method:
    return ours(objectives.EDM(), network(case))


def taught(case: Case) -> tuple[networks.Preconditioner, networks.Preconditioner]:
    """(student, teacher in eval mode), both with the weights of one run of our EDM."""
    weights = start(case, "edm", our_edm, 800, 0.004)
    pair = network(case), network(case)
    for model in pair:
        model.load_state_dict(weights)
    return pair[0], pair[1].requires_grad_(False).eval()


def squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Its "MSE", which is the sum over a sample's elements; LPIPS needs weights and photographs."""
    return (a - b).square().flatten(1).sum(1)


def our_cmt(case: Case) -> Method:
    model, teacher = taught(case)
    return ours(objectives.MidTraining(teacher, squares, POINTS), model)


def sony_cmt(case: Case) -> Method:
    without_lpips = types.SimpleNamespace(cuda=lambda: None)
    with imported(case.folder / "cmt", "lpips", LPIPS=lambda **settings: without_lpips):
        train = importlib.import_module("training.loss").DPMSolverLoss(POINTS, "MSE")
    grid = train.dpm_solver.get_time_steps  # asked for on "cuda", whatever the device
    train.dpm_solver.get_time_steps = lambda **how: grid(**{**how, "device": "cpu"})
    model, teacher = taught(case)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return train(images_of(model), images_of(teacher), x).mean()

    return Method(model, loss, one_step)


PAIRS = {"tcm-nvlabs": (our_tcm, nvlabs_tcm), "cmt-sony": (our_cmt, sony_cmt)}
