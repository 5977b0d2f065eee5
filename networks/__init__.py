"""Networks by name, and `build`, which makes the denoiser that a config describes."""

from typing import Any

from .layers import plain_kernels
from .mlp import MLP
from .preconditioning import Preconditioner
from .unet import DhariwalUNet, SongUNet

__all__ = ["MLP", "NETWORKS", "DhariwalUNet", "Preconditioner", "SongUNet", "build", "plain_kernels"]

NETWORKS = {"song_unet": SongUNet, "dhariwal_unet": DhariwalUNet, "mlp": MLP}


def build(
    settings: dict[str, Any],
    resolution: int | None = None,  # of images
    channels: int | None = None,
    label_dim: int = 0,
    augment_dim: int = 0,
    shape: tuple[int, ...] | None = None,  # of vectors, instead of the four above
    condition_dim: int = 0,
) -> Preconditioner:
    """The preconditioned network of `settings` (a config's `network` section), its fresh float32 weights on the CPU.

    Draws them from torch's global generator. ValueError where the settings do not fit the data. The weights are NCHW,
    the faster layout on a CPU (its channels_last group norm is slow); on a GPU, ask `.to()` for channels_last.
    """
    settings = {key: value for key, value in settings.items() if key != "label_dropout"}  # training drops them
    network = NETWORKS[settings.pop("name")]
    preconditioning = {key: settings.pop(key) for key in ("precond", "c_noise", "sigma_data", "sigma_min", "sigma_max")}
    if network is MLP:
        if shape is None:
            raise ValueError("mlp makes vectors, and the data are images; set network.name: song_unet")
        return Preconditioner(MLP(shape, condition_dim, **settings), **preconditioning)
    if shape is not None:
        raise ValueError("a UNet makes images, and the data are vectors; set network.name: mlp")
    model = network(resolution, channels, channels, label_dim=label_dim, augment_dim=augment_dim, **settings)
    return Preconditioner(model, **preconditioning)
