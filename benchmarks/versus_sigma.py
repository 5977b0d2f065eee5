"""The pairs of benchmarks/versus.py that tell the network one noise level: CT, iCT, ECT, sCT, ours and theirs."""

from __future__ import annotations

import copy
import importlib
import math
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from versus_sides import Case, Method, imported, network, on_cpu
from versus_sides import ours as side

import networks
import objectives
from objectives import losses

SIGMA_MAX, SIGMA_DATA = 80.0, 0.5
# CT's grid and target. The paper's mu0 of 0.9 is for 800,000 steps: in a short run its target lags so far behind that
# what is learned at low noise never reaches high noise.
S0, S1, MU0 = 2, 40, 0.01
ICT = (10, 160)  # iCT's
STAGES = 5  # ECT's


def one_step(model: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    return model(SIGMA_MAX * z, torch.full((len(z),), SIGMA_MAX))


def ours(objective: torch.nn.Module, model: networks.Preconditioner) -> Method:
    return side(objective, model, one_step)


# OpenAI's CT ----------------------------------------------------------------------------------------------------------


def openai_ct(case: Case) -> Method:
    with imported(case.folder / "openai", "piq", "cm.dist_util", "blobfile", LPIPS=None):
        diffusion = importlib.import_module("cm.karras_diffusion")
        script = importlib.import_module("cm.script_util")
        update_ema = importlib.import_module("cm.nn").update_ema
    karras = diffusion.KarrasDenoiser(
        sigma_data=SIGMA_DATA, weight_schedule="uniform", distillation=True, loss_norm="l2"
    )
    schedule = script.create_ema_and_scales_fn("adaptive", MU0, "progressive", S0, S1, case.steps, 0)
    net = network(case, precond="cm", c_noise="log250").model
    target = copy.deepcopy(net).requires_grad_(False)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return karras.consistency_losses(net, x, schedule(step)[1], target_model=target)["loss"].mean()

    def after(step: int) -> None:
        update_ema(target.parameters(), net.parameters(), rate=schedule(step)[0])

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
        given = types.SimpleNamespace(randn=lambda *shape, device: z)
        how = {"sampler": "onestep", "model_kwargs": {}, "device": "cpu", "generator": given}
        return diffusion.karras_sample(karras, average, z.shape, 2, **how)

    return Method(net, loss, sample, after)


def our_ct(c_noise: str) -> Callable[[Case], Method]:
    def build(case: Case) -> Method:
        model = network(case, precond="cm", c_noise=c_noise)
        return ours(objectives.ConsistencyTraining(model, case.steps, losses.build("l2"), S0, S1, MU0), model)

    return build


# Kinyugo's CT and iCT -------------------------------------------------------------------------------------------------


class OnSigma(torch.nn.Module):
    """The raw network as a function of (x, sigma), which that code calls without scaling x; scaled: with EDM's c_in."""

    def __init__(self, net: torch.nn.Module, scaled: bool):
        super().__init__()
        self.net, self.scaled = net, scaled

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c_in = (sigma**2 + SIGMA_DATA**2).rsqrt().reshape(-1, 1, 1, 1) if self.scaled else 1.0
        return self.net(c_in * x, sigma.log() / 4)


def kinyugo(name: str, scaled: bool = False) -> Callable[[Case], Method]:
    def build(case: Case) -> Method:
        with imported(case.folder / "kinyugo"):
            code = importlib.import_module("consistency_models.consistency_models")
            update = importlib.import_module("consistency_models.utils").update_ema_model_
        net = OnSigma(network(case).model, scaled)
        target = copy.deepcopy(net).requires_grad_(False)
        if name == "ct":
            train, counts = code.ConsistencyTraining(initial_timesteps=S0, final_timesteps=S1), [S0]
        else:
            train = code.ImprovedConsistencyTraining(initial_timesteps=ICT[0], final_timesteps=ICT[1])

        def ct_loss(x: torch.Tensor, step: int) -> torch.Tensor:
            out = train(net, target, x, step, case.steps)
            counts[0] = out.num_timesteps
            return torch.nn.functional.mse_loss(out.predicted, out.target)

        def ict_loss(x: torch.Tensor, step: int) -> torch.Tensor:
            out = train(net, x, step, case.steps)
            return (code.pseudo_huber_loss(out.predicted, out.target) * out.loss_weights).mean()

        def after(step: int) -> None:
            update(target, net, code.ema_decay_rate_schedule(counts[0], MU0, S0))

        def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
            start = {"start_from_y": True, "add_initial_noise": False, "clip_denoised": True}
            return code.ConsistencySamplingAndEditing()(average, SIGMA_MAX * z, [SIGMA_MAX], **start)

        if name == "ct":
            return Method(net, ct_loss, sample, after)
        return Method(net, ict_loss, sample)

    return build


def our_ict(case: Case) -> Method:
    model = network(case, precond="cm")
    return ours(objectives.ImprovedConsistencyTraining(case.steps, losses.build("pseudo_huber"), *ICT), model)


# ECT ------------------------------------------------------------------------------------------------------------------


def original_ect(case: Case) -> Method:
    with imported(case.folder / "ect"):
        train = importlib.import_module("training.loss").ECMLoss()
    net = network(case)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        train.update_schedule(step * STAGES // case.steps)
        with on_cpu():
            return train(lambda x, t, labels, augment_labels: net(x, t.flatten()), x).mean()

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:  # its generator_fn: net(t_max z, t_max)
        return average(SIGMA_MAX * z, torch.full((len(z),), SIGMA_MAX))

    return Method(net, loss, sample)


def our_ect(case: Case) -> Method:
    model = network(case)
    return ours(objectives.EasyConsistencyTuning(case.steps / STAGES, 2.0, "sigmoid", -1.1, 2.0, 0.0), model)


# sCM-mnist ------------------------------------------------------------------------------------------------------------


class TrigFlow(torch.nn.Module):
    """The raw network as that code calls it, F(x / sd, t), with its log variance linear in an embedding of t."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.logvar_linear = net, torch.nn.Linear(64, 1)
        self.register_buffer("frequencies", torch.randn(32, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_logvar: bool = False) -> Any:
        with networks.plain_kernels():  # the fused ones have no forward-mode derivative
            F = self.net(x, (SIGMA_DATA * t.tan()).log() / 4)
        if not return_logvar:
            return F
        angles = 2 * math.pi * t[:, None] * self.frequencies
        return F, self.logvar_linear(torch.cat([angles.cos(), angles.sin()], 1))


def scm_mnist(case: Case) -> Method:
    """The lines of its training loop from the draw of sigma to the loss, run as they stand in the checkout."""
    text = (case.folder / "scm-mnist" / "train_consistency.py").read_text()
    start, stop = (
        text.index("            # Sample noise from log-normal"),
        text.index("            optimizer.zero_grad()"),
    )
    lines = compile(textwrap.dedent(text[start:stop]), "train_consistency.py", "exec")
    net = TrigFlow(network(case, precond="trigflow").model)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        scope = {
            "torch": torch,
            "np": importlib.import_module("numpy"),
            "x0": x,
            "model_wrapper": lambda x, t: net(x, t.flatten(), return_logvar=True),
            "sigma_data": SIGMA_DATA,
            "P_mean": -2,
            "P_std": 1.6,
            "consistency_training": True,
            "step": step * 1000 / case.steps,  # its warm-up is 1,000 steps; here, as for ours, the whole run
        }
        exec(lines, scope)
        return scope["loss"]

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
        return (-SIGMA_DATA * average(z, torch.full((len(z),), 1.56454))).clamp(-1, 1)

    return Method(net, loss, sample)


def our_sct(case: Case) -> Method:
    model = network(case, precond="trigflow")
    return ours(objectives.ContinuousConsistency(SIGMA_DATA, warmup=case.steps), model)


PAIRS = {
    "ct-openai": (our_ct("log250"), openai_ct),
    "ct-kinyugo": (our_ct("log"), kinyugo("ct")),
    "ict-kinyugo": (our_ict, kinyugo("ict")),
    "ct-kinyugo-scaled": (our_ct("log"), kinyugo("ct", scaled=True)),
    "ict-kinyugo-scaled": (our_ict, kinyugo("ict", scaled=True)),
    "ect-locuslab": (our_ect, original_ect),
    "sct-scm-mnist": (our_sct, scm_mnist),
}
