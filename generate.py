"""Sample from a checkpoint's EMA weights and score: python generate.py --cfg config.yml --ckpt FILE [--calc_fid]"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import config
from config import Config, ConfigError


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when done, 2 for bad input, 1 where a score could not be had."""
    args = arguments().parse_intermixed_args(argv)
    try:
        return run(args, config.load(args.cfg, args.overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def arguments() -> config.Arguments:
    parser = config.Arguments(description="Sample from a checkpoint and score.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="settings of the run: its own config.yml")
    add("--ckpt", required=True, metavar="FILE", help="checkpoint, as runs/NAME/checkpoints/last.ckpt")
    add("--num", type=count, metavar="N", help="samples [64; metrics.num with --calc_fid]")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--steps", type=count, metavar="S", help="evaluations of the network a sample [1]")
    levels.add_argument("--sigmas", type=numbers, metavar="80,0.8", help="the noise levels of the evaluations instead")
    add("--batch", type=count, default=256, metavar="B", help="samples drawn at a time [256]; changes no sample")
    add("--seed", type=natural, default=0, metavar="K", help="sample i of seed K is always the same [0]")
    add("--class", type=natural, dest="class_index", metavar="C", help="draw this class only")
    add("--ema", type=natural, default=0, metavar="I", help="which of several averages, counted from 0 [0]")
    add("--out", metavar="DIR", help="folder for the images [a new one in the run folder]")
    add("--format", choices=("png", "npz", "grid"), default="grid", help="single images, one array, one picture [grid]")
    add("--calc_fid", type=yes, nargs="?", const=True, default=False, help="score against the training set")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**63:
        raise ValueError
    return value


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def yes(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")


def run(args: argparse.Namespace, cfg: Config) -> int:
    import torch  # after the arguments and the config are known to be right: a typo is answered at once

    import checkpoint
    import data
    import sampler
    from devices import pick_device

    device = pick_device(cfg.run.device)
    state = checkpoint.load(args.ckpt)
    check_network(cfg, checkpoint.config_of(state, args.ckpt), args.ckpt)
    model = checkpoint.model_from(state, args.ckpt, args.ema).to(device)
    sigmas, solver = chosen_levels(args, cfg)
    num = args.num or (cfg.metrics.num if args.calc_fid else 64)
    labels = chosen_labels(args, num, model)
    dataset = reference(cfg, model) if args.calc_fid else None  # before the sampling: what is missing is said at once
    out = new_folder(args, cfg)

    started, parts = time.perf_counter(), []
    for x in sampler.generate(model, args.seed, range(num), sigmas, solver, labels, args.batch):
        parts.append(data.to_uint8(x).cpu())
    seconds = time.perf_counter() - started
    images = torch.cat(parts)
    nfe = 2 * len(sigmas) - 1 if solver == "heun" else len(sigmas)
    print(f"{num:,} samples, {nfe} evaluations each, seed {args.seed}: {num / seconds:,.0f} images/s on {device}")
    print(f"written: {write(images, labels, out, args.format, model.label_dim)}")
    return score(images, dataset, cfg, device, nfe) if args.calc_fid else 0


def check_network(cfg: Config, trained: Config, path: str) -> None:
    """Refuse a config whose network is not the checkpoint's: the figures would be of something else."""
    different = config.first_difference(config.Config(network=trained.network), config.Config(network=cfg.network))
    if different:
        raise ConfigError(f"{path}: was trained with another network: {different}; use the config.yml beside it")


def chosen_levels(args: argparse.Namespace, cfg: Config) -> tuple[list[float], str]:
    """(noise levels, solver) from the command line and the config."""
    import sampler

    if args.sigmas is None:
        return sampler.plan(cfg, args.steps or 1)
    top = cfg.network.sigma_max
    if any(a <= b for a, b in zip(args.sigmas, args.sigmas[1:], strict=False)) or min(args.sigmas) <= 0:
        raise ConfigError(f"--sigmas: {args.sigmas} must descend and be above 0")
    if max(args.sigmas) > top:
        raise ConfigError(
            f"--sigmas: {max(args.sigmas)} is above network.sigma_max ({top}), which the network never saw"
        )
    return args.sigmas, "multistep"


def chosen_labels(args, num: int, model):
    """int64 (num,) classes: the one asked for, or drawn as often as in the training set; None without labels."""
    import torch

    import sampler

    if args.class_index is None:
        return sampler.draw_labels(args.seed, range(num), model.class_counts) if model.label_dim else None
    if not model.label_dim:
        raise ConfigError("--class: this network was trained without labels; train one with data.conditional: true")
    if args.class_index >= model.label_dim:
        raise ConfigError(f"--class: {args.class_index} is no class of this network; it has 0 to {model.label_dim - 1}")
    return torch.full((num,), args.class_index)


def reference(cfg: Config, model):
    """The training set, to score against."""
    import data

    dataset = data.load(cfg.data)
    have, need = (dataset.channels, dataset.resolution), (model.img_channels, model.img_resolution)
    if have != need:
        raise ConfigError(f"data: is {have[0]}x{have[1]}x{have[1]} and the checkpoint's {need[0]}x{need[1]}x{need[1]}")
    return dataset


def new_folder(args: argparse.Namespace, cfg: Config) -> Path:
    """A folder that holds nothing yet: --out, or the next free name in the run folder."""
    if args.out:
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out: {out} already holds something; name another folder")
    else:
        number = 0
        while (out := cfg.run.folder / "generated" / f"{number:03d}").exists():
            number += 1
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None
    return out


def write(images, labels, out: Path, format: str, classes: int) -> Path:
    """Write uint8 images (N, C, H, W) in the format asked for; the path written."""
    import numpy as np

    import pictures
    from checkpoint import write_atomically

    if format == "png":
        for i, image in enumerate(images):
            pictures.write_png(image, out / f"{i:06d}.png")
        return out
    if format == "npz":
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()}
        if labels is not None:
            arrays["labels"] = labels.numpy()
        write_atomically(out / "samples.npz", lambda file: np.savez_compressed(file, **arrays))
        return out / "samples.npz"
    pictures.write_png(pictures.grid(images[:400]), out / "grid.png")
    return out / "grid.png"


def score(images, dataset, cfg: Config, device, nfe: int) -> int:
    """Print the scores; where one cannot be had, say why: the samples are on disk already."""
    import metrics

    try:
        scores = metrics.score(images, dataset, cfg.metrics, cfg.data.dir, device)
    except metrics.ScoreError as error:
        print(f"no score: {error}", file=sys.stderr)
        return 1
    print(f"score at {nfe} NFE: {metrics.describe(scores, cfg.metrics, len(images))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
