"""Samples as pictures: grids, enlarged so that 8-pixel digits can be seen, and PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from checkpoint import write_atomically


def grid(images: torch.Tensor, columns: int | None = None, tile: int = 48) -> torch.Tensor:
    """uint8 images (N, C, H, W) side by side, uint8 (3, H', W'); small ones enlarged to about `tile` pixels.

    columns=None makes the grid about square. Pixels are repeated, not smoothed.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, round(tile / images.shape[-1]))
    images = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write a uint8 image (1 or 3, H, W) to `path`, whole or not at all."""
    pixels = image.permute(1, 2, 0).squeeze(2).cpu().numpy()  # PIL takes grey without a channel
    write_atomically(path, lambda file: Image.fromarray(pixels).save(file, format="png"))
