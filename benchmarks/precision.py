"""What each arithmetic makes of a recipe's gradient, at every stage of it, against float64 by two passes.

    python benchmarks/precision.py --cfg configs/cifar10_ect.yml data.name=digits network.model_channels=32 \\
        "network.channel_mult=[1,2]" network.num_blocks=1 --batch 32 --batches 1 [--ckpt FILE]

Network and data are the config's, made small by overrides; the schedule is the recipe's own. The weights are those of
--ckpt (the first EMA), the teacher that of --teacher; without, a denoiser trained here for --steps steps is both. TCM's
teacher is its start. Weights trained for consistency show rounding best: their loss is the smallest.
A row is the worst of --batches batches, with the same data, dropout masks and draws in every arithmetic. fp16 and bf16
are autocast's; tf32 rounds what convolutions and matrix products read to 10 bits; auto is what a GPU's `auto` takes.
With train.compile=true the networks are compiled, for every arithmetic but float64. SoFlow's loss ratio is that of its
mean square, since the value of its loss means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import config
import data
from objectives import Output
from objectives.draws import Draws, key
from training import build, trainer

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "auto")
SCHEDULES = ("stage", "levels", "intervals")  # methods of objectives that tell where in its schedule a step is
PARTS = ("main", "boundary")  # of a loss, where it has them


class TF32(TorchFunctionMode):
    """Convolutions and matrix products read with 10 bits after the point, in the backward pass too; biases as they are.

    Not for forward mode.
    """

    FUNCTIONS = (F.conv2d, F.conv_transpose2d, F.linear, torch.matmul, torch.Tensor.matmul)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in self.FUNCTIONS:
            return function(*args, **(kwargs or {}))
        product = function(*(a + (tf32(a.detach()) - a.detach()) for a in args[:2]), *args[2:], **(kwargs or {}))
        if product.requires_grad:
            product.register_hook(tf32)
        return product


def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 x rounded to 10 bits after the point, ties away from 0."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class SameDraws(Draws):
    """Normal draws in float32, whatever dtype is asked for."""

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return super().normal(shape).to(dtype)


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE")
    parser.add_argument("--ckpt", metavar="FILE", help="trained weights; none: a denoiser's, trained first")
    parser.add_argument("--teacher", metavar="FILE", help="a denoiser, where one is needed; none: trained first")
    parser.add_argument("--steps", type=int, default=300, help="of that training, batches of 128")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stages", type=int, default=16, help="at most so many, the last among them; 1: the last")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="rows that it has of other recipes stay")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            cfg = recipe(args, Path(folder))
            rows = [row for row in measure(cfg, args) if print_row(row) or True]
        except config.ConfigError as error:
            print(error, file=sys.stderr)
            return 2
    if args.out:
        old = json.loads(args.out.read_text()) if args.out.exists() else {"rows": [], "commands": []}
        place = operator.itemgetter("recipe", "stage", "precision")
        new = {place(row) for row in rows}
        command = "python benchmarks/precision.py " + shlex.join(sys.argv[1:])
        result = {
            "rows": [row for row in old["rows"] if place(row) not in new] + rows,
            "commands": [c for c in old["commands"] if c != command] + [command],
            "machine": machine(torch.device("cpu")),
        }
        save(result, args.out)
    return 0


def recipe(args: argparse.Namespace, folder: Path) -> config.Config:
    """The config with trained weights to start from, and a teacher where it needs one."""
    base = [*args.overrides, "run.device=cpu", "train.init_from=null", "train.microbatch=null"]
    raw = config.load(args.cfg, base)
    start, teacher, taught = args.ckpt, args.teacher, asks_for_a_teacher(raw.objective)
    if raw.objective.name == "tcm":
        teacher = teacher or start
    if start is None or (taught and teacher is None):
        trained = denoiser(args, raw, folder)
        start, teacher = start or trained, teacher or trained
    teaching = [f"objective.teacher={teacher}"] if taught else []
    return config.load(args.cfg, [*base, *teaching, f"train.init_from={start}"])


def asks_for_a_teacher(objective: Any) -> bool:
    """Whether its settings must name one."""
    field = type(objective).model_fields.get("teacher")
    return field is not None and field.is_required()


def denoiser(args: argparse.Namespace, raw: config.Config, folder: Path) -> str:
    """The checkpoint of a diffusion model, of plain flow matching, or of ect for tcm, of the recipe's network."""
    name = "trigflow" if raw.network.precond == "trigflow" else "edm"
    if raw.network.times:  # iMF's network is not told t: a start of its own
        name = "imf" if raw.network.times == "t-r" else "flow"
    if raw.objective.name == "tcm":  # whose teacher is a consistency model
        name = "ect"
    network = [o for o in args.overrides if not o.startswith(("objective.", "train."))]
    if raw.network.precond == "cm":
        network.append("network.precond=edm")
    settings = [
        f"objective.name={name}", f"run.dir={folder}/start",
        "run.device=cpu", f"train.steps={args.steps}", "train.batch_size=128", "train.optimizer=radam",
        "train.lr=0.002", "train.lr_warmup=20", "train.lr_decay=none", "train.init_from=null", "train.microbatch=null",
        "train.precision=fp32", "train.save_every=0.9", "ema.half_life_kimg=null", "ema.decay=[0.99]",
        "sample.every=0", "sample.grid=4", "metrics.at_end=false",
    ]  # fmt: skip
    trainer.train(config.load(args.cfg, [*network, *settings]))
    return f"{folder}/start/checkpoints/last.ckpt"


def stages(objective: torch.nn.Module, steps: int) -> dict[str, int]:
    """Name of each stage -> a step of it, the last; of an objective without stages, the last step."""
    at = next((getattr(objective, name) for name in SCHEDULES if hasattr(objective, name)), None)
    if at is None:
        return {"all": steps - 1}
    return {str(at(k)): k for k in (*range(0, steps, max(steps // 5000, 1)), steps - 1)}


def thinned(found: dict[str, int], most: int) -> dict[str, int]:
    """At most so many of the stages, the last among them, and the first where there are two."""
    names, last = list(found), len(found) - 1
    keep = {last - round(i * last / max(most - 1, 1)) for i in range(most)} if last >= most else range(last + 1)
    return {names[i]: found[names[i]] for i in sorted(keep)}


def measure(cfg: config.Config, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every part of the loss, stage and precision."""
    dataset = data.load(cfg.data)
    codec = dataset.codec(cfg)
    device = torch.device("cpu")
    found = {}
    for wide in (False, True):
        model = build.build_model(cfg, codec, device, "fp64" if wide else "fp32")
        teacher = build.load_teacher(cfg, model)
        objective = build.build_objective(cfg, model, teacher)
        if teacher is not None:
            teacher.autocast = None
        if not wide:
            build.compile_networks(cfg.train.compile, model, objective, shown=True)
        found[wide] = (model, objective.double() if wide else objective)
    names = thinned(stages(found[False][1], cfg.train.steps), args.stages)
    for name, step in names.items():
        exact = gradients(*found[True], cfg, codec, dataset, step, "fp64", args)
        for precision in args.precisions:
            got = gradients(*found[False], cfg, codec, dataset, step, precision, args)
            for part, truth in exact.items():
                pairs = list(zip(got[part], truth, strict=True))
                cosines = [float(torch.nn.functional.cosine_similarity(a[1].double(), b[1], dim=0)) for a, b in pairs]
                ratios = [a[0] / b[0] for a, b in pairs]
                yield {
                    "recipe": cfg.run.name + (f"/{part}" if part != "loss" else ""),
                    "stage": name,
                    "precision": precision,
                    "loss_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
                    "cosine": min(cosines),
                }


def gradients(
    model: Any, objective: Any, cfg: Any, codec: Any, dataset: Any, step: int, precision: str, args: argparse.Namespace
) -> dict[str, list[tuple[float, torch.Tensor]]]:
    """Part of the loss -> its value and gradient on each batch."""
    if hasattr(objective, "difference"):
        objective.difference = "auto" if precision == "auto" else "two_passes"
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    if precision == "auto":
        half = torch.bfloat16 if getattr(objective, "in_half", lambda step, model: True)(step, model) else None
    for network in (model, *(m for m in objective.modules() if hasattr(m, "autocast"))):
        network.autocast = half
    found: dict[str, list[tuple[float, torch.Tensor]]] = {}
    for batch in range(args.batches):
        x, conditions = samples(codec, dataset, batch, args.batch, next(model.parameters()).dtype)
        for part in PARTS if cfg.objective.name == "tcm" else ("loss",):
            with TF32() if precision == "tf32" else contextlib.nullcontext():
                out: Output = objective(model, x, step=step, draws=SameDraws(batch, len(x)), **conditions)
                loss = (out.loss * rows_of(part, objective, SameDraws(batch, len(x)))).mean()
                gradient = backward(model, loss, 2.0**16 if half == torch.float16 else 1.0)
            value, count = out.log.get("log_q2", (loss.detach(), None))
            found.setdefault(part, []).append((float(value if count is None else (value / count).exp()), gradient))
    return found


def samples(
    codec: Any, dataset: Any, batch: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same batch of data and dropout keys in every dtype, rounded to float32 alike."""
    generator = torch.Generator().manual_seed(batch)
    rows = torch.randperm(len(dataset), generator=generator)[:size]
    x, conditions = codec.to_model(*dataset.read(rows), Draws(key(batch, "augment"), len(rows)))
    conditions = {name: value.to(dtype) for name, value in conditions.items()}
    return x.to(dtype), {**conditions, "dropout_keys": torch.randint(2**31, (len(rows),), generator=generator)}


def backward(model: torch.nn.Module, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient as one vector; while it is not finite the scale of the loss falls, as a gradient scaler's would."""
    while True:
        model.zero_grad()
        (loss * scale).backward(retain_graph=True)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale
        if scale <= 2.0**-16 or gradient.isfinite().all():
            return gradient
        scale /= 16


def rows_of(part: str, objective: Any, draws: Draws) -> torch.Tensor | float:
    """Which rows of the batch belong to a part of the loss; TCM draws its noise levels first."""
    if part == "loss":
        return 1.0
    boundary = objective.draw_t(draws) < objective.t_prime + 2e-8
    return boundary if part == "boundary" else ~boundary


def print_row(row: dict[str, Any]) -> None:
    print("| {recipe} | {stage} | {precision} | {loss_ratio:.3f} | {cosine:.4f} |".format(**row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
