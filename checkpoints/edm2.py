"""EDM2's network (2312.02696), as its network-snapshot-*.pkl hold it; edm.py reads the pickle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import common
from checkpoints.common import State, Weights, short
from checkpoints.state import CheckpointError

PRECOND = "Precond"  # its class there
ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
THEIRS = {"dropout_res": "dropout_max_resolution"}  # in ECT's copy of the network


def state_of(
    ema: Any,  # the pickle's Precond: its constructor's arguments in `state`
    weights: Weights,  # its tensors, by the names of torch's state_dict
    content: dict[str, Any],  # the whole pickle
    numbers: Callable[[Any], list],  # of a pickled array
    path: Path,
) -> State:
    """The state of a network of EDM2 and of what its pickle says of loss, data and encoder; float32 weights.

    state["data"]["encoder"] keeps what lies between latents as stored and as the network sees them: its class's "name"
    and, of StabilityVAEEncoder, "vae_name", "scale" and "bias" (x scale + bias), a number a channel.
    """
    given = {**dict(zip(ARGUMENTS, ema.state["_init_args"], strict=False)), **ema.state["_init_kwargs"]}
    shape = {"resolution": given.pop("img_resolution"), "channels": given.pop("img_channels")}
    shape |= {"label_dim": given.pop("label_dim", 0), "augment_dim": 0}
    given.pop("use_fp16", None)
    given = {THEIRS.get(key, key): value for key, value in given.items()}
    own = common.defaults("edm2_unet")
    for key in given:
        if key not in own and key != "sigma_data":
            raise CheckpointError(f"{path}: its network has a setting {short(key)}, which this project lacks")
    network = {
        **own,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "precond": "edm",
        "c_noise": "log",
    }
    loss, images = content.get("loss_fn"), content.get("dataset_kwargs") or {}
    levels = {key: loss.state[key] for key in ("P_mean", "P_std") if key in getattr(loss, "state", None) or {}}
    raw = {
        "data": common.data_section(shape, images.get("path")),
        "network": network,
        "objective": {"name": "edm", "logvar": True, **levels},
    }
    weights = {f"model.{name.removeprefix('unet.')}": value.float() for name, value in weights.items()}
    state = common.new_state(raw, shape, weights, path)
    state["data"]["encoder"] = encoder = _encoder(content.get("encoder"), numbers)
    if encoder and "scale" in encoder:  # a model of latents, whose images lie in [0, 1] there
        known = {"source": encoder.get("vae_name"), "hash": None, "factor": None, "image_channels": None}
        scaling = {"scale": encoder["scale"], "bias": encoder["bias"]}
        state["data"] |= {"scaling": scaling, "autoencoder": {**known, "input_range": "0,1"}}
        state["config"]["data"] |= {"name": "latents", "resolution": None, "channels": None, "scaling": "edm2"}
    return state


def _encoder(encoder: Any, numbers: Callable[[Any], list]) -> dict[str, Any] | None:
    """An encoder of the pickle in plain numbers; None where there is none."""
    if encoder is None:
        return None
    fields = encoder.state or {}
    arrays = {key: numbers(fields[key]) for key in ("scale", "bias") if key in fields}
    return {"name": encoder.name, **{k: str(fields[k]) for k in ("vae_name",) if k in fields}, **arrays}
