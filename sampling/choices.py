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
            option = {"class_index": "class", "search": "search-sigmas"}.get(name, name)
            raise ConfigError(f"--{option}: {reason}")


def trained_model(args: argparse.Namespace, cfg: Config, device: torch.device) -> tuple[Preconditioner, int]:
    """The model that --ckpt and --ema name, on the device, and the step it was saved at.

    ConfigError for a config whose network is not the checkpoint's: the figures would be of something else.
    """
    import checkpoints

    state = checkpoints.load(args.ckpt)
    trained = checkpoints.config_of(state, args.ckpt)
    if trained.network.name == "autoencoder":
        out = ("--out", "latents.safetensors")
        encode = config.command("encode.py", "--cfg", args.cfg, "--autoencoder", args.ckpt, *out)
        raise ConfigError(f"{args.ckpt}: is an autoencoder, which draws no samples; make latents by it: {encode}")
    different = config.first_difference(Config(network=trained.network), Config(network=cfg.network))
    if different:
        raise ConfigError(f"{args.ckpt}: was trained with another network: {different}; use the config.yml beside it")
    as_trained = cfg.model_copy(update={"objective": trained.objective})
    for key, message in config.rules.sampled_guidance(as_trained):
        raise ConfigError(f"{args.ckpt}: {key}: {message}")
    model = checkpoints.model_from(state, args.ckpt, args.ema).to(device)
    if model.codec.kind == "latents":
        from sampling import decoding

        decoding.attach([model.codec], cfg.data.autoencoder, device)
    return model, state["step"]


def chosen_levels(
    args: argparse.Namespace, cfg: Config, steps: int | None = None, rank: int = 0
) -> tuple[list[float], str]:
    """(levels, solver) for `steps` or --steps: --sigmas or --times, else what a search found, else the config's."""
    from sampling import plan, search

    steps, clock, top = steps or args.steps or 1, plan.clock(cfg), plan.highest_level(cfg)
    name = plan.LEVELS[clock]
    planned, solver = plan.plan(cfg, steps)
    if clock == "time" and args.sigmas is not None:
        raise ConfigError("--sigmas: a flow map is told times from 1 (noise) to 0 (data); give --times, as 1,0.5")
    if clock == "sigma" and args.times is not None:
        raise ConfigError("--times: is for flow maps; this network is told noise levels: give --sigmas, as 80,0.8")
    if solver == "heun" and args.steps:
        raise ConfigError(f"--steps: this config samples by Heun's method; set sample.heun_steps, or give --{name}")
    given = args.sigmas or args.times
    if given is None:
        store = search.store(args.ckpt, clock)
        found = search.found(store, steps, top, solver) if solver != "heun" and steps > 1 else None
        if found and rank == 0:
            print(f"{steps} steps: levels {found[name]} of {store} ({search.describe(found)})")
        return (found[name] if found else planned), solver
    if any(a <= b for a, b in itertools.pairwise(given)) or min(given) <= 0:
        raise ConfigError(f"--{name}: {given} must descend and be above 0")
    if given[0] > top:
        above = f"network.sigma_max ({top}), which the network never saw" if clock == "sigma" else "1, which is noise"
        raise ConfigError(f"--{name}: {given[0]} is above {above}")
    return given, {"sigma": "multistep", "time": "jumps"}[clock] if solver == "heun" else solver


def chosen_labels(args: argparse.Namespace, num: int, codec: ImageCodec) -> torch.Tensor | None:
    """int64 (num,) classes: the one asked for, or drawn as often as in the training set; None without labels."""
    import torch

    from sources.images import draw_labels

    chosen = chosen_class(args, codec)
    if chosen is not None:
        return torch.full((num,), chosen)
    labelled = codec.network_shape["label_dim"] > 0
    return draw_labels(args.seed, range(num), codec.class_counts) if labelled else None


def chosen_class(args: argparse.Namespace, codec: ImageCodec) -> int | None:
    """The class that --class asks for by name or by number, or None. A name that is another's number is a name."""
    from metrics.common import class_name

    text, classes = args.class_index, codec.network_shape.get("label_dim", 0)
    if text is None:
        return None
    if not classes:
        raise ConfigError("--class: this network was trained without labels; train one with data.conditional: true")
    names = codec.classes or []
    number = names.index(text) if text in names else int(text) if text.isdecimal() and len(text) < 10 else classes
    if number >= classes:
        named = f", by name {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
        raise ConfigError(f"--class: {text} is no class of this network; it has 0 to {classes - 1}{named}")
    if codec.class_counts is not None and codec.class_counts[number] == 0:
        raise ConfigError(f"--class: {class_name(number, names)} had no training images: the network never saw it")
    return number


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
