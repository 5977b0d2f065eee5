"""Samples as pictures: grids, enlarged so that 8-pixel digits can be seen, a plot, and PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from checkpoints.disk import write_atomically


def grid(images: torch.Tensor, columns: int | None = None, tile: int = 48) -> torch.Tensor:
    """uint8 images (N, C, H, W) side by side, uint8 (3, H', W'); small ones enlarged to about `tile` pixels.

    columns=None makes the grid about square. Pixels are repeated, not smoothed.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(_enlarged(images, tile), nrow=columns, padding=2, pad_value=255)


def _enlarged(images: torch.Tensor, tile: int) -> torch.Tensor:
    factor = max(1, round(tile / images.shape[-1]))
    return images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def beside(samples: torch.Tensor, nearest: torch.Tensor, marked: torch.Tensor, tile: int = 48) -> torch.Tensor:
    """Each sample, a gap, then its nearest training images; in columns; uint8 (3, H', W').

    samples: uint8 (N, C, H, W); nearest: uint8 (N, k, C, H, W); marked: bool (N,), framed in red.
    """

    def framed(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(_enlarged(images, tile).expand(-1, 3, -1, -1), (3, 3, 3, 3), value=255)

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: most runs draw no plot
    from matplotlib.figure import Figure  # no pyplot: it would keep the figure and may ask for a display
    from matplotlib.patheffects import withStroke

    finite = [0.0, *filter(math.isfinite, y)]
    low, high = min(finite), max(finite)
    room = 0.12 * (high - low) or 1.0
    figure = Figure((7.2, 4.8), dpi=100)
    axes = figure.add_axes((0.125, 0.15, 0.835, 0.73), xlabel=x_label, title=y_label)
    axes.set(xlim=(-0.5, len(x) - 0.5), ylim=(low - room if low < 0 else 0, high + room))
    axes.set_xticks(range(len(x)), x)
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot(range(len(x)), y, "o-", linewidth=2, markersize=8, clip_on=False, zorder=3)  # dots on the axis are whole
    halo = [withStroke(linewidth=3, foreground="white")]
    for i, value in enumerate(y):
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "zorder": 4}
        axes.annotate(f"{value:.3g}", (i, value), **place, path_effects=halo)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write a uint8 image (1 or 3, H, W) to `path`, whole or not at all."""
    write_atomically(path, lambda file: to_pil(image).save(file, format="png"))


def to_pil(image: torch.Tensor) -> Image.Image:
    """PIL's grey or RGB image of a uint8 (1 or 3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).cpu().numpy())  # PIL takes grey without a channel
