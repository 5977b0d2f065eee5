"""What each arithmetic makes of a recipe's gradient, at every stage of it, against float64 by two passes.

    python benchmarks/precision.py --cfg configs/cifar10_ect.yml data.name=digits network.model_channels=32 [--ckpt FILE]

Network and data are the config's, made small by overrides; the schedule is the recipe's own. The weights are those of
--ckpt (the first EMA), or of a denoiser trained here for --steps steps, which is the teacher too where one is needed.
A row is the worst of --batches batches, the dropout masks and draws the same in every arithmetic. fp16 and bf16 are
autocast's; tf32 rounds what convolutions and matrix products read to 10 bits; auto is what a GPU's `auto` takes.
"""

from __future__ import annotations

import argparse
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
    """Convolutions and matrix products read their arguments with 10 bits after the point."""

    FUNCTIONS = (F.conv2d, F.conv_transpose2d, F.linear, torch.matmul, torch.Tensor.matmul)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.FUNCTIONS:
            args = [tf32(a) if torch.is_tensor(a) and a.dtype == torch.float32 else a for a in args]
        return function(*args, **(kwargs or {}))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to 10 bits after the point, with the gradient of x."""
    bits = x.detach().contiguous().view(torch.int32)
    return x + (((bits + 0x1000) & ~0x1FFF).view(torch.float32) - x.detach())


class SameDraws(Draws):
    """Draws in float32, whatever dtype is asked for."""

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return super().normal(shape).to(dtype)


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE")
    parser.add_argument("--ckpt", metavar="FILE", help="trained weights; none: a denoiser is trained first")
    parser.add_argument("--steps", type=int, default=300, help="of that training, batches of 128")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
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
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        save({"rows": rows, "command": command, "machine": machine(torch.device("cpu"))}, args.out)
    return 0


def recipe(args: argparse.Namespace, folder: Path) -> config.Config:
    """The config with trained weights to start from, and a teacher where it needs one."""
    base = [*args.overrides, "run.device=cpu"]
    raw = config.load(args.cfg, base)
    ckpt = args.ckpt
    if ckpt is None:
        clock = "trigflow" if raw.network.precond == "trigflow" else "edm"
        train = [
            f"objective.name={clock}", f"run.dir={folder}/start", f"train.steps={args.steps}", "train.batch_size=128",
            "train.lr=0.002", "train.lr_warmup=20", "train.lr_decay=none", "train.init_from=null",
            "train.save_every=0.9", "train.precision=fp32", "train.microbatch=null", "metrics.at_end=false", "ema.half_life_kimg=null",
            "ema.decay=[0.99]", "sample.every=0", "sample.grid=4", "train.log_every=100",
        ]  # fmt: skip
        precond = ["network.precond=edm"] if raw.network.precond == "cm" else []
        trainer.train(config.load(args.cfg, [*base, *train, *precond]))
        ckpt = f"{folder}/start/checkpoints/last.ckpt"
    teacher = [f"objective.teacher={ckpt}"] if hasattr(raw.objective, "teacher") else []
    return config.load(args.cfg, [*base, *teacher, f"train.init_from={ckpt}", "train.microbatch=null"])


def stages(objective: torch.nn.Module, steps: int) -> dict[str, int]:
    """Name of each stage -> a step of it, the last; of an objective without stages, the last step."""
    at = next((getattr(objective, name) for name in SCHEDULES if hasattr(objective, name)), None)
    if at is None:
        return {"all": steps - 1}
    return {str(at(k)): k for k in (*range(0, steps, max(steps // 5000, 1)), steps - 1)}


def thinned(found: dict[str, int], most: int = 16) -> dict[str, int]:
    """At most so many of the stages, the first and the last among them."""
    names = list(found)
    keep = {round(i * (len(names) - 1) / (most - 1)) for i in range(most)} if len(names) > most else range(len(names))
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
        found[wide] = (model, objective.double() if wide else objective)
    names = thinned(stages(found[False][1], cfg.train.steps))
    for name, step in names.items():
        exact = gradients(*found[True], cfg, codec, dataset, step, "fp64", args)
        for precision in args.precisions:
            got = gradients(*found[False], cfg, codec, dataset, step, precision, args)
            for part, truth in exact.items():
                pairs = list(zip(got[part], truth, strict=True))
                cosines = [float(torch.nn.functional.cosine_similarity(a[1].double(), b[1], dim=0)) for a, b in pairs]
                ratios = [a[0] / b[0] for a, b in pairs]
                yield {
                    "recipe": cfg.objective.name + (f"/{part}" if part != "loss" else ""),
                    "stage": name,
                    "precision": precision,
                    "loss_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
                    "cosine": min(cosines),
                }


def gradients(
    model: Any, objective: Any, cfg: Any, codec: Any, dataset: Any, step: int, precision: str, args: argparse.Namespace
) -> dict[str, list[tuple[float, torch.Tensor]]]:
    """Part of the loss -> its value and gradient on each batch."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    if precision == "auto":
        half = torch.bfloat16 if getattr(objective, "in_half", lambda step: True)(step) else None
    networks = [model, *(m for m in objective.modules() if hasattr(m, "autocast"))]
    for network in networks:
        network.autocast = half
    if hasattr(objective, "difference"):
        objective.difference = "auto" if precision == "auto" else "two_passes"
    dtype = next(model.parameters()).dtype
    found: dict[str, list[tuple[float, torch.Tensor]]] = {}
    for batch in range(args.batches):
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(batch))[: args.batch]
        x, conditions = codec.to_model(*dataset.read(rows), Draws(key(batch, "augment"), len(rows)), dtype)
        keys = torch.randint(2**31, (len(rows),), generator=torch.Generator().manual_seed(batch))
        for part in PARTS if cfg.objective.name == "tcm" else ("loss",):
            model.zero_grad()
            with TF32() if precision == "tf32" else torch.enable_grad():
                out: Output = objective(
                    model, x, step=step, draws=SameDraws(batch, len(rows)), **conditions, dropout_keys=keys
                )
                loss = (out.loss * rows_of(part, objective, SameDraws(batch, len(rows)))).mean()
                scale = 1024.0 if half == torch.float16 else 1.0  # as a gradient scaler would
                (loss * scale).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale
            found.setdefault(part, []).append((loss.item(), gradient))
    return found


def rows_of(part: str, objective: Any, draws: Draws) -> torch.Tensor | float:
    """Which rows of the batch belong to a part of the loss; TCM draws its noise levels first."""
    if part == "loss":
        return 1.0
    boundary = objective.draw_t(draws) <= objective.t_prime
    return boundary if part == "boundary" else ~boundary


def print_row(row: dict[str, Any]) -> None:
    print("| {recipe} | {stage} | {precision} | {loss_ratio:.3f} | {cosine:.4f} |".format(**row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
