"""Images to latents and back: diffusers' AutoencoderKL or AutoencoderTiny, frozen or in training."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """An autoencoder of images in [-1, 1] (B, C, R, R); latents (B, c, r, r) are as its encoder gives them, unscaled.

    vae: a diffusers AutoencoderKL (2112.10752) or AutoencoderTiny (TAESD); both are given [-1, 1], which Tiny's own
    layers take to [0, 1]. The latent is float32 (float64 for float64 x), whatever the network computes in.
    """

    clock = None  # it is told no noise and no time
    started = ""  # see Wrapper
    autocast: torch.dtype | None = None  # bfloat16 or float16 inside the network; None: as around the call

    def __init__(self, vae: nn.Module, resolution: int | None = None):
        """resolution: pixels per side of the images that it is trained on, where that is known."""
        super().__init__()
        self.model, settings = vae, vae.config
        self.tiny = "encoder_block_out_channels" in settings  # AutoencoderTiny's
        levels = len(settings.encoder_block_out_channels if self.tiny else settings.block_out_channels)
        self.image_channels: int = settings.in_channels
        self.channels: int = settings.latent_channels
        self.factor: int = 2 ** (levels - 1)  # pixels per pixel of the latent
        self.scaling_factor = float(settings.scaling_factor)
        self.shift_factor = float(settings.shift_factor or 0.0)
        self.shape = (self.image_channels, resolution, resolution)  # of one image
        self.codec: nn.Module | None = None  # between pixels and [-1, 1], where it is trained here

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, (B, c, r, r) each; AutoencoderTiny's deviation is 0."""
        x = self._wide(x)
        with self._casting(x):
            out = self.model.encode(x.to(self._dtype()))
        if self.tiny:
            return out.latents.to(x.dtype), torch.zeros_like(out.latents, dtype=x.dtype)
        mean, logvar = out.latent_dist.parameters.to(x.dtype).chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, R, R) of latents, about [-1, 1] and not clamped to it."""
        z = self._wide(z)
        with self._casting(z):
            return self.model.decode(z.to(self._dtype())).sample.to(z.dtype)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass instead of kept."""
        return self.model.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, again: bool) -> None:
        """Ask for it, or not."""
        self.model.enable_gradient_checkpointing() if again else self.model.disable_gradient_checkpointing()

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _casting(self, x: Tensor) -> contextlib.AbstractContextManager:
        return torch.autocast(x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()


def fresh(settings: dict[str, Any], resolution: int, channels: int) -> Autoencoder:
    """An untrained AutoencoderKL of a config's `network` section. ValueError where its parts do not fit."""
    from diffusers import AutoencoderKL

    widths, groups = settings["block_out_channels"], settings["norm_num_groups"]
    if uneven := [width for width in widths if width % groups]:
        raise ValueError(f"block_out_channels: {uneven[0]} channels do not divide into norm_num_groups: {groups}")
    if resolution % 2 ** (len(widths) - 1):
        raise ValueError(f"block_out_channels: {len(widths)} levels do not halve {resolution} pixels evenly")
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        sample_size=resolution,
        scaling_factor=1.0,  # data.name: latents takes the spread of its own set
        **{key: settings[key] for key in ("block_out_channels", "layers_per_block", "latent_channels")},
        norm_num_groups=groups,
        mid_block_add_attention=settings["mid_block_add_attention"],
    )
    return Autoencoder(vae, resolution)
