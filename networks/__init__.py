"""Networks by name, and `build`, which makes the denoiser or flow map that a config describes."""

from typing import Any

from .autoencoder import Autoencoder, fresh
from .dit import DiT
from .edm2 import EDM2UNet
from .flow_map import FlowMap, columns
from .layers import plain_kernels
from .mlp import MLP
from .preconditioning import Preconditioner, Wrapper
from .unet import DhariwalUNet, SongUNet

__all__ = [
    "MLP",
    "NETWORKS",
    "Autoencoder",
    "DhariwalUNet",
    "DiT",
    "EDM2UNet",
    "FlowMap",
    "Preconditioner",
    "SongUNet",
    "Wrapper",
    "build",
    "plain_kernels",
]

NETWORKS = {"song_unet": SongUNet, "dhariwal_unet": DhariwalUNet, "edm2_unet": EDM2UNet, "dit": DiT, "mlp": MLP}


def build(
    settings: dict[str, Any],
    resolution: int | None = None,  # of images
    channels: int | None = None,
    label_dim: int = 0,
    augment_dim: int = 0,
    shape: tuple[int, ...] | None = None,  # of vectors, instead of the four above
    condition_dim: int = 0,
) -> Preconditioner | FlowMap | Autoencoder:
    """The network of `settings` (a config's `network` section) in its wrapper, fresh float32 weights on the CPU.

    A flow map where settings["times"] says what it is told of its two times; an autoencoder; else a denoiser.

    Draws them from torch's global generator. ValueError where the settings do not fit the data. The weights are NCHW,
    the faster layout on a CPU (its channels_last group norm is slow); on a GPU, ask `.to()` for channels_last.
    """
    if settings["name"] == "autoencoder":
        if shape is not None:
            raise ValueError("an autoencoder takes images, and the data are vectors")
        return fresh(settings, resolution, channels)
    settings = {key: value for key, value in settings.items() if key != "label_dropout"}  # training drops them
    network = NETWORKS[settings.pop("name")]
    wrapping = {key: settings.pop(key) for key in ("precond", "c_noise", "sigma_data", "sigma_max")}
    sigma_min, times = settings.pop("sigma_min"), settings.pop("times", None)
    flow = {key: settings.pop(key, default) for key, default in (("heads", 1), ("guidance_inputs", False))}
    if times is not None:
        settings |= {"told": columns(times, flow["guidance_inputs"]), "heads": flow["heads"]}
    elif flow["guidance_inputs"]:
        settings["told"] = 2
    if network is MLP:
        if shape is None:
            raise ValueError("mlp makes vectors, and the data are images; set network.name: song_unet")
        model = MLP(shape, condition_dim, **settings)
    elif shape is not None:
        what = "a DiT" if network is DiT else "a UNet"
        raise ValueError(f"{what} makes images, and the data are vectors; set network.name: mlp")
    else:
        model = network(resolution, channels, channels, label_dim=label_dim, augment_dim=augment_dim, **settings)
    if times is not None:
        return FlowMap(model, times, **wrapping, **flow)
    return Preconditioner(model, **wrapping, sigma_min=sigma_min, guidance_inputs=bool(flow["guidance_inputs"]))
