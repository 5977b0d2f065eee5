"""EDM's networks (2206.00364) and ECT's (2406.14548), as their network-snapshot-*.pkl hold them: read as data, nothing
in them is run. EDM2's are read here too; its network is edm2.py's."""

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

from checkpoints import common, edm2
from checkpoints.common import State, Weights, short
from checkpoints.state import CheckpointError
from config import ConfigError

ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}
PRECONDS = {  # class -> (network.precond, objective.name, its own sigma_min, scale of its Fourier embedding)
    "EDMPrecond": ("edm", "edm", 0, 16.0),
    "ECMPrecond": ("cm", "ect", 0.003, 0.02),  # in eval mode, in which snapshots are kept and sampled
}


class Record:
    """An object of a pickle as data: its class's name and its attributes. Nothing in it can run."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class took, and drop it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read(path: Path) -> tuple[State, list[str]]:
    """The EMA network in EDM's or ECT's network-snapshot-*.pkl, as a state, and notes for the user.

    Raises CheckpointError.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, path).load()
        ema = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(ema, Record):
            raise CheckpointError(f"{path}: holds no network named 'ema', as EDM's network-snapshot-*.pkl do")
        if ema.name not in (*PRECONDS, edm2.PRECOND):
            known = f"only {', '.join(PRECONDS)} and EDM2's {edm2.PRECOND} are supported"
            raise CheckpointError(f"{path}: its network is of class {short(ema.name)}; {known}")
        if ema.name == edm2.PRECOND:
            state = edm2.state_of(ema, _weights(ema), content, numbers, path)
        else:
            state = _state(ema, content, path)
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: is no whole pickle of EDM's or ECT's ({type(error).__name__}: {short(error)})"
        ) from None
    note = (
        f"set data.path in the settings: they say {state['config']['data']['path']}, where the original read its images"
    )
    return state, [note]


def _state(ema: Record, content: dict[str, Any], path: Path) -> State:
    """The state of an EDMPrecond or ECMPrecond and of what the pickle says of its data."""
    precond, objective, lowest, fourier_scale = PRECONDS[ema.name]
    given = {**dict(zip(ARGUMENTS, ema.state["_init_args"], strict=False)), **ema.state["_init_kwargs"]}
    given |= {key: ema.state[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in ema.state}
    shape = {"resolution": given.pop("img_resolution"), "channels": given.pop("img_channels")}
    shape |= {"label_dim": given.pop("label_dim", 0), "augment_dim": given.pop("augment_dim", 0)}
    low, high = given.pop("sigma_min", lowest), given.pop("sigma_max", math.inf)
    kind = given.pop("model_type", "DhariwalUNet")
    given.pop("use_fp16", None)
    if kind not in NETWORKS:
        raise CheckpointError(f"{path}: its network is of class {short(kind)}; supported: {', '.join(NETWORKS)}")
    own = common.defaults(NETWORKS[kind])
    if "fourier_scale" in own:
        own["fourier_scale"] = fourier_scale
    for key in given:
        if key not in own and key != "sigma_data":
            raise CheckpointError(f"{path}: its {kind} has a setting {short(key)}, which this project lacks")
    network = {
        **own,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "precond": precond if low else "edm",  # a boundary at 0 is EDM's
        "c_noise": "log",
        "sigma_min": low or 0.002,  # EDM's samplers start and end at these where the network has no limits
        "sigma_max": 80.0 if high == math.inf else high,
    }
    images, pipe = content.get("dataset_kwargs") or {}, content.get("augment_pipe")
    augment = float(pipe.state["_init_kwargs"].get("p", 1)) if isinstance(pipe, Record) else 0.0
    data = common.data_section(shape, images.get("path"))
    data |= {"augment": augment, "flip": bool(images.get("xflip")) and not augment}
    raw = {"data": data, "network": network, "objective": {"name": objective}}
    return common.new_state(raw, shape, _weights(ema), path)


def _weights(module: Record, prefix: str = "") -> Weights:
    """Parameters and buffers of a recorded module and those below it, by the names of torch's state_dict."""
    own = {**module.state["_parameters"], **module.state["_buffers"]}
    weights = {prefix + name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in module.state["_modules"].items():
        if isinstance(child, Record):
            weights |= _weights(child, f"{prefix}{name}.")
    return weights


def numbers(array: Record) -> list:
    """A numpy array of numbers as (nested) lists."""
    _, shape, dtype, fortran, data = array.state
    return np.frombuffer(data, _plain(dtype)).reshape(shape, order="F" if fortran else "C").tolist()


def _plain(dtype: Record) -> str:
    """A pickled dtype of plain numbers, in numpy's words; ValueError for others."""
    if not re.fullmatch("[biuf][1248]", dtype.name):
        raise ValueError(f"a number in it is of type {short(dtype.name)}, which is not supported")
    order = dtype.state[1] if dtype.state and dtype.state[1] in "<>" else "<"
    return order + dtype.name


class _Unpickler(pickle.Unpickler):
    """Reads such a pickle into tensors, plain containers and records. Any name outside `_known` is refused."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.known = _known(path)  # its own functions and classes: a pickle may set attributes on what it can name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise common.refused(self.path, f"{module}.{name}")
        return self.known[module, name]


def _known(path: Path) -> dict[tuple[str, str], Callable | type]:
    """What the names in a published pickle stand for here."""

    def kind(name: str, state: Any = None) -> type[Record]:
        return type("Record", (Record,), {"name": name, "state": state})

    def persistent(meta: dict[str, Any]) -> Record:  # an object of EDM's; its class's source text is left unread
        return kind(str(meta["class_name"]), meta["state"])()

    def method(of: Any, name: str) -> Record:  # ECT's loss keeps one of its own in an attribute; nothing is looked up
        if not isinstance(of, Record):
            raise common.refused(path, "builtins.getattr")
        return kind(str(name))()

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
        return np.frombuffer(data, _plain(dtype))[0].item()

    def array(*args: Any) -> Record:  # its content comes as its state: see `numbers`
        return kind("ndarray")()

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): dict,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("builtins", "getattr"): method,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("numpy", "dtype"): dtype,
        ("numpy", "ndarray"): kind("ndarray"),
        **{(core, "scalar"): scalar for core in ("numpy.core.multiarray", "numpy._core.multiarray")},
        **{(core, "_reconstruct"): array for core in ("numpy.core.multiarray", "numpy._core.multiarray")},
        **{("torch.nn.modules.container", name): kind(name) for name in ("ModuleDict", "ModuleList", "Sequential")},
    }
