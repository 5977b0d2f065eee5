"""Safetensors, both ways: our EMA weights, with the config and the data's shape in the file's metadata as JSON."""

import json
from pathlib import Path

import torch

from checkpoints.common import State, new_state, package, short
from checkpoints.state import CheckpointError
from config import ConfigError


def read(path: Path) -> State:
    """The state in a safetensors file that `export` wrote."""
    safetensors = package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        cfg, data = (json.loads(about[key]) for key in ("config", "data"))
        state = new_state(cfg, data["shape"], weights, path)
        state["data"] |= {"class_counts": data["class_counts"], "scaling": data.get("scaling")}
        return state
    except ConfigError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: was not exported by this project: its metadata has no {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({short(error)})") from None


def export(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.safetensors: the EMA weights, float32, and in its metadata the config and the data's shape as JSON."""
    safetensors = package("safetensors.torch", "--to safetensors")
    about = {"config": json.dumps(state["config"]), "data": json.dumps(state["data"])}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", about)
    return ["model.safetensors is read back by: python convert.py import"]
