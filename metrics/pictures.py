"""Samples as pictures: grids, enlarged so that 8-pixel digits can be seen, a plot, and PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from checkpoints.state import write_atomically


def grid(images: torch.Tensor, columns: int | None = None, tile: int = 48) -> torch.Tensor:
    """uint8 images (N, C, H, W) side by side, uint8 (3, H', W'); small ones enlarged to about `tile` pixels.

    columns=None makes the grid about square. Pixels are repeated, not smoothed.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, round(tile / images.shape[-1]))
    images = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def beside(samples: torch.Tensor, nearest: torch.Tensor, marked: torch.Tensor, tile: int = 48) -> torch.Tensor:
    """Each sample, a gap, then its nearest training images; in columns; uint8 (3, H', W').

    samples: uint8 (N, C, H, W); nearest: uint8 (N, k, C, H, W); marked: bool (N,), framed in red.
    """
    factor = max(1, round(tile / samples.shape[-1]))

    def framed(images: torch.Tensor) -> torch.Tensor:
        big = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)
        return torch.nn.functional.pad(big, (3, 3, 3, 3), value=255)

    own = framed(samples)
    edge = torch.ones(own.shape[2:], dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    red = torch.tensor([220, 30, 30], dtype=torch.uint8)[:, None, None]
    own = torch.where(marked.cpu()[:, None, None, None] & edge, red, own)
    gap = own.new_full((len(own), 3, own.shape[2], 10), 255)
    strips = torch.cat([own, gap, *(framed(images) for images in nearest.unbind(1)), gap, gap], 3)
    columns = max(1, round(math.sqrt(len(strips) * strips.shape[2] / strips.shape[3])))
    return make_grid(strips, nrow=columns, padding=10, pad_value=255)


def plot(x: Sequence[int], y: Sequence[float], x_label: str, y_label: str) -> torch.Tensor:
    """A line through points set side by side, each with its value, over an axis from 0; uint8 (3, 480, 720)."""
    image = Image.new("RGB", (720, 480), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    left, right, top, bottom = 90, 690, 60, 410
    unit = _round_number(max(*y, 1e-9) / 5)
    highest = unit * math.ceil(max(*y, unit) * 1.05 / unit)
    lowest = unit * math.floor(min(*y, 0.0) / unit)

    def height(value: float) -> float:
        return bottom - (value - lowest) / (highest - lowest) * (bottom - top)

    for i in range(round((highest - lowest) / unit) + 1):
        value = lowest + i * unit
        draw.line([(left, height(value)), (right, height(value))], fill="#dddddd")
        draw.text((left - 10, height(value)), f"{value:.4g}", "black", font, anchor="rm")
    points = [(left + (i + 0.5) * (right - left) / len(x), height(value)) for i, value in enumerate(y)]
    draw.line(points, fill="#1f77b4", width=3)
    for (across, down), name, value in zip(points, x, y, strict=True):
        draw.ellipse([across - 5, down - 5, across + 5, down + 5], fill="#1f77b4")
        draw.text((across, down - 10), f"{value:.3g}", "black", font, anchor="mb", stroke_width=3, stroke_fill="white")
        draw.text((across, bottom + 10), str(name), "black", font, anchor="mt")
    draw.text(((left + right) / 2, 450), x_label, "black", font, anchor="mm")
    draw.text((left, 30), y_label, "black", font, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _round_number(value: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `value`: a step between an axis's lines."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= value * 0.999)


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write a uint8 image (1 or 3, H, W) to `path`, whole or not at all."""
    write_atomically(path, lambda file: to_pil(image).save(file, format="png"))


def to_pil(image: torch.Tensor) -> Image.Image:
    """PIL's grey or RGB image of a uint8 (1 or 3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).cpu().numpy())  # PIL takes grey without a channel
