"""Sample from a checkpoint's EMA weights and score: python generate.py --cfg config.yml --ckpt FILE [--calc_fid]

Samples of a seed are the same whatever the batch, the number of processes (torchrun) and the stops on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
from config import Config, ConfigError

if TYPE_CHECKING:  # torch is imported after the arguments and the config are known to be right
    import torch

    from data import Dataset
    from sampling.drawing import Drawing

SHARD = 1000  # samples written at a time: a folder of PNG files or an npz
GRID = 400  # most samples in a grid


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when done, 2 for bad input, 1 where a score could not be had."""
    words = sys.argv[1:] if argv is None else list(argv)
    for i in range(len(words) - 1):
        if words[i] == "--calc_fid" and "=" in words[i + 1]:  # a setting follows, which is no value of this flag
            words[i] = "--calc_fid=true"
    args = arguments().parse_intermixed_args(words)
    try:
        check(args)
        return run(args, config.load(args.cfg, args.overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except config.RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, MemoryError) as error:
        print(config.machine_failure(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command with --out FOLDER goes on with samples kept as png or npz", file=sys.stderr)
        return 130


def arguments() -> config.Arguments:
    """The command's options."""
    parser = config.Arguments(description="Sample from a checkpoint and score.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", type=config.path_text, required=True, metavar="FILE", help="settings of the run: its own config.yml")
    add("--ckpt", type=config.path_text, metavar="FILE", help="checkpoint, as runs/NAME/checkpoints/last.ckpt")
    add(
        "--samples",
        type=config.path_text,
        metavar="PATH",
        help="instead of --ckpt: images made elsewhere, a folder or an npz",
    )
    add("--num", type=count, metavar="N", help="samples [64; metrics.num with --calc_fid; up to 5,000 to search]")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--steps", type=evaluations, metavar="S", help="evaluations of the network a sample [1]")
    levels.add_argument("--sigmas", type=numbers, metavar="80,0.8", help="the noise levels of the evaluations instead")
    levels.add_argument("--search-sigmas", type=several, metavar="S", help="find the best levels for --steps 2 to S")
    levels.add_argument("--sweep", type=counts, metavar="1,2,4", help="score with each of these --steps, and plot")
    add("--batch", type=count, default=256, metavar="B", help="samples drawn at a time [256]; changes no sample")
    add("--seed", type=natural, default=0, metavar="K", help="sample i of seed K is always the same [0]")
    add("--class", type=natural, dest="class_index", metavar="C", help="draw this class only")
    add("--conditions", metavar="FILE", help="for vectors: sample i gets row i of this npy or npz [training set's]")
    add("--ema", type=natural, default=0, metavar="I", help="which of several averages, counted from 0 [0]")
    add(
        "--out",
        type=config.path_text,
        metavar="DIR",
        help="folder for the images [a new one in the run folder]; a stopped run's goes on",
    )
    add("--format", choices=("png", "npz", "grid"), help="single images, arrays, one picture [grid; npz over 400]")
    add("--calc_fid", type=yes, nargs="?", const=True, default=False, help="score against the training set")
    add("--nearest", action="store_true", help="draw samples beside their nearest training images, and count copies")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (args.ckpt is None) == (args.samples is None):
        raise ConfigError("--ckpt: give a checkpoint to sample from, or --samples with images made elsewhere")
    if args.nearest and (args.search_sigmas or args.sweep):
        raise ConfigError("--nearest: is for one number of steps; leave it out of --search-sigmas and --sweep")
    if args.samples is None:
        return
    if not (args.calc_fid or args.nearest):
        raise ConfigError("--samples: say what to do with them: --calc_fid, --nearest or both")
    for name in ("num", "steps", "sigmas", "search_sigmas", "sweep", "class_index", "conditions", "format"):
        if getattr(args, name) is not None:
            option = "--class" if name == "class_index" else "--" + name.replace("_", "-")
            raise ConfigError(f"{option}: is for sampling from a checkpoint; --samples takes the images that are there")


def count(text: str) -> int:
    """A whole number, 1 or more. Raises ValueError."""
    if not 1 <= (value := int(text)) <= 100_000_000:
        raise ValueError
    return value


def evaluations(text: str) -> int:
    """A number of evaluations, up to 10,000. Raises ValueError."""
    if (value := count(text)) > 10_000:
        raise ValueError
    return value


def several(text: str) -> int:
    """A whole number, 2 or more. Raises ValueError."""
    if (value := evaluations(text)) < 2:
        raise ValueError
    return value


def counts(text: str) -> list[int]:
    """Whole numbers between commas. Raises ValueError."""
    return [evaluations(part) for part in text.split(",")]


def natural(text: str) -> int:
    """A whole number, 0 or more. Raises ValueError."""
    if not 0 <= (value := int(text)) < 2**63:
        raise ValueError
    return value


def numbers(text: str) -> list[float]:
    """Finite numbers between commas. Raises ValueError."""
    values = [float(part) for part in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def yes(text: str) -> bool:
    """true or false in words. Raises ValueError."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")


def run(args: argparse.Namespace, cfg: Config) -> int:
    """Do what the command asks on its devices; its exit code."""
    import torch.distributed as dist

    from metrics import scores
    from training import devices

    devices.start_ranks()
    device = devices.pick_device(cfg.run.device)
    try:
        return judge_given(args, cfg, device) if args.samples else run_checkpoint(args, cfg, device)
    except scores.ScoreError as error:
        print(f"no score: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_checkpoint(args: argparse.Namespace, cfg: Config, device: torch.device) -> int:
    """What the command asks for, with samples of a checkpoint."""
    import checkpoints
    from sampling import search
    from sampling.drawing import Drawing
    from training.devices import place

    state = checkpoints.load(args.ckpt)
    check_network(cfg, checkpoints.config_of(state, args.ckpt), args.ckpt)
    model = checkpoints.model_from(state, args.ckpt, args.ema).to(device)
    if model.scaling is not None:
        return sample_vectors(args, cfg, model)
    if args.conditions is not None:
        raise ConfigError("--conditions: is for models of vectors; --class asks an image model for a class")
    (rank, world), searching = place(), bool(args.search_sigmas or args.sweep)
    if rank > 0 and searching:
        return 0
    num = args.num or (min(cfg.metrics.num, 5000) if args.search_sigmas else 0)
    num = num or (cfg.metrics.num if args.calc_fid or args.sweep else 64)
    sigmas, solver = chosen_levels(args, cfg)
    drawing = Drawing(
        model, args.seed, num, sigmas, solver, chosen_labels(args, num, model), args.batch, cfg.sample.guidance
    )
    dataset = None
    if rank == 0 and (args.calc_fid or args.nearest or searching):  # before the sampling: what is missing is said now
        dataset = training_set(args, cfg, (model.img_channels, model.img_resolution))
    if args.search_sigmas:
        search.search(drawing, args.search_sigmas, cfg, dataset, device, search.store(args.ckpt), state["step"])
        return 0
    if args.sweep:
        plans = {steps: chosen_levels(args, cfg, steps) for steps in args.sweep}
        search.sweep(drawing, plans, cfg, dataset, device, new_folder(args, cfg) / "sweep.png")
        return 0
    images, out = keep(drawing, args, cfg)
    if rank == 0:
        where = str(device) if world == 1 else f"each of {world} x {device.type}"
        print(f"{num:,} samples, {drawing.nfe} evaluations each, seed {args.seed}: {drawing.speed()} on {where}")
        print(f"written: {out}")
        judge(args, cfg, device, images, dataset, out, f"score at {drawing.nfe} NFE")
    return 0


def sample_vectors(args: argparse.Namespace, cfg: Config, model: Any) -> int:
    """Samples of a model of vectors as npz, and their distance to the training set."""
    import torch

    import data
    from sampling.drawing import Drawing
    from sources import vectors
    from training.devices import place

    for name in ("nearest", "search_sigmas", "sweep", "class_index"):
        if getattr(args, name) not in (None, False):
            option = "--class" if name == "class_index" else "--" + name.replace("_", "-")
            raise ConfigError(f"{option}: is for images, and {args.ckpt} makes vectors")
    if args.format not in (None, "npz"):
        raise ConfigError(f"--format: {args.format} is for images; vectors are written as npz")
    if args.conditions is not None and not model.condition_dim:
        raise ConfigError("--conditions: this model was trained without; train one with data.conditional: true")
    if args.conditions is not None and args.calc_fid:
        raise ConfigError("--calc_fid: compares with the training set under its own conditions; leave out --conditions")
    args.format = "npz"
    own = None if args.conditions is None else vectors.read_conditions(args.conditions, model.condition_dim)
    num = args.num or (len(own) if own is not None else vectors.SCORED if args.calc_fid else 64)
    dataset, conditions = None, None
    if args.calc_fid or (model.condition_dim and own is None):
        dataset = data.load(cfg.data)
        if not isinstance(dataset, vectors.Vectors) or dataset.shape != model.shape:
            raise ConfigError(
                f"data.path: {cfg.data.path} does not hold vectors of the checkpoint's shape {model.shape}"
            )
        if dataset.condition_dim != model.condition_dim:
            raise ConfigError(f"data.path: the conditions in {cfg.data.path} are not of the checkpoint's size")
        conditions = dataset.draw_conditions(args.seed, range(num))
    if own is not None:
        conditions = own[torch.arange(num) % len(own)]
    sigmas, solver = chosen_levels(args, cfg)
    drawing = Drawing(model, args.seed, num, sigmas, solver, None, args.batch, conditions=conditions)
    samples, out = keep(drawing, args, cfg)
    if place()[0] == 0:
        print(f"{num:,} vectors, {drawing.nfe} evaluations each, seed {args.seed}; written: {out / 'samples'}")
        if args.calc_fid:
            scores, compared = vectors.score(samples, conditions, dataset, model.scaling)
            print(f"score at {drawing.nfe} NFE: {vectors.describe(scores, compared)}")
    return 0


def judge_given(args: argparse.Namespace, cfg: Config, device: torch.device) -> int:
    """Score images made elsewhere, by the same code. One rank does it."""
    from training.devices import place

    if place()[0] > 0:
        return 0
    dataset = training_set(args, cfg)
    if dataset is not None and not hasattr(dataset, "channels"):
        raise ConfigError(f"--samples: scores images, and {cfg.data.path} holds vectors")
    images = read_images(Path(args.samples), cfg, dataset.channels if dataset else None)
    out = new_folder(args, cfg) if args.nearest else None
    judge(args, cfg, device, images, dataset, out, "score")
    return 0


def judge(
    args: argparse.Namespace,
    cfg: Config,
    device: torch.device,
    images: Any,
    dataset: Dataset | None,
    out: Path | None,
    title: str,
) -> None:
    """Print the scores and the copies among `images`, as the command asks."""
    from metrics import scores

    if args.calc_fid:
        scores = scores.score(images, dataset, cfg.metrics, cfg.data.dir, device)
        print(f"{title}: {scores.describe(scores, cfg.metrics, len(images))}")
    if args.nearest:
        show_nearest(images, dataset, device, out / "nearest.png")


def show_nearest(images: Any, dataset: Dataset, device: torch.device, path: Path, shown: int = 64) -> None:
    """Draw the samples that are nearest to a training image beside the five nearest, and say how many are copies."""
    import torch

    from metrics import pictures, scores

    scores.check_samples(images, dataset)
    distances, indices = scores.nearest(images, dataset, 5, device)
    limit = scores.copy_threshold(dataset, device)
    copies = distances[:, 0] <= limit
    order = distances[:, 0].argsort(stable=True)[:shown]
    neighbours = torch.stack([scores.fetch(dataset, column) for column in indices[order].unbind(1)], 1)
    pictures.write_png(pictures.beside(scores.fetch(images, order), neighbours, copies[order]), path)
    print(
        f"copies: {int(copies.sum()):,} of {len(images):,} samples ({float(copies.float().mean()):.1%}) are within "
        f"{limit:.4g} of a training image (root mean square difference of pixels in [0, 1]); 1% of the training images "
        f"are that near to another, so about 1% of new images would be by chance; the median is "
        f"{float(distances[:, 0].median()):.4g}"
    )
    print(f"written: {path} (the nearest first; copies framed)")


# What is sampled ------------------------------------------------------------------------------------------------------


def check_network(cfg: Config, trained: Config, path: str) -> None:
    """Refuse a config whose network is not the checkpoint's: the figures would be of something else."""
    different = config.first_difference(config.Config(network=trained.network), config.Config(network=cfg.network))
    if different:
        raise ConfigError(f"{path}: was trained with another network: {different}; use the config.yml beside it")


def chosen_levels(args: argparse.Namespace, cfg: Config, steps: int | None = None) -> tuple[list[float], str]:
    """(noise levels, solver) for `steps` or --steps: --sigmas, else what --search-sigmas found, else the config's."""
    from sampling import plan, search
    from training.devices import place

    steps = steps or args.steps or 1
    planned, solver = plan.plan(cfg, steps)
    if solver == "heun" and args.steps:
        raise ConfigError("--steps: this config samples by Heun's method; set sample.heun_steps, or give --sigmas")
    top = cfg.network.sigma_max
    if args.sigmas is None:
        found = search.found(search.store(args.ckpt), steps, top) if solver != "heun" and steps > 1 else None
        if found and place()[0] == 0:
            print(f"{steps} steps: levels {found['sigmas']} of {search.store(args.ckpt)} ({search.describe(found)})")
        return (found["sigmas"] if found else planned), solver
    if any(a <= b for a, b in zip(args.sigmas, args.sigmas[1:], strict=False)) or min(args.sigmas) <= 0:
        raise ConfigError(f"--sigmas: {args.sigmas} must descend and be above 0")
    if max(args.sigmas) > top:
        raise ConfigError(
            f"--sigmas: {max(args.sigmas)} is above network.sigma_max ({top}), which the network never saw"
        )
    return args.sigmas, "multistep" if solver == "heun" else solver


def chosen_labels(args: argparse.Namespace, num: int, model: Any) -> torch.Tensor | None:
    """int64 (num,) classes: the one asked for, or drawn as often as in the training set; None without labels."""
    import torch

    from sampling import plan

    if args.class_index is None:
        return plan.draw_labels(args.seed, range(num), model.class_counts) if model.label_dim else None
    if not model.label_dim:
        raise ConfigError("--class: this network was trained without labels; train one with data.conditional: true")
    if args.class_index >= model.label_dim:
        raise ConfigError(f"--class: {args.class_index} is no class of this network; it has 0 to {model.label_dim - 1}")
    return torch.full((num,), args.class_index)


def training_set(args: argparse.Namespace, cfg: Config, need: tuple[int, int] | None = None) -> Dataset | None:
    """The training set to compare with; None where metrics.reference holds all that is asked for.

    need: (channels, resolution) of the samples. Raises ConfigError where the set has others.
    """
    import data

    if cfg.metrics.reference is not None and not args.nearest:
        return None
    dataset = data.load(cfg.data)
    if need is None:
        return dataset
    have = (dataset.channels, dataset.resolution)
    if have != need:
        raise ConfigError(f"data: is {have[0]}x{have[1]}x{have[1]} and the checkpoint's {need[0]}x{need[1]}x{need[1]}")
    return dataset


# Samples on disk ------------------------------------------------------------------------------------------------------


def keep(drawing: Drawing, args: argparse.Namespace, cfg: Config) -> tuple[Any, Path]:
    """Draw the samples and write them as the command asks; (the images or vectors, their folder), by all ranks."""
    import numpy as np
    import torch

    from metrics import pictures
    from metrics.scores import fetch
    from training.devices import place, wait_for_all

    rank, world = place()
    format = args.format or ("npz" if args.calc_fid or drawing.num > GRID else "grid")
    out, missing = agreed(lambda: start_folder(drawing, args, cfg, format))
    for start in missing[rank::world]:
        stop = min(start + SHARD, drawing.num)
        given = drawing.labels if drawing.conditions is None else drawing.conditions
        given = None if given is None else given[start:stop]
        write_shard(drawing.draw(start, stop), given, start, shard_path(out, start, format))
        if rank == 0 and drawing.num > SHARD:
            print(f"samples to {stop:,} of {drawing.num:,}  {drawing.speed()}", flush=True)
    wait_for_all()
    if rank > 0:
        return None, out
    if drawing.model.scaling is not None:
        files = (shard_path(out, start, format) for start in range(0, drawing.num, SHARD))
        return torch.cat([torch.from_numpy(np.load(file)["vectors"]) for file in files]), out
    if format != "grid":
        images = read_images(out, cfg, drawing.model.img_channels)
    else:
        images = drawing.draw(0, drawing.num) if drawing.num <= GRID else drawing.stream()
    pictures.write_png(pictures.grid(fetch(images, torch.arange(min(drawing.num, GRID)))), out / "grid.png")
    return images, out


def agreed(make: Callable[[], Any]) -> Any:
    """What make() gives on rank 0, on every rank."""
    from training.devices import from_rank_0, place

    return from_rank_0(make() if place()[0] == 0 else None)


def start_folder(drawing: Drawing, args: argparse.Namespace, cfg: Config, format: str) -> tuple[Path, list[int]]:
    """The folder for the samples, and the first index of every shard that it lacks."""
    from checkpoints.state import write_atomically

    if format == "grid":
        return new_folder(args, cfg), []
    manifest, out = drawing.manifest(format), Path(args.out or "")
    if args.out and (out / "manifest.json").exists():
        there = read_manifest(out)
        for name, value in manifest.items():
            if there.get(name) != value:
                raise ConfigError(
                    f"--out: {out} holds samples of another command: {name} is {there.get(name)!r} there and {value!r} "
                    "here; name another folder"
                )
    else:
        out = new_folder(args, cfg)
        write_atomically(out / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    return out, missing_shards(out, manifest)


def new_folder(args: argparse.Namespace, cfg: Config) -> Path:
    """A folder that holds nothing yet: --out, or the next free name in the run folder."""
    import checkpoints

    if args.out:
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out: {out} already holds something; name another folder")
    else:
        checkpoints.refuse_links(cfg.run.folder)
        number = 0
        while (out := cfg.run.folder / "generated" / f"{number:03d}").exists():
            number += 1
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None
    return out


def shard_path(out: Path, start: int, format: str) -> Path:
    """Where the samples from `start` on are kept."""
    return out / "samples" / (f"{start:06d}.npz" if format == "npz" else f"{start:06d}")


def missing_shards(out: Path, manifest: dict[str, Any]) -> list[int]:
    """The first index of every shard that is not there."""
    starts = range(0, manifest["num"], SHARD)
    return [start for start in starts if not shard_path(out, start, manifest["format"]).exists()]


def write_shard(images: torch.Tensor, labels: torch.Tensor | None, start: int, path: Path) -> None:
    """Write uint8 images (N, C, H, W) as an npz or a folder of PNG files, or vectors as an npz; whole or not at all."""
    import numpy as np

    from checkpoints.state import write_atomically
    from metrics import pictures
    from sources import vectors

    if images.is_floating_point():
        write_atomically(path, lambda file: vectors.write(images, labels, file))
        return
    if path.suffix == ".npz":
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()}
        if labels is not None:
            arrays["labels"] = labels.numpy()
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
        return
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    part.mkdir(parents=True)
    for i, image in enumerate(images, start):
        pictures.to_pil(image).save(part / f"{i:06d}.png")
    part.rename(path)


def read_manifest(out: Path) -> dict[str, Any]:
    """What tells the samples in `out` from others. Raises ConfigError."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        missing_shards(out, manifest)
        return manifest
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{out / 'manifest.json'}: cannot be read; name another folder") from None


def read_images(path: Path, cfg: Config, channels: int | None) -> Any:
    """Images of a folder that generate.py made, another folder of images or npz files, or one npz; read piece by piece.

    channels: to bring them to (grey images are often saved as RGB). Raises ConfigError.
    """
    import data
    from sampling.drawing import Stream

    if (path / "manifest.json").exists():
        manifest = read_manifest(path)
        if missing := missing_shards(path, manifest):
            lack = f"{len(missing) * SHARD:,} of its {manifest['num']:,} samples"
            raise ConfigError(f"{path}: lacks up to {lack}: finish it first, by the same command with --out {path}")
        path = path / "samples"
    arrays = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if path.suffix == ".npz" or (path.is_dir() and arrays):
        sizes = [len(read_npz(file, channels)) for file in arrays]
        return Stream(lambda piece: read_npz(arrays[piece], channels), sizes)
    section = {"name": "folder", "path": str(path), "resolution": None, "channels": channels, "on_broken": "fail"}
    try:
        return data.folder(cfg.data.model_copy(update={**section, "memory_gb": 0.0}))
    except ConfigError as error:
        raise ConfigError(re.sub(r"^data\.\w+", "--samples", str(error))) from None


def read_npz(path: Path, channels: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W) of the array `images` (or arr_0), NHWC or NCHW, in an npz."""
    import numpy as np
    import torch

    import data

    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays else "arr_0"]
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"--samples: {path} cannot be read as an npz of images ({error})".split("\n")[0]) from None
    if images.dtype != np.uint8 or images.ndim != 4 or not {images.shape[1], images.shape[3]} & {1, 3}:
        raise ConfigError(
            f"--samples: images in {path} are {images.dtype} {images.shape}: give uint8 (N, H, W, 1 or 3)"
        )
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return data.fit_channels(torch.from_numpy(images), channels)


if __name__ == "__main__":
    sys.exit(main())
