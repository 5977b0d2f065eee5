"""Our losses beside the original code's: one network, data, loop and scorer; only loss and sampling code differ.

    python benchmarks/versus.py FOLDER --out runs/versus.json [--only ct-openai ...] [--lr 0.004 0.001] [--seeds 0 1]

FOLDER holds checkouts that you made yourself; none of their code is here, and none of it is changed:
    git clone https://github.com/openai/consistency_models FOLDER/openai      # CT
    git clone https://github.com/Kinyugo/consistency_models FOLDER/kinyugo    # CT, iCT
    git clone https://github.com/locuslab/ect FOLDER/ect                      # ECT
    git clone https://github.com/xandergos/sCM-mnist FOLDER/scm-mnist         # sCT
Each pair trains on digits without labels, from the same weights, in the same order of images. Every learning rate is
tried for both sides, and each side's best counts.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, checkout, save

import config
import data
import networks
import objectives
from ema import EMA
from metrics import scores
from objectives import losses
from objectives.draws import key, sample_noise
from training.step import learning_rate

BATCH, SIGMA_MAX, SIGMA_DATA = 64, 80.0, 0.5
SHAPE = {"resolution": 8, "channels": 1, "label_dim": 0, "augment_dim": 0}
# CT's grid and target. The paper's mu0 of 0.9 is for 800,000 steps: in a short run its target lags so far behind that
# what is learned at low noise never reaches high noise.
S0, S1, MU0 = 2, 40, 0.01
ICT = (10, 160)  # iCT's
STAGES = 5  # ECT's


@dataclass
class Method:
    """What a side brings: a loss, something after each optimizer step, and one-step samples from noise z ~ N(0, 1)."""

    net: torch.nn.Module  # trained, and averaged
    loss: Callable[[torch.Tensor, int], torch.Tensor]  # (x, step) -> scalar
    sample: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # (average of net, z) -> clean data
    after: Callable[[int], None] = lambda step: None


def denoiser(**settings: str) -> networks.Preconditioner:
    """The default run's network; the same weights every time."""
    torch.manual_seed(0)
    cfg = config.load(ROOT / "config.yml").network.model_copy(update=settings)
    return networks.build(cfg.model_dump(), **SHAPE)


def ours(objective: torch.nn.Module, model: networks.Preconditioner, steps: int) -> Method:
    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return objective(model, x, step=step).loss.mean()

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
        return average(SIGMA_MAX * z, torch.full((len(z),), SIGMA_MAX))

    def after(step: int) -> None:
        if hasattr(objective, "after_step"):
            objective.after_step(model, step=step)

    both = torch.nn.ModuleList([model, objective])  # sCT's weighting is trained too
    return Method(both, loss, lambda average, z: sample(average[0], z), after)


# OpenAI's CT ----------------------------------------------------------------------------------------------------------


def openai_ct(folder: Path, steps: int) -> Method:
    with imported(folder / "openai", "piq", "cm.dist_util", "blobfile", LPIPS=None):
        diffusion = importlib.import_module("cm.karras_diffusion")
        script = importlib.import_module("cm.script_util")
        update_ema = importlib.import_module("cm.nn").update_ema
    karras = diffusion.KarrasDenoiser(
        sigma_data=SIGMA_DATA, weight_schedule="uniform", distillation=True, loss_norm="l2"
    )
    schedule = script.create_ema_and_scales_fn("adaptive", MU0, "progressive", S0, S1, steps, 0)
    net = denoiser(precond="cm", c_noise="log250").model
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


def our_ct(c_noise: str) -> Callable[[Path, int], Method]:
    def build(folder: Path, steps: int) -> Method:
        model = denoiser(precond="cm", c_noise=c_noise)
        return ours(objectives.ConsistencyTraining(model, steps, losses.build("l2"), S0, S1, MU0), model, steps)

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


def kinyugo(name: str, scaled: bool = False) -> Callable[[Path, int], Method]:
    def build(folder: Path, steps: int) -> Method:
        with imported(folder / "kinyugo"):
            code = importlib.import_module("consistency_models.consistency_models")
            update = importlib.import_module("consistency_models.utils").update_ema_model_
        net = OnSigma(denoiser().model, scaled)
        target = copy.deepcopy(net).requires_grad_(False)
        if name == "ct":
            train, counts = code.ConsistencyTraining(initial_timesteps=S0, final_timesteps=S1), [S0]
        else:
            train = code.ImprovedConsistencyTraining(initial_timesteps=ICT[0], final_timesteps=ICT[1])

        def ct_loss(x: torch.Tensor, step: int) -> torch.Tensor:
            out = train(net, target, x, step, steps)
            counts[0] = out.num_timesteps
            return torch.nn.functional.mse_loss(out.predicted, out.target)

        def ict_loss(x: torch.Tensor, step: int) -> torch.Tensor:
            out = train(net, x, step, steps)
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


def our_ict(folder: Path, steps: int) -> Method:
    model = denoiser(precond="cm")
    return ours(objectives.ImprovedConsistencyTraining(steps, losses.build("pseudo_huber"), *ICT), model, steps)


# ECT ------------------------------------------------------------------------------------------------------------------


def original_ect(folder: Path, steps: int) -> Method:
    with imported(folder / "ect"):
        code = importlib.import_module("training.loss")
    train, net = code.ECMLoss(), denoiser()

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        train.update_schedule(step * STAGES // steps)
        with on_cpu():
            return train(lambda x, t, labels, augment_labels: net(x, t.flatten()), x).mean()

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:  # its generator_fn: net(t_max z, t_max)
        return average(SIGMA_MAX * z, torch.full((len(z),), SIGMA_MAX))

    return Method(net, loss, sample)


def our_ect(folder: Path, steps: int) -> Method:
    model = denoiser()
    return ours(objectives.EasyConsistencyTuning(steps / STAGES, 2.0, "sigmoid", -1.1, 2.0, 0.0), model, steps)


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


def scm_mnist(folder: Path, steps: int) -> Method:
    """The lines of its training loop from the draw of sigma to the loss, run as they stand in the checkout."""
    text = (folder / "scm-mnist" / "train_consistency.py").read_text()
    start, stop = (
        text.index("            # Sample noise from log-normal"),
        text.index("            optimizer.zero_grad()"),
    )
    lines = compile(textwrap.dedent(text[start:stop]), "train_consistency.py", "exec")
    net = TrigFlow(denoiser(precond="trigflow").model)

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
            "step": step * 1000 / steps,  # its warm-up is 1,000 steps; here, as for ours, the whole run
        }
        exec(lines, scope)
        return scope["loss"]

    def sample(average: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
        return (-SIGMA_DATA * average(z, torch.full((len(z),), 1.56454))).clamp(-1, 1)

    return Method(net, loss, sample)


def our_sct(folder: Path, steps: int) -> Method:
    model = denoiser(precond="trigflow")
    return ours(objectives.ContinuousConsistency(SIGMA_DATA, warmup=steps), model, steps)


PAIRS = {
    "ct-openai": (our_ct("log250"), openai_ct),
    "ct-kinyugo": (our_ct("log"), kinyugo("ct")),
    "ict-kinyugo": (our_ict, kinyugo("ict")),
    "ct-kinyugo-scaled": (our_ct("log"), kinyugo("ct", scaled=True)),
    "ict-kinyugo-scaled": (our_ict, kinyugo("ict", scaled=True)),
    "ect-locuslab": (our_ect, original_ect),
    "sct-scm-mnist": (our_sct, scm_mnist),
}


# The common loop ------------------------------------------------------------------------------------------------------


def run(method: Method, lr: float, steps: int, seed: int, cfg: config.Config) -> tuple[float, float]:
    """(one-step distance, seconds of training) of a method after `steps` steps of RAdam."""
    dataset = data.load(cfg.data)
    optimizer = torch.optim.RAdam(method.net.parameters(), lr=lr)
    average = EMA(method.net, 0.999, 0.05)
    cfg.train.lr, cfg.train.steps, cfg.train.lr_warmup, cfg.train.lr_decay = lr, steps, steps // 20, "cosine"
    batches = data.batches(dataset, seed, BATCH)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.train)
        torch.manual_seed(key(seed, "versus", step))
        optimizer.zero_grad()
        method.loss(data.to_float(next(batches)[0]), step).backward()
        optimizer.step()
        method.after(step)
        average.update(method.net, step + 1)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        parts = torch.arange(cfg.metrics.num).split(500)
        noise = (sample_noise(key(seed, "samples"), part.tolist(), (1, 8, 8)) for part in parts)
        images = torch.cat([data.to_uint8(method.sample(average.module, z)) for z in noise])
    return scores.score(images, dataset, cfg.metrics, cfg.data.dir, "cpu")["fid"], seconds


@contextmanager
def imported(folder: Path, *missing: str, **names: Any) -> Iterator[None]:
    """Imports find the checkout in `folder`; modules that are not needed here, and hard to install, are empty ones."""
    if not folder.exists():
        raise config.ConfigError(f"{folder}: there is no such checkout; the head of benchmarks/versus.py tells which")
    with checkout(folder):
        for name in missing:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(names)
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """That loss keeps the state of CUDA's generator; on a CPU, of the CPU's."""
    real = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    try:
        yield
    finally:
        torch.cuda.get_rng_state, torch.cuda.set_rng_state = real


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkouts")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; done rows are not run again")
    parser.add_argument("--only", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.004, 0.001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    cases = [(p, s, lr, seed) for p in args.only for seed in args.seeds for lr in args.lr for s in (0, 1)]
    for pair, side, lr, seed in cases:
        row = {"pair": pair, "side": ("ours", "theirs")[side], "lr": lr, "seed": seed, "images": args.steps * BATCH}
        if any(row.items() <= done.items() for done in rows):
            continue
        cfg = config.load(ROOT / "config.yml", ["data.conditional=false"])
        fid, seconds = run(PAIRS[pair][side](args.folder, args.steps), lr, args.steps, seed, cfg)
        rows.append({**row, "fid": round(fid, 4), "seconds": round(seconds, 1), "torch": torch.__version__})
        save(rows, args.out)
        print(json.dumps(rows[-1]), flush=True)
    print("| pair | ours: by seed | theirs: by seed | ratio of means |\n| --- | --- | --- | --- |")
    for pair in args.only:
        best = [[best_of(rows, pair, side, seed) for seed in args.seeds] for side in ("ours", "theirs")]
        cells = [", ".join(format(value, ".3g") for value in side) for side in best]
        print(f"| {pair} | {cells[0]} | {cells[1]} | {sum(best[0]) / sum(best[1]):.2f} |")
    return 0


def best_of(rows: list[dict], pair: str, side: str, seed: int) -> float:
    """The lowest distance over the learning rates."""
    return min(r["fid"] for r in rows if (r["pair"], r["side"], r["seed"]) == (pair, side, seed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except config.ConfigError as error:
        sys.exit(str(error))
