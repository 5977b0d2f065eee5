"""The autoencoder behind latents, given to a codec, and the images that decoded samples are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from tqdm import tqdm

import data
from checkpoints import CheckpointError, autoencoder
from config import Config, ConfigError
from sources.codecs import LatentCodec
from sources.images import ImageSet
from sources.latents import LatentSet


class Missing(ConfigError):
    """The autoencoder of latents is not to be had; one line."""


def attach(codecs: Iterable[LatentCodec], source: str | None, device: torch.device) -> None:
    """Load the autoencoder once, and give it to all these codecs of one run's latents.

    source: data.autoencoder; None: the one that made the latents, where that is known. Raises Missing where none is
    named, or it cannot be read, ConfigError where it is not the one of these latents.
    """
    codecs = list(codecs)
    named = source or codecs[0].autoencoder["source"]
    if named is None:
        raise Missing("data.autoencoder: the latents do not say what made them; set it, as stabilityai/sd-vae-ft-mse")
    if os.path.isabs(named) and not os.path.exists(named):
        raise Missing(f"data.autoencoder: {named} is not there; set it to where the autoencoder of the latents lies")
    try:
        found = autoencoder.load(named, device)
    except CheckpointError as error:
        raise Missing(f"data.autoencoder: {error}") from None
    for codec in codecs:
        codec.attach(found, "data.autoencoder")


class DecodedFiles:
    """Latents as images that are decoded when they are read: what sources.files.Files is for images in files."""

    def __init__(self, latents: LatentSet, codec: LatentCodec):
        self.latents, self.codec = latents, codec
        self.names = range(len(latents))
        self.channels, self.resolution, _ = codec.image_shape

    @torch.no_grad()
    def read(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images uint8 (B, C, R, R) on the CPU, of the latents' means; their indices int64 (B,); no errors."""
        codec, c = self.codec, self.latents.shape[0]
        z = self.latents.rows.read(indices)[0][:, :c].to(codec.scale.device).float()
        images = codec.from_model(z * codec.scale + codec.bias)
        return images.cpu(), torch.tensor(indices), []


def images_of(latents: LatentSet, codec: LatentCodec, cfg: Config) -> ImageSet:
    """The images that latents are of, where they still lie where encode.py read them; else the latents, decoded."""
    if section := latents.images:
        here = {"dir": cfg.data.dir, "memory_gb": cfg.data.memory_gb, "autoencoder": None, "scaling": None}
        known = {name: value for name, value in section.items() if name in type(cfg.data).model_fields}
        try:
            images = data.load(cfg.data.model_copy(update={**known, **here}))
            if images.facts()["fingerprint"] == section["fingerprint"]:
                images.conditional = latents.conditional
                return images
        except ConfigError:
            pass  # moved or removed
    how = {"path": latents.path, "resize": f"decoded by {codec.autoencoder['source']}"}
    files = DecodedFiles(latents, codec)
    images = ImageSet(latents.name, latents.num_classes, latents.labels, files=files, classes=latents.classes, **how)
    channels, side, _ = images.shape
    if len(images) * channels * side**2 > cfg.data.memory_gb * 2**30:
        return images
    rows = tqdm(torch.arange(len(images)).split(64), desc="decoding latents", unit="batch", disable=None, delay=2)
    images.images = torch.cat([files.read(part.tolist())[0] for part in rows])
    images.files = None
    return images
