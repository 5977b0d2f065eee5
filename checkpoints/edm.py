"""EDM's networks (2206.00364), as its network-snapshot-*.pkl hold them."""

import math
from pathlib import Path
from typing import Any

from checkpoints.common import State, data_section, defaults, new_state, short
from checkpoints.pickles import Record, load, weights_of
from checkpoints.state import CheckpointError
from config import ConfigError

ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}


def read(path: Path) -> tuple[State, list[str]]:
    """The EMA network in a network-snapshot-*.pkl, as a state, and notes for the user. Raises CheckpointError."""
    try:
        content = load(path)
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
    own = defaults(NETWORKS[kind])
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
    data = data_section(shape, images.get("path"))
    data |= {"augment": augment, "flip": bool(images.get("xflip")) and not augment}
    raw = {"data": data, "network": network, "objective": {"name": "edm"}}
    return new_state(raw, shape, weights_of(ema), path)
