"""What the formats of others share: a state from settings and weights, our layers' names, errors of one line."""

import importlib
import inspect
import pickle
import re
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import config
import networks
from checkpoints.state import CheckpointError

Weights = dict[str, Tensor]
State = dict[str, Any]
Blocks = dict[str, tuple[str, str]]  # our block -> (their residual block, their attention)


def new_state(raw: dict[str, Any], shape: dict[str, Any], weights: Weights, path: Path) -> State:
    """A checkpoint's state at step 0; classes count the same, as the training images are not here to be counted.

    raw, the settings, and shape, what networks.build takes of the data, are checked here; weights by model_from.
    """
    raw = {"run": {"name": re.sub(r"[^\w.-]", "-", path.stem) or "imported"}, **raw}
    cfg = config.parse(raw, lambda key: f"{path} (its settings)")
    sizes = [size for value in shape.values() for size in (value if isinstance(value, list) else [value])]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{path}: its sizes are no whole numbers: {short(shape)}")
    data = {"shape": shape, "class_counts": [1] * shape.get("label_dim", 0) or None, "scaling": None}
    untrained = {"objective": {}, "optimizer": {}, "scaler": {}}
    return {"step": 0, "config": cfg.model_dump(), "data": data, "model": weights, "ema": [weights], **untrained}


def data_section(shape: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    """The config's `data`; path: of the training images, where a file says it."""
    path = str(path or "path/to/the/images")
    channels = shape["channels"] if shape["channels"] in (1, 3) else None
    sizes = {"resolution": shape["resolution"], "channels": channels, "conditional": bool(shape["label_dim"])}
    return {"name": "zip" if path.endswith(".zip") else "folder", "path": path, **sizes}


def defaults(name: str) -> dict[str, Any]:
    """The constructor defaults of a network of ours, which are EDM's."""
    parameters = inspect.signature(networks.NETWORKS[name]).parameters.values()
    given = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
    sizes = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "told", "heads")
    settings = {key: value for key, value in given.items() if key not in sizes}
    return {"name": name, **settings, "label_dropout": 0.0}  # which is training's to do


def layer_names(net: networks.DhariwalUNet, blocks: Blocks, table: dict[str, str]) -> dict[str, str]:
    """Our parameters' names -> theirs. Filters are constants and have no name there.

    table: our layers, within a block or outside of any -> theirs.
    """
    names = {}
    for name, _ in net.named_parameters():
        layer, leaf = name.rsplit(".", 1)
        block, _, part = layer.rpartition(".")
        if layer in table:
            theirs = table[layer]
        elif layer in blocks:  # the first convolution
            theirs = blocks[layer][0]
        else:
            theirs = f"{blocks[block][part in ('norm2', 'qkv', 'proj')]}.{table[part]}"
        names[f"model.{name}"] = f"{theirs}.{leaf}"
    return names


def read_tensors(file: Path | BinaryIO, path: Path) -> Any:
    """What torch.save wrote to a file that came with `path`. CheckpointError where it is more than data."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise refused(path, name[1]) if name else CheckpointError(f"{path}: cannot be read: {short(error)}") from None


def refused(path: Path, name: str) -> CheckpointError:
    """The error for a file that asks for `name`, which is none of the things that data is made of."""
    name = ascii(name)[1:-1]  # whatever it holds, it is one line without control characters
    return CheckpointError(f"{path}: refused: it asks for {name[:100]}, which is not data; nothing in it was run")


def package(name: str, what: object) -> Any:
    """An optional package, or a CheckpointError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        file = shlex.quote(config.ours("requirements-dev.txt"))
        raise CheckpointError(f"{what}: needs {name.split('.')[0]}; pip install -r {file}") from None


def short(value: object) -> str:
    """One line of at most 120 printable characters."""
    text = " ".join(str(value).split()).encode("unicode_escape").decode()
    return text if len(text) <= 120 else text[:117] + "..."
