"""EDM's networks (2206.00364), as its network-snapshot-*.pkl hold them: read as data, nothing in them is run."""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints import common
from checkpoints.common import State, Weights, short
from checkpoints.state import CheckpointError
from config import ConfigError

ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}


class Record:
    """An object of a pickle as data: its class's name and its attributes. Nothing in it can run."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class took, and drop it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read(path: Path) -> tuple[State, list[str]]:
    """The EMA network in a network-snapshot-*.pkl, as a state, and notes for the user. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, path).load()
        ema = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(ema, Record):
            raise CheckpointError(f"{path}: holds no network named 'ema', as EDM's network-snapshot-*.pkl do")
        if ema.name != "EDMPrecond":
            raise CheckpointError(f"{path}: its network is of class {short(ema.name)}; only EDMPrecond is supported")
        state = _state(ema, content, path)
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole EDM pickle ({type(error).__name__}: {short(error)})") from None
    note = f"set data.path in the settings: they say {state['config']['data']['path']}, where EDM read its images"
    return state, [note]


def _state(ema: Record, content: dict[str, Any], path: Path) -> State:
    """The state of an EDMPrecond and of what the pickle says of its data."""
    given = {**dict(zip(ARGUMENTS, ema.state["_init_args"], strict=False)), **ema.state["_init_kwargs"]}
    shape = {"resolution": given.pop("img_resolution"), "channels": given.pop("img_channels")}
    shape |= {"label_dim": given.pop("label_dim", 0), "augment_dim": given.pop("augment_dim", 0)}
    low, high = given.pop("sigma_min", 0), given.pop("sigma_max", math.inf)
    kind = given.pop("model_type", "DhariwalUNet")
    given.pop("use_fp16", None)
    if kind not in NETWORKS:
        raise CheckpointError(f"{path}: its network is of class {short(kind)}; supported: {', '.join(NETWORKS)}")
    own = common.defaults(NETWORKS[kind])
    for key in given:
        if key not in own and key != "sigma_data":
            raise CheckpointError(f"{path}: its {kind} has a setting {short(key)}, which this project lacks")
    network = {
        **own,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "precond": "edm",
        "c_noise": "log",
        "sigma_min": low or 0.002,  # EDM's samplers start and end at these where the network has no limits
        "sigma_max": 80.0 if high == math.inf else high,
    }
    images, pipe = content.get("dataset_kwargs") or {}, content.get("augment_pipe")
    augment = float(pipe.state["_init_kwargs"].get("p", 1)) if isinstance(pipe, Record) else 0.0
    data = common.data_section(shape, images.get("path"))
    data |= {"augment": augment, "flip": bool(images.get("xflip")) and not augment}
    raw = {"data": data, "network": network, "objective": {"name": "edm"}}
    return common.new_state(raw, shape, _weights(ema), path)


def _weights(module: Record, prefix: str = "") -> Weights:
    """Parameters and buffers of a recorded module and those below it, by the names of torch's state_dict."""
    own = {**module.state["_parameters"], **module.state["_buffers"]}
    weights = {prefix + name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in module.state["_modules"].items():
        if isinstance(child, Record):
            weights |= _weights(child, f"{prefix}{name}.")
    return weights


class _Unpickler(pickle.Unpickler):
    """Reads an EDM pickle into tensors, plain containers and records. Any name outside `_known` is refused."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.known = _known(path)  # its own functions and classes: a pickle may set attributes on what it can name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise common.refused(self.path, f"{module}.{name}")
        return self.known[module, name]


def _known(path: Path) -> dict[tuple[str, str], Callable | type]:
    """What the names in a published EDM pickle stand for here."""

    def kind(name: str, state: Any = None) -> type[Record]:
        return type("Record", (Record,), {"name": name, "state": state})

    def persistent(meta: dict[str, Any]) -> Record:  # an object of EDM's; its class's source text is left unread
        return kind(str(meta["class_name"]), meta["state"])()

    def storage(data: bytes) -> Tensor:  # 1-D; torch.save's bytes within the pickle
        typed = common.read_tensors(io.BytesIO(data), path)
        return torch.empty(0, dtype=typed.dtype).set_(typed._untyped_storage)

    def tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *flags: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)  # checks its bounds

    def parameter(data: Tensor, *flags: Any) -> Tensor:
        return data

    def dtype(name: str, *flags: Any) -> Record:
        return kind(str(name))()

    def scalar(dtype: Record, data: bytes) -> Any:
        if not re.fullmatch("[biuf][1248]", dtype.name):
            raise CheckpointError(f"{path}: a number in it is of type {short(dtype.name)}, which is not supported")
        order = dtype.state[1] if dtype.state and dtype.state[1] in "<>" else "<"
        return np.frombuffer(data, order + dtype.name)[0].item()

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): dict,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("numpy", "dtype"): dtype,
        **{(core, "scalar"): scalar for core in ("numpy.core.multiarray", "numpy._core.multiarray")},
        **{("torch.nn.modules.container", name): kind(name) for name in ("ModuleDict", "ModuleList", "Sequential")},
    }
