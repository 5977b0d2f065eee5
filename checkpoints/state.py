"""State to disk and back, whole or not at all.

A checkpoint is torch.save's zip of tensors and plain containers. It is read with weights_only=True, so a file can never
run code, and used only after the SHA-256 in the zip's comment has been checked, so a damaged file is never half loaded.
(The members' CRC-32 leave out the list of contents: a bit turned there can make a weight a folder, which torch reads.)

    python checkpoint.py import SRC DST [--arch FILE.json]
    python checkpoint.py export CKPT DIR --to diffusers|safetensors|onnx
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

import networks
from config import Config, ConfigError, parse
from sources import vectors

FORMAT = 1
PARTS = {"step": int, "config": dict, "data": dict, "model": dict, "ema": list, "objective": dict, "optimizer": dict}
OUTPUT_LAYER = re.compile(r"model\.(dec\.\d+x\d+_aux_conv|out_conv|last)\.(weight|bias)")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or does not fit; one line that names the file and what is wrong."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "x+b") as file:  # x: a new file, never what a link of this name points to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, with the SHA-256 of its content at its end."""

    def write(file) -> None:
        torch.save({"format": FORMAT, "sealed": True, **state}, file)
        file.seek(-2, os.SEEK_END)  # a zip ends with the length of its comment
        size = file.tell()
        file.seek(0)
        seal = _seal(file, size)
        file.seek(size)
        file.write(seal)

    write_atomically(path, write)


def _seal(file, size: int) -> bytes:
    """The SHA-256 of a file's first `size` bytes as the end of a zip: the comment's length, and the comment."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, 2**20))):
        digest.update(piece)
        size -= len(piece)
    comment = b"sha256:" + digest.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


def _sealed(path: Path) -> bool:
    """Whether the checksum at the end of a file is right."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - len(_seal(file, 0))
        file.seek(0)
        return _seal(file, size) == file.read()


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, all of `content` or nothing. Raises OSError, also where `path` is a symbolic link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) < len(content):  # the disk was full halfway
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def refuse_links(folder: Path) -> None:
    """Raise ConfigError for a run folder that leads out of itself: what a run writes and removes lies in it alone."""
    names = ("config.yml", "metrics.jsonl", "sigmas.json", "checkpoints", "samples", "generated")
    for path in (*(folder / name for name in names), *(folder / "checkpoints").glob("*.ckpt")):
        kind = "symbolic link" if path.is_symlink() else "pipe or device"
        if path.is_symlink() or (path.exists() and not (path.is_dir() or path.is_file())):
            raise ConfigError(f"run.dir: {path} is a {kind}: refused; move what it stands for there, or name another")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for part in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        if not part.is_dir():
            part.unlink(missing_ok=True)


def save(state: dict[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Write `folder`/step-<step>.ckpt, point last.ckpt at it and remove all but the newest `keep`.

    At every moment last.ckpt is a whole checkpoint. Raises OSError where the disk refuses; nothing is lost then.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, which leads out of the run folder", str(folder))
    path = folder / f"step-{step:08d}.ckpt"
    write_state(path, state)
    link = folder / f".last.{os.getpid()}.part"
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # the same bytes under a second name
        os.replace(link, folder / "last.ckpt")
    except OSError:  # a file system without hard links
        link.unlink(missing_ok=True)
        write_atomically(folder / "last.ckpt", lambda file: file.write(path.read_bytes()))
    for old in numbered(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def numbered(folder: Path) -> list[Path]:
    """The checkpoints step-*.ckpt of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", p.name))


def load(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint of ours. Raises CheckpointError; never runs code from the file."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe could be read for ever
        raise CheckpointError(f"{path}: is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (
                any(member.compress_type for member in members)
                or sum(m.file_size for m in members) > path.stat().st_size
            ):
                raise CheckpointError(
                    f"{path}: refused: it unpacks to more than its size, which no checkpoint of ours does"
                )
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong; use another checkpoint")
        state = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a whole checkpoint of this project ({reason})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of this project (it has no format number)")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise CheckpointError(f"{path}: is of format {state['format']!s:.20}; this version reads format {FORMAT}")
    for part, kind in PARTS.items():
        if type(state.get(part)) not in (kind, OrderedDict) or state[part] == []:
            raise CheckpointError(f"{path}: not a whole checkpoint of this project (its part {part!r} is missing)")
    if state.pop("sealed", False) and not _sealed(path):
        raise CheckpointError(f"{path}: damaged: its checksum is wrong; use another checkpoint")
    return state


def newest_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint of a run that is whole, its state, and what was wrong with newer ones."""
    problems: list[str] = []
    best: tuple[Path, dict[str, Any]] | None = None
    for path in saved(folder):
        # A crash between the two names of a new checkpoint leaves last.ckpt one behind.
        if best and (path.name == "last.ckpt" or int(path.stem.split("-")[1]) <= best[1]["step"]):
            continue
        try:
            best = path, load(path)
        except CheckpointError as error:
            problems.append(str(error))
    if best is None:
        raise CheckpointError(f"{problems[0]}; no checkpoint in {folder} can be read: start anew in another run.dir")
    return *best, problems


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run: last.ckpt, then the numbered ones, newest first."""
    return [path for path in (folder / "last.ckpt", *reversed(numbered(folder))) if path.exists()]


def config_of(state: dict[str, Any], path: str | Path) -> Config:
    """The config that a checkpoint was trained with."""
    return parse(state["config"], lambda key: f"{path} (its config)")


def load_model(path: str | Path, device: torch.device | str = "cpu", average: int = 0) -> torch.nn.Module:
    """The preconditioned EMA model of a checkpoint, in eval mode: model(x, sigma, class_labels=None) -> clean data.

    `average` picks one of several EMAs. The model also carries `class_counts`, the training set's, or None. A model of
    vectors takes condition=(B, K), and carries `scaling`, a vectors.Scaling: scaling.condition(c) makes of conditions
    what it takes, scaling.restore(D) of what it gives the data's own units. Raises CheckpointError.
    """
    return model_from(load(path), path, average).to(device)


def model_from(state: dict[str, Any], path: str | Path, average: int = 0) -> torch.nn.Module:
    """load_model for a state already read."""
    if not 0 <= average < len(state["ema"]):
        raise CheckpointError(f"{path}: has {len(state['ema'])} averages, no number {average}")
    cfg = config_of(state, path)
    try:
        model = networks.build(cfg.network, **state["data"]["shape"])
        model.class_counts = state["data"]["class_counts"]
    except Exception as error:  # a file made by hand can ask for anything
        raise CheckpointError(f"{path}: its network cannot be built ({' '.join(str(error).split())[:120]})") from None
    _fill(model, state["ema"][average], path)
    if scaling := state["data"].get("scaling"):
        model.scaling = vectors.Scaling(**scaling)
    return model.eval().requires_grad_(False)


def initialise(model: torch.nn.Module, path: str | Path) -> None:
    """Copy a checkpoint's first EMA into `model` (train.init_from). Raises CheckpointError at the first difference.

    A model trained with augmentation labels may start one without: at label zero their weights do nothing. Between the
    clocks of EDM and TrigFlow the output changes its sign; D stays the same where c_noise does (2410.11081 sec. 3).
    """
    state = load(path)
    weights = state["ema"][0]
    if "model.map_augment.weight" not in model.state_dict():
        weights.pop("model.map_augment.weight", None)
    there = config_of(state, path).network
    if there.c_noise != model.c_noise and model.c_noise != "t":  # with t the weights are only a start, as in sCM
        raise CheckpointError(
            f"{path}: is of another network: network.c_noise is {there.c_noise} there and {model.c_noise} here"
        )
    if (there.precond == "trigflow") != (model.precond == "trigflow"):
        for name in filter(OUTPUT_LAYER.fullmatch, weights):  # F of TrigFlow is minus F of EDM
            weights[name] = -weights[name]
    _fill(model, weights, path)


def _fill(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: not a whole checkpoint of this project (its weights are no tensors)")
    for name in sorted({**own, **weights}):
        if name not in weights:
            raise CheckpointError(f"{path}: is of another network: it has no {name}")
        if name not in own:
            raise CheckpointError(f"{path}: is of another network: {name} has no place in this one")
        if own[name].shape != weights[name].shape:
            there, here = list(weights[name].shape), list(own[name].shape)
            raise CheckpointError(f"{path}: is of another network: {name} is {there} there and {here} here")
    model.load_state_dict(weights)
