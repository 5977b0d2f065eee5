"""What generate.py and edit.py both ask: the types of options, the network, noise levels, classes, a new folder."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import config
from config import Config, ConfigError

if TYPE_CHECKING:  # the commands read their options before torch is imported
    import torch

    from networks import Preconditioner
    from sources.codecs import ImageCodec


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


def refuse(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ConfigError for the first of these options that is given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 is a class
            option = "class" if name == "class_index" else name.replace("_", "-")
            raise ConfigError(f"--{option}: {reason}")


def trained_model(args: argparse.Namespace, cfg: Config, device: torch.device) -> tuple[Preconditioner, int]:
    """The model that --ckpt and --ema name, on the device, and the step it was saved at.

    ConfigError for a config whose network is not the checkpoint's: the figures would be of something else.
    """
    import checkpoints

    state = checkpoints.load(args.ckpt)
    trained = checkpoints.config_of(state, args.ckpt)
    different = config.first_difference(Config(network=trained.network), Config(network=cfg.network))
    if different:
        raise ConfigError(f"{args.ckpt}: was trained with another network: {different}; use the config.yml beside it")
    return checkpoints.model_from(state, args.ckpt, args.ema).to(device), state["step"]


def chosen_levels(
    args: argparse.Namespace, cfg: Config, steps: int | None = None, rank: int = 0
) -> tuple[list[float], str]:
    """(noise levels, solver) for `steps` or --steps: --sigmas, else what --search-sigmas found, else the config's."""
    from sampling import plan, search

    steps = steps or args.steps or 1
    planned, solver = plan.plan(cfg, steps)
    if solver == "heun" and args.steps:
        raise ConfigError("--steps: this config samples by Heun's method; set sample.heun_steps, or give --sigmas")
    top = cfg.network.sigma_max
    if args.sigmas is None:
        store = search.store(args.ckpt)
        found = search.found(store, steps, top) if solver != "heun" and steps > 1 else None
        if found and rank == 0:
            print(f"{steps} steps: levels {found['sigmas']} of {store} ({search.describe(found)})")
        return (found["sigmas"] if found else planned), solver
    if any(a <= b for a, b in itertools.pairwise(args.sigmas)) or min(args.sigmas) <= 0:
        raise ConfigError(f"--sigmas: {args.sigmas} must descend and be above 0")
    if args.sigmas[0] > top:
        raise ConfigError(f"--sigmas: {args.sigmas[0]} is above network.sigma_max ({top}), which the network never saw")
    return args.sigmas, "multistep" if solver == "heun" else solver


def chosen_labels(args: argparse.Namespace, num: int, codec: ImageCodec) -> torch.Tensor | None:
    """int64 (num,) classes: the one asked for, or drawn as often as in the training set; None without labels."""
    import torch

    from sources.images import draw_labels

    classes = codec.network_shape["label_dim"]
    if args.class_index is None:
        return draw_labels(args.seed, range(num), codec.class_counts) if classes else None
    if not classes:
        raise ConfigError("--class: this network was trained without labels; train one with data.conditional: true")
    if args.class_index >= classes:
        raise ConfigError(f"--class: {args.class_index} is no class of this network; it has 0 to {classes - 1}")
    return torch.full((num,), args.class_index)


def new_folder(args: argparse.Namespace, cfg: Config) -> Path:
    """A folder that holds nothing yet: --out, or the next free name in the run folder."""
    from checkpoints.disk import refuse_links

    if args.out:
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out: {out} already holds something; name another folder")
    else:
        refuse_links(cfg.run.folder)
        folders = (cfg.run.folder / "generated" / f"{number:03d}" for number in itertools.count())
        out = next(folder for folder in folders if not folder.exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None
    return out
