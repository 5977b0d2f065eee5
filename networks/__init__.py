"""Networks by name, and `build`, which makes the denoiser that a config describes."""

from typing import Any

from .layers import plain_attention
from .preconditioning import Preconditioner
from .unet import DhariwalUNet, SongUNet

__all__ = ["NETWORKS", "DhariwalUNet", "Preconditioner", "SongUNet", "build", "plain_attention"]

NETWORKS = {"song_unet": SongUNet, "dhariwal_unet": DhariwalUNet}


def build(network_cfg: Any, resolution: int, channels: int, label_dim: int, augment_dim: int) -> Preconditioner:
    """The preconditioned network that the config's `network` section describes, with fresh float32 weights on the CPU.

    Draws them from torch's global generator. ValueError where the settings do not fit the resolution. The weights are
    NCHW, the faster layout on a CPU (its channels_last group norm is slow); on a GPU, ask `.to()` for channels_last.
    """
    settings = network_cfg.model_dump()
    network = NETWORKS[settings.pop("name")]
    preconditioning = {key: settings.pop(key) for key in ("precond", "c_noise", "sigma_data", "sigma_min", "sigma_max")}
    model = network(resolution, channels, channels, label_dim=label_dim, augment_dim=augment_dim, **settings)
    return Preconditioner(model, **preconditioning)
