"""Sample from a checkpoint's EMA weights and score: python generate.py --cfg config.yml --ckpt FILE [--calc_fid]

Samples of a seed are the same whatever the batch, the number of processes (torchrun) and the stops on the way.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
from config import Config, ConfigError
from sampling import choices
from sampling.choices import count, evaluations, natural, numbers

if TYPE_CHECKING:  # torch is imported after the arguments and the config are known to be right
    import torch

    from networks import Preconditioner
    from sampling.drawing import Drawing
    from sampling.samples import Samples
    from sources.images import ImageSet


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when done, 2 for bad input, 1 where a score could not be had."""
    words = sys.argv[1:] if argv is None else list(argv)
    for i in range(len(words) - 1):
        if words[i] == "--calc_fid" and "=" in words[i + 1]:  # a setting follows, which is no value of this flag
            words[i] = "--calc_fid=true"
    args = arguments().parse_intermixed_args(words)
    stopped = "stopped; the same command with --out FOLDER goes on with samples kept as png or npz"
    return config.exit_code(lambda: run(args), stopped)


def arguments() -> config.Arguments:
    """The command's options."""
    parser = config.Arguments(description="Sample from a checkpoint and score.", allow_abbrev=False)
    add, path = parser.add_argument, config.path_text
    add("--cfg", type=path, required=True, metavar="FILE", help="settings of the run: its own config.yml")
    add("--ckpt", type=path, metavar="FILE", help="checkpoint, as runs/NAME/checkpoints/last.ckpt")
    add("--samples", type=path, metavar="PATH", help="instead of --ckpt: images made elsewhere, a folder or an npz")
    add("--num", type=count, metavar="N", help="samples [64; metrics.num with --calc_fid; up to 5,000 to search]")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--steps", type=evaluations, metavar="S", help="evaluations of the network a sample [1]")
    levels.add_argument("--sigmas", type=numbers, metavar="80,0.8", help="the noise levels of the evaluations instead")
    levels.add_argument("--times", type=numbers, metavar="1,0.5", help="a flow map's times, from 1 (noise), instead")
    search = {"dest": "search", "type": several, "metavar": "S", "help": "find the best levels for --steps 2 to S"}
    levels.add_argument("--search-sigmas", "--search-times", **search)
    levels.add_argument("--sweep", type=counts, metavar="1,2,4", help="score with each of these --steps, and plot")
    add("--batch", type=count, default=256, metavar="B", help="samples drawn at a time [256]; changes no sample")
    add("--seed", type=natural, default=0, metavar="K", help="sample i of seed K is always the same [0]")
    add("--class", dest="class_index", metavar="C", help="draw this class only, by name or number")
    add("--guidance", metavar="W", help="guidance, told or classifier-free: sample.guidance")
    add("--interval", metavar="A,B", help="t where a network that is told its guidance is guided: sample.interval")
    rows = "for vectors: sample i gets row i of this npy or npz [training set's]"
    add("--conditions", type=path, metavar="FILE", help=rows)
    add("--ema", type=natural, default=0, metavar="I", help="which of several averages, counted from 0 [0]")
    where = "folder for the images [a new one in the run folder]; a stopped run's goes on"
    add("--out", type=path, metavar="DIR", help=where)
    add("--format", choices=("png", "npz", "grid"), help="single images, arrays, one picture [grid; npz over 400]")
    add("--calc_fid", type=yes, nargs="?", const=True, default=False, help="score against the training set")
    add("--nearest", action="store_true", help="draw samples beside their nearest training images, and count copies")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (args.ckpt is None) == (args.samples is None):
        raise ConfigError("--ckpt: give a checkpoint to sample from, or --samples with images made elsewhere")
    if args.nearest and (args.search or args.sweep):
        raise ConfigError("--nearest: is for one number of steps; leave it out of --search-sigmas and --sweep")
    if args.samples is None:
        return
    if not (args.calc_fid or args.nearest):
        raise ConfigError("--samples: say what to do with them: --calc_fid, --nearest or both")
    drawn = ["num", "steps", "sigmas", "times", "search", "sweep", "class_index", "guidance", "interval"]
    drawn += ["conditions", "format"]
    choices.refuse(args, drawn, "is for sampling from a checkpoint; --samples takes the images that are there")


def check_nearest(args: argparse.Namespace, num: int) -> None:
    """Refuse --nearest for fewer samples than metrics.scores.check_samples takes."""
    if args.nearest and num < 10:
        raise ConfigError(f"--nearest: {num} samples are too few; make or give at least 10")


def several(text: str) -> int:
    """A whole number, 2 or more. Raises ValueError."""
    if (value := evaluations(text)) < 2:
        raise ValueError
    return value


def counts(text: str) -> list[int]:
    """Whole numbers between commas. Raises ValueError."""
    return [evaluations(part) for part in text.split(",")]


def yes(text: str) -> bool:
    """true or false in words. Raises ValueError."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")


def settings(args: argparse.Namespace) -> Config:
    """The config that the command names, with what its options and settings replace."""
    given = {"sample.guidance": args.guidance, "sample.interval": args.interval and f"[{args.interval}]"}
    return config.load(args.cfg, [*args.overrides, *(f"{key}={value}" for key, value in given.items() if value)])


def run(args: argparse.Namespace) -> int:
    """Do what the command asks on its devices; its exit code."""
    check(args)
    cfg = settings(args)
    import torch.distributed as dist

    from metrics import scores
    from training import devices

    devices.start_ranks()
    device = devices.pick_device(cfg.run.device)
    devices.set_arithmetic(cfg.train.tf32)
    try:
        if args.samples is None:
            run_checkpoint(args, cfg, device)
        elif devices.rank_and_world()[0] == 0:
            judge_given(args, cfg, device)
        return 0
    except scores.ScoreError as error:
        print(f"no score: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_checkpoint(args: argparse.Namespace, cfg: Config, device: torch.device) -> None:
    """What the command asks for, with samples of a checkpoint."""
    from sampling import plan, search
    from sampling.samples import samples_of
    from training.devices import rank_and_world

    rank, world = rank_and_world()
    model, step = choices.trained_model(args, cfg, device)
    kind = samples_of(model.codec)
    if rank > 0 and (args.search or args.sweep):
        return
    training_set = functools.cache(lambda: kind.training_set(cfg))
    drawing, format = drawing_of(args, cfg, model, training_set, rank)
    # Read before the sampling: what is missing is said now.
    dataset = training_set() if rank == 0 and kind.needs_set(args, cfg) else None
    if rank == 0 and drawing.of_class is not None and (args.calc_fid or args.search or args.sweep):
        kind.check_reference(dataset, cfg, drawing.of_class)
    if args.search:
        store = search.store(args.ckpt, plan.clock(cfg))
        search.search(drawing, args.search, cfg, dataset, device, store, step)
        return
    if args.sweep:
        plans = {steps: choices.chosen_levels(args, cfg, steps) for steps in args.sweep}
        search.sweep(drawing, plans, cfg, dataset, device, choices.new_folder(args, cfg) / "sweep.png")
        return
    out = keep(drawing, args, cfg, kind, format)
    if rank > 0:
        return
    samples = kind.kept(drawing, out, format, cfg)
    print(kind.said(drawing, out, str(device) if world == 1 else f"each of {world} x {device.type}"))
    if args.calc_fid:
        found = kind.score(samples, drawing.given, dataset, cfg, device, of_class=drawing.of_class)
        said = kind.describe(found, cfg, kind.to_score(drawing.num, dataset), dataset, drawing)
        print(f"score at {drawing.nfe} NFE: {said}")
    if args.nearest:
        show_nearest(samples, dataset, device, out / "nearest.png")


def drawing_of(
    args: argparse.Namespace, cfg: Config, model: Preconditioner, training_set: Callable[[], Any], rank: int = 0
) -> tuple[Drawing, str]:
    """The samples that the command asks for, and what they are kept as: "png", "npz" or "grid"."""
    from sampling.drawing import Drawing
    from sampling.samples import samples_of

    num, given, format = samples_of(model.codec).asked(args, cfg, training_set)
    check_nearest(args, num)
    levels, solver = choices.chosen_levels(args, cfg, rank=rank)
    told = (cfg.sample.guidance, cfg.sample.interval, choices.chosen_class(args, model.codec))
    return Drawing(model, args.seed, num, levels, solver, given, args.batch, *told), format


def judge_given(args: argparse.Namespace, cfg: Config, device: torch.device) -> None:
    """Score images made elsewhere, by the same code. One rank does it."""
    import data
    from metrics import scores
    from sampling.samples import read_images

    # metrics.reference holds what a score is made of.
    dataset = data.load(cfg.data) if args.nearest or cfg.metrics.reference is None else None
    if dataset is not None and not hasattr(dataset, "channels"):
        kind = "latents" if cfg.data.name == "latents" else "vectors"
        raise ConfigError(f"--samples: scores images, and {cfg.data.path} holds {kind}; set data.name and data.path")
    images = read_images(Path(args.samples), cfg, dataset.channels if dataset else None)
    check_nearest(args, len(images))
    out = choices.new_folder(args, cfg) if args.nearest else None
    if args.calc_fid:
        found = scores.score(images, dataset, cfg.metrics, cfg.data.dir, device)
        against = scores.reference(cfg.metrics, dataset)
        print(f"score: {scores.describe(found, cfg.metrics, len(images), against=against)}")
    if out:
        show_nearest(images, dataset, device, out / "nearest.png")


def keep(drawing: Drawing, args: argparse.Namespace, cfg: Config, kind: Samples, format: str) -> Path:
    """Draw the samples, by all ranks, and write them as the command asks; their folder."""
    from metrics.common import progress
    from sampling import shards
    from training.devices import from_rank_0, rank_and_world, wait_for_all

    rank, world = rank_and_world()
    out, missing = from_rank_0(shards.begin(args, cfg, drawing, format) if rank == 0 else None)
    pieces = [(start, min(start + shards.SHARD, drawing.num)) for start in missing[rank::world]]
    with progress("sampling", sum(stop - start for start, stop in pieces), "sample", shown=rank == 0) as drawing.bar:
        for start, stop in pieces:
            given = None if drawing.given is None else drawing.given[start:stop]
            kind.write(drawing.draw(start, stop), given, start, shards.path(out, start, format))
            if rank == 0 and drawing.num > shards.SHARD:
                drawing.bar.write(f"samples to {stop:,} of {drawing.num:,}  {drawing.speed()}")
                sys.stdout.flush()
    drawing.bar = None
    wait_for_all()
    if rank == 0:
        kind.write_labels(drawing, out, format)
    return out


def show_nearest(images: Any, dataset: ImageSet, device: torch.device, path: Path) -> None:
    """Draw the samples that are nearest to a training image beside the five nearest, and say how many are copies."""
    from metrics import nearest, pictures

    picture, said = beside_nearest(images, dataset, device, nearest.copy_threshold(dataset, device))
    pictures.write_png(picture, path)
    print(f"{said}\nwritten: {path} (the nearest first; copies framed)")


def beside_nearest(
    images: Any, dataset: ImageSet, device: torch.device, limit: float, shown: int = 64
) -> tuple[torch.Tensor, str]:
    """The picture, uint8 (3, H, W), and the sentence of `show_nearest`; limit: nearest.copy_threshold's."""
    import torch

    from metrics import nearest, pictures, scores

    scores.check_samples(images, dataset)
    distances, indices = nearest.nearest(images, dataset, 5, device)
    copies = distances[:, 0] <= limit
    order = distances[:, 0].argsort(stable=True)[:shown]
    neighbours = torch.stack([scores.fetch(dataset, column) for column in indices[order].unbind(1)], 1)
    said = (
        f"copies: {int(copies.sum()):,} of {len(images):,} samples ({float(copies.float().mean()):.1%}) are within "
        f"{limit:.4g} of a training image (root mean square difference of pixels in [0, 1]); 1% of the training images "
        f"are that near to another, so about 1% of new images would be by chance; the median is "
        f"{float(distances[:, 0].median()):.4g}"
    )
    return pictures.beside(scores.fetch(images, order), neighbours, copies[order]), said


if __name__ == "__main__":
    sys.exit(main())
