"""Other people's checkpoints in and out: a file a format, and a line for it here. No code of a file is ever run."""

import os
import pickle
import shutil
from pathlib import Path

import config
from checkpoints import diffusers, edm, onnx, openai, safetensors
from checkpoints.common import State
from checkpoints.disk import write_atomically
from checkpoints.state import CheckpointError, config_of, load, model_from, write_state

LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch.save's files began before they were zips
EXPORTS = {"diffusers": diffusers.export, "safetensors": safetensors.export, "onnx": onnx.export}


def import_checkpoint(source: str | Path, target: str | Path, arch: str | Path | None = None) -> list[str]:
    """Write the network in `source` as a checkpoint of ours, `target`, and its settings beside it, `target`.yml.

    source: an EDM pickle, an OpenAI .pt file (`arch`: a JSON file with what its weights do not tell), or a safetensors
    file of ours. Both files must be new. Returns lines for the user. Raises CheckpointError.
    """
    source, target = Path(source), Path(target)
    settings = Path(f"{target}.yml")
    for path in (target, settings):
        if path.exists():
            raise CheckpointError(f"{path}: is there already, and nothing is written over; name another file")
    state, notes = read(source, arch)
    weights = model_from(state, source).state_dict()  # complete, of the right shapes, float32
    state |= {"model": weights, "ema": [weights]}
    cfg = config_of(state, source)
    write_state(target, state)
    write_atomically(settings, lambda file: file.write(config.dump(cfg).encode()))
    return [*notes, f"written: {target}", f"written: {settings} (its settings, for generate.py --cfg)"]


def read(path: Path, arch: str | Path | None = None) -> tuple[State, list[str]]:
    """The state in a file of another format, by what its first bytes say, and notes for the user."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_TORCH))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if head.startswith(b"PK") or head == LEGACY_TORCH:
        return openai.read(path, arch)
    if arch is not None:
        raise CheckpointError(f"--arch: is for OpenAI's .pt files; {path} says its own settings")
    if head[8:9] == b"{":
        return safetensors.read(path), []
    if head.startswith(b"\x80"):
        return edm.read(path)
    raise CheckpointError(f"{path}: is none of EDM's pickles, OpenAI's .pt files and safetensors files")


def export_checkpoint(source: str | Path, folder: str | Path, to: str) -> list[str]:
    """Write a checkpoint's first EMA as `to` (a key of EXPORTS) into a new `folder`, whole or not at all.

    Returns lines for the user. Raises CheckpointError.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already, and nothing is written over; name another folder")
    state = load(source)
    model = model_from(state, source)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        notes = EXPORTS[to](model, state, part)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [*notes, f"written: {folder}"]
