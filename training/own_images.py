"""What a run takes from its images and device where its config says null: size, colour, classes, network, length."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import config
import data
from config import Config, ConfigError, rules
from sources.files import GREY_MODES, BrokenImage
from sources.images import ImageSet
from training.devices import pick_device, rank_0_first
from training.speed import seconds
from training.step import TrainingStep

KINDS = {".zip": "zip", ".npz": "npz", ".npy": "npz", ".tar": "tar", ".parquet": "parquet"}
IN_FILES = ("folder", "imagenet9", "zip", "tar", "parquet")  # of any size each
LOOKED_AT = 1000  # headers, spread evenly over the set
FEW = 1000  # images, below which a model may copy them
MANY = 10_000  # images, from which a GPU's run is large


class Choice(NamedTuple):
    """One setting that was null, and why it is what it is."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Look:
    """What is there, before any of it is decoded."""

    name: str  # data.name that reads it
    path: str
    count: int
    sizes: list[tuple[int, int]]  # (width, height) of those looked at
    colour: int  # how many of those have colours
    classes: dict[str, int]  # name -> images; {}: no labels
    broken: int = 0

    @property
    def sides(self) -> list[int]:
        """Shorter sides, ascending."""
        return sorted(map(min, self.sizes))

    def said(self) -> str:
        """The line that says what was seen."""
        small, large = (f"{w}x{h}" for w, h in (min(self.sizes, key=min), max(self.sizes, key=min)))
        seen = "" if len(self.sizes) >= self.count - self.broken else f"; of {len(self.sizes):,} looked at"
        line = f"{self.path}: {self.count:,} image{'s' if self.count > 1 else ''} ({self.name}){seen}: "
        line += f"{small}" if small == large else f"{small} to {large}"
        line += f"; {self.colour:,} in colour, {len(self.sizes) - self.colour:,} grey"
        line += f"; {len(self.classes):,} classes" if len(self.classes) > 1 else ""
        return line + (f"; {self.broken:,} broken" if self.broken else "")


def settle(cfg: Config, resume: bool) -> tuple[Config, list[str]]:
    """The config with every choice made, and the lines that say what was seen, what was chosen and why.

    A config without a null to choose for is given back as it is, and a run that goes on keeps what it began with.
    Raises ConfigError for images that cannot be used.
    """
    if not rules.undecided(cfg):
        return cfg, []
    kept = cfg.run.folder / "config.yml"
    if resume and kept.exists():
        cfg = as_before(cfg, config.load(kept))
    if not (missing := rules.undecided(cfg)):
        rules.check(cfg, lambda key: "config")
        return cfg, []
    on_gpu = pick_device(cfg.run.device).type != "cpu"
    with rank_0_first():  # it reads the shards' indexes, the others find them
        seen = look(cfg, missing[0])
    choices = [choice for choice in choose(seen, cfg.data.resolution, on_gpu) if _value(cfg, choice.key, 0) is None]
    cfg = filled(cfg, {choice.key: choice.value for choice in choices})
    rules.check(cfg, lambda key: "config")
    lines = [seen.said(), "chosen (set any of them to decide otherwise):"]
    lines += [f"  {key}: {_shown(value)}  # {reason}" for key, value, reason in choices]
    if seen.count < FEW:
        lines.append(about_memory(cfg, seen.count))
    return cfg, lines


def as_before(cfg: Config, before: Config) -> Config:
    """The config with what the run's own says where this one leaves the choice open."""
    keys = [*rules.undecided(cfg), "data.resolution", "data.channels"]
    return filled(cfg, {key: _value(before, key) for key in keys if _value(cfg, key) is None})


def filled(cfg: Config, values: dict[str, Any]) -> Config:
    """The config with these section.key set; to be checked again."""
    for key, value in values.items():
        section, name = key.split(".")
        part = getattr(cfg, section).model_copy(update={name: value})
        cfg = cfg.model_copy(update={section: part})
    return cfg


def _value(cfg: Config, key: str, absent: Any = None) -> Any:
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name, absent)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# What is there ------------------------------------------------------------------------------------------------------


def kind_of(path: str) -> str:
    """data.name for what lies at a path. Raises ConfigError."""
    if not os.path.exists(path):
        raise ConfigError(f"data.path: {path} does not exist; set it to your images, a folder or a zip")
    kind = "folder" if os.path.isdir(path) else KINDS.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ConfigError(f"data.path: {path} is no folder and no {', '.join(KINDS)}; set it to your images")
    return kind


def look(cfg: Config, missing: str) -> Look:
    """What lies at data.path; `missing`: the setting that asks. Raises ConfigError."""
    d = cfg.data
    changes: dict[str, Any] = {"name": d.name or kind_of(d.path), "conditional": False}
    if changes["name"] in IN_FILES:  # nothing is decoded
        changes |= {"resolution": d.resolution or 8, "channels": d.channels or 3, "memory_gb": 0.0}
    dataset = data.load(d.model_copy(update=changes))
    if not isinstance(dataset, ImageSet):
        raise ConfigError(f"{missing}: null is chosen by images, and {d.path} holds none; set it")
    sizes, colour, source = [dataset.shape[1:]], int(dataset.channels == 3), dataset.source
    if source is not None:
        headers = []
        for index in range(0, len(dataset), max(1, len(dataset) // LOOKED_AT)):
            try:
                headers.append(source.open(index, header=True))
            except BrokenImage as error:
                source.broken(index, error)  # raises where the config says so; else it is named when it is read
        if not headers:
            raise ConfigError(f"data.path: none of the images looked at in {d.path} can be read; mend or remove them")
        sizes, colour = [image.size for image in headers], sum(image.mode not in GREY_MODES for image in headers)
    counts = [] if dataset.labels is None else torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
    classes = dict(zip(dataset.class_names, counts, strict=False))
    broken = source.left_out["broken"] if source else 0
    return Look(changes["name"], d.path or changes["name"], len(dataset), sizes, colour, classes, broken)


# What is chosen -----------------------------------------------------------------------------------------------------


def choose(seen: Look, resolution: int | None, on_gpu: bool) -> list[Choice]:
    """A choice for every setting there is one for; resolution: the one that the config says."""
    resolution_chosen = choose_resolution(seen.sides, seen.count, on_gpu)
    resolution = resolution or resolution_chosen.value
    return [
        Choice("data.name", seen.name, "what data.path is"),
        resolution_chosen,
        choose_channels(seen.colour, len(seen.sizes)),
        choose_conditional(seen.classes),
        *choose_network(resolution, seen.count, on_gpu),
        *choose_length(resolution, seen.count, on_gpu),
    ]


def choose_resolution(sides: list[int], count: int, on_gpu: bool) -> Choice:
    """The largest size that the device affords and nine in ten images have, so that levels halve: 8 to 128 pixels.

    sides: the shorter side of each image, ascending.
    """
    side = sides[len(sides) // 10]
    most, whose = 32, "a CPU"
    if on_gpu:
        most, whose = (128, "a GPU") if count >= MANY else (64, f"a GPU with fewer than {MANY:,} images")
    size = min(side, most)
    size = max(8, size - size % (8 if size >= 32 else 4))
    why = f"nine in ten images have {side:,} pixels or more on the shorter side"
    if side < 8:
        why = f"the least; images of {side} pixels are enlarged"
    elif side > most:
        why += f"; {most} is the most for {whose}"
    return Choice("data.resolution", size, why)


def choose_channels(colour: int, looked_at: int) -> Choice:
    """RGB where any image has colours."""
    if colour:
        return Choice("data.channels", 3, f"{colour:,} of {looked_at:,} have colours")
    return Choice("data.channels", 1, "all are grey")


def choose_conditional(classes: dict[str, int]) -> Choice:
    """Class labels where there are several classes with ten images each, in the mean."""
    key, there = "data.conditional", {name: count for name, count in classes.items() if count}
    if not there:
        return Choice(key, False, "there are no labels: no class folders, nor a dataset.json")
    if len(there) == 1:
        return Choice(key, False, f"there is one class, {next(iter(there))}")
    mean, rarest = sum(there.values()) / len(there), min(there, key=lambda name: there[name])
    if mean < 10:
        return Choice(key, False, f"{len(there):,} classes of {mean:.1f} images each are too few images to tell apart")
    few = f"; {rarest} has {there[rarest]}, which will be copied" if there[rarest] < 10 else ""
    return Choice(key, True, f"{len(there):,} classes of {mean:,.0f} images each, to be asked for by --class{few}")


def choose_network(resolution: int, count: int, on_gpu: bool) -> list[Choice]:
    """A UNet whose levels halve down to 8 pixels or as far as they can, small on a CPU."""
    levels = [resolution]
    while levels[-1] % 2 == 0 and (levels[-1] > 8 or len(levels) == 1):
        levels.append(levels[-1] // 2)
    widths = [1 if at == 0 or pixels >= 64 else 2 for at, pixels in enumerate(levels)]
    if on_gpu:
        channels, many = (128, "many") if count >= MANY else (64, f"fewer than {MANY:,}")
        why = f"a GPU, and {many} images"
    else:
        channels = 32 if resolution <= 32 else 16
        why = f"a CPU, at {resolution} pixels"
    attends = [pixels for pixels in levels if 8 < pixels <= 16] if on_gpu else []
    return [
        Choice("network.model_channels", channels, why),
        Choice("network.channel_mult", widths, f"levels of {', '.join(map(str, levels))} pixels"),
        Choice("network.num_blocks", 2 if on_gpu else 1, "a GPU" if on_gpu else "a CPU"),
        Choice("network.attn_resolutions", attends, "the deepest block has attention anyway"),
    ]


def choose_length(resolution: int, count: int, on_gpu: bool) -> list[Choice]:
    """Steps and images a step: 10 to 20 minutes on two quiet CPU cores, hours on a GPU."""
    if on_gpu:
        batch, steps, why = 256, 40_000 if count >= MANY else 20_000, "hours on a GPU"
    else:
        batch, steps, why = 32, 2000 if resolution > 16 else 8000, "10 to 20 minutes on two quiet CPU cores"
    return [
        Choice("train.batch_size", batch, "a GPU" if on_gpu else "a CPU"),
        Choice("train.steps", steps, f"{why}; longer is better"),
    ]


# What is said -------------------------------------------------------------------------------------------------------


def about_memory(cfg: Config, count: int) -> str:
    """What a model of few images does, and how to see it."""
    if count < 10:  # scores and --nearest want ten
        return f"warning: {count} image{'s are' if count > 1 else ' is'} too few: the model can only copy; add hundreds"
    folder = cfg.run.folder
    last = folder / "checkpoints" / "last.ckpt"
    command = config.command("generate.py", "--cfg", folder / "config.yml", "--ckpt", last, "--nearest")
    may = f"{count:,} images are few: the model may memorise and copy them"
    return f"warning: {may}; when it is trained, see its copies with\n  {command}"


def how_long(step: TrainingStep, dataset: ImageSet) -> str:
    """The line that says how long the run will take, from two of its own steps; nothing moves but the gradient."""
    batch = dataset.read(torch.arange(step.local_batch) % len(dataset))
    step.backward(*batch)  # the first one compiles
    took = min(seconds(lambda: step.backward(*batch), step.device) for _ in range(2))
    step.sums.clear()
    step.counts.clear()
    steps = step.cfg.train.steps
    return f"{steps:,} steps of about {took:.2g} s: this will take about {in_words(steps * took)}"


def in_words(duration: float) -> str:
    """Seconds as `a minute`, `13 minutes` or `2.5 hours`."""
    if duration < 90:
        return "a minute"
    return f"{duration / 60:.0f} minutes" if duration < 5400 else f"{duration / 3600:.1f} hours"
