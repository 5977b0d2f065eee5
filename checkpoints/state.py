"""State to disk and back: a checkpoint is whole, or it is refused.

A checkpoint is torch.save's zip of tensors and plain containers. It is read with weights_only=True, so a file can never
run code, and only after the SHA-256 in the zip's comment, of all that comes before it, has been found right. (The
members' CRC-32 leave out the list of contents: a bit turned there can make a weight a folder, which torch reads.)
"""

import contextlib
import errno
import hashlib
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

import networks
from checkpoints import starting
from checkpoints.disk import write_atomically
from config import Config, ConfigError, parse
from sources.codecs import codec_from

FORMAT = 1
PARTS = {"step": int, "config": dict, "data": dict, "model": dict, "ema": list, "objective": dict, "optimizer": dict}
CHECKSUM = 2 + len("sha256:") + 64  # bytes at the end of a file; the 2 are a zip's for the length of its comment


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or does not fit; one line that names the file and what is wrong."""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, with the SHA-256 of its content at its end."""

    def write(file: BinaryIO) -> None:
        torch.save({"format": FORMAT, **state}, file)
        size = file.seek(-2, os.SEEK_END)  # a zip ends with the length of its comment
        file.write(_checksum(file, size))

    write_atomically(path, write)


def _checksum(file: BinaryIO, size: int) -> bytes:
    """The SHA-256 of a file's first `size` bytes as the end of a zip: the comment's length, and the comment."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(max(0, min(size - file.tell(), 2**20))):
        digest.update(piece)
    comment = b"sha256:" + digest.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


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
    path = Path(os.path.expanduser(path))
    if path.exists() and not path.is_file():  # a pipe could be read for ever
        raise CheckpointError(f"{path}: is no file")
    try:
        problem = _damage(path)
        state = None if problem else torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        problem = "there is no such checkpoint"
    except Exception as error:
        problem = f"not a whole checkpoint of this project ({' '.join(str(error).split())[:120]})"
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of this project (it has no format number)")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise CheckpointError(f"{path}: is of format {state['format']!s:.20}; this version reads format {FORMAT}")
    for part, kind in PARTS.items():
        if type(state.get(part)) not in (kind, OrderedDict) or state[part] == []:
            raise CheckpointError(f"{path}: not a whole checkpoint of this project (its part {part!r} is missing)")
    return state


def _damage(path: Path) -> str:
    """How a file is not as it was written, or that it unpacks to more than its size, as none of ours does; else ""."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            return "not a whole checkpoint of this project (File is not a zip file)"
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 22)
        end = file.read()
        bare = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")  # no comment: torch.save's own, as ours once were
        if not bare and _checksum(file, size - CHECKSUM) != file.read():  # before anything of it is used
            return "damaged: its checksum is wrong; use another checkpoint"
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
            return "refused: it unpacks to more than its size, which no checkpoint of ours does"
        if bare and (damaged := archive.testzip()):
            return f"damaged: the checksum of {damaged} is wrong; use another checkpoint"
    return ""


def newest_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint of a run that is whole, its state, and what was wrong with newer ones."""
    problems: list[str] = []
    best: tuple[Path, dict[str, Any]] | None = None
    for path in saved(folder):
        # A crash between the two names of a new checkpoint leaves last.ckpt one behind.
        if best and int(path.stem.split("-")[1]) <= best[1]["step"]:
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
    """The EMA model of a checkpoint, in eval mode: model(x, sigma, class_labels=None) -> clean data, or, where
    model.clock is "time", model(z, t, r, class_labels=None) -> average velocity; an autoencoder, where it is None.

    `average` picks one of several EMAs. A model of vectors takes condition=(B, K). `model.codec` (sources/codecs.py)
    knows the data: codec.told(classes or conditions, x) makes of them what the model takes, codec.from_model(D) of what
    it gives images or vectors, codec.class_counts is the training set's. Raises CheckpointError.
    """
    return model_from(load(path), path, average).to(device)


def model_from(state: dict[str, Any], path: str | Path, average: int = 0) -> torch.nn.Module:
    """load_model for a state already read."""
    if not 0 <= average < len(state["ema"]):
        raise CheckpointError(f"{path}: has {len(state['ema'])} averages, no number {average}")
    cfg = config_of(state, path)
    try:
        model = networks.build(cfg.network.model_dump(), **state["data"]["shape"])
        model.codec = codec_from(state["data"])
        _fill(model, state["ema"][average], path)
    except CheckpointError:
        raise
    except Exception as error:  # a file made by hand can ask for anything
        raise CheckpointError(f"{path}: its network cannot be built ({' '.join(str(error).split())[:120]})") from None
    return model.eval().requires_grad_(False)


def initialise(model: torch.nn.Module, path: str | Path) -> str:
    """Copy a checkpoint's first EMA into `model` (train.init_from). Raises CheckpointError at the first difference.

    Says in one line how a flow map starts, where the checkpoint holds another kind of model; else "".

    A model trained with augmentation labels may start one without: at label zero their weights do nothing. Between the
    clocks of EDM and TrigFlow the output changes its sign; D stays the same where c_noise does (2410.11081 sec. 3).
    """
    state = load(path)
    weights = state["ema"][0]
    if "model.map_augment.weight" not in model.state_dict():
        weights.pop("model.map_augment.weight", None)
    there = config_of(state, path).network
    if (there.name == "autoencoder") != (model.clock is None):
        here = "an autoencoder is trained here" if model.clock is None else "this run trains none"
        raise CheckpointError(f"{path}: is of another network: network.name is {there.name} there, and {here}")
    if model.clock is None:
        _fill(model, weights, path)
        return ""
    free = model.clock == "time" or model.c_noise == "t"  # the weights may be only a start, as in sCM
    if there.c_noise != model.c_noise and not free:
        raise CheckpointError(
            f"{path}: is of another network: network.c_noise is {there.c_noise} there and {model.c_noise} here"
        )
    said = starting.how(model, there)
    with contextlib.suppress(AttributeError, TypeError, RuntimeError, IndexError):  # no such tensors: _fill says so
        starting.turn(weights, there.precond, model.precond)
        if said or (model.clock == "sigma" and model.guidance_inputs and not there.guidance_inputs):
            starting.fit(model, weights, there)
    _fill(model, weights, path)
    return f"the network starts from {path}: {said}" if said else ""


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
