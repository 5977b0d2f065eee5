"""A pickle as data: read into tensors, plain containers and inert records. Nothing that it names is run."""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.common import Weights, refused, short, unpicklable
from checkpoints.state import CheckpointError


def load(path: Path) -> Any:
    """What is in the pickle `path`. Raises CheckpointError for a name that is not data; else whatever pickle raises."""
    with open(path, "rb") as file:
        return _Unpickler(file, path).load()


class Record:
    """An object of a pickle as data: its class's name and its attributes. Nothing in it can run."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class took, and drop it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads an EDM pickle into tensors, plain containers and records. Any name outside `_known` is refused."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.known = _known(path)  # its own functions and classes: a pickle may set attributes on what it can name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise refused(self.path, f"{module}.{name}")
        return self.known[module, name]


def _known(path: Path) -> dict[tuple[str, str], Callable | type]:
    """What the names in a published EDM pickle stand for here."""

    def persistent(meta: dict[str, Any]) -> Record:  # an object of EDM's; its class's source text is left unread
        record = Record()
        record.name, record.state = str(meta["class_name"]), meta["state"]
        return record

    def storage(data: bytes) -> Tensor:  # 1-D; torch.save's bytes within the pickle
        try:
            typed = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise unpicklable(path, error) from None
        return torch.empty(0, dtype=typed.dtype).set_(typed._untyped_storage)

    def tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *flags: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)  # checks its bounds

    def parameter(data: Tensor, *flags: Any) -> Tensor:
        return data

    def dtype(name: str, *flags: Any) -> Record:
        record = Record()
        record.name = str(name)
        return record

    def scalar(dtype: Record, data: bytes) -> Any:
        if not re.fullmatch("[biuf][1248]", dtype.name):
            raise CheckpointError(f"{path}: a number in it is of type {short(dtype.name)}, which is not supported")
        order = dtype.state[1] if dtype.state and dtype.state[1] in "<>" else "<"
        return np.frombuffer(data, order + dtype.name)[0].item()

    def inert(name: str) -> type:
        return type(name, (Record,), {"name": name})

    known: dict[tuple[str, str], Callable | type] = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): dict,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("numpy", "dtype"): dtype,
    }
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[core, "scalar"] = scalar
    for name in ("ModuleDict", "ModuleList", "Sequential"):
        known["torch.nn.modules.container", name] = inert(name)
    return known


def weights_of(module: Record, prefix: str = "") -> Weights:
    """Parameters and buffers of a recorded module and those below it, by the names of torch's state_dict."""
    own = {**module.state["_parameters"], **module.state["_buffers"]}
    weights = {prefix + name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in module.state["_modules"].items():
        if isinstance(child, Record):
            weights |= weights_of(child, f"{prefix}{name}.")
    return weights
