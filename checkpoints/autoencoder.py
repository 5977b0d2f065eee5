"""Autoencoders from a diffusers folder, the hub or a checkpoint of ours, and the hash that tells them apart."""

import hashlib
import os
from pathlib import Path

import torch

from checkpoints import state
from checkpoints.common import short
from checkpoints.state import CheckpointError
from networks.autoencoder import Autoencoder

KINDS = ("AutoencoderKL", "AutoencoderTiny")
HOME = "a diffusers folder, a checkpoint of objective: autoencoder or a name on the hub, as stabilityai/sd-vae-ft-mse"


def load(source: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in `source`, in eval mode, without gradient; its `source`, and `hash` of its weights.

    source: a diffusers folder (also one with the autoencoder in vae/), a name on the hub, or a checkpoint of objective
    autoencoder, whose first EMA it is. Only safetensors are read of others. CheckpointError in one line.
    """
    path = Path(os.path.expanduser(source))
    if path.is_file():
        model = state.load_model(path)
        if not isinstance(model, Autoencoder):
            raise CheckpointError(f"{source}: is no autoencoder, but a model of {model.codec.kind}; give {HOME}")
    else:
        model = Autoencoder(_of_diffusers(source, path))
    model = model.to(device).eval().requires_grad_(False)
    model.source, model.hash = str(source), weights_hash(model.model)
    return model


def weights_hash(vae: torch.nn.Module) -> str:
    """SHA-256 in hex of the weights: names sorted, each with its float32 bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_diffusers(source: str, path: Path) -> torch.nn.Module:
    """The diffusers module of a folder or a name on the hub."""
    try:
        import diffusers
    except ImportError:
        raise CheckpointError(f"{source}: needs diffusers; pip install diffusers") from None
    if path.is_dir():
        here = [folder for folder in (path, path / "vae") if (folder / "config.json").is_file()]
        if not here:
            raise CheckpointError(f"{source}: has no config.json, here or in vae/; give {HOME}")
        places = [(str(here[0]), {})]
    else:
        places = [(source, {}), (source, {"subfolder": "vae"})]
    for last, (place, where) in enumerate(places, 1 - len(places)):
        try:
            kind = diffusers.AutoencoderKL.load_config(place, **where).get("_class_name")
            break
        except Exception as error:
            if last == 0:
                why = f"no autoencoder can be read there ({short(error)})"
                raise CheckpointError(f"{source}: {why}; give {HOME}") from None
    if kind not in KINDS:
        raise CheckpointError(f"{source}: is a diffusers {short(kind)}; give {' or '.join(KINDS)}")
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
    try:
        vae, loaded = getattr(diffusers, kind).from_pretrained(place, output_loading_info=True, **options, **where)
    except Exception as error:
        raise CheckpointError(f"{source}: its weights cannot be read ({short(error)})") from None
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(loaded[what]):
            raise CheckpointError(f"{source}: its weights do not fit its config.json: {what[:-5]} {names[0]}")
    return vae
