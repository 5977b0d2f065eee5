"""A small image classifier whose penultimate features score samples of digits and the like (see metrics.py)."""

from __future__ import annotations

import torch
from torch import nn

FEATURES = 64  # the width of the penultimate layer: a Frechet distance on it needs only a few hundred samples
MAX_SIZE = 32  # larger images are shrunk to this by area, so that the cost does not grow with the resolution


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Classifier(nn.Module):
    """uint8 images (B, channels, resolution, resolution) -> features (B, 64) and logits (B, classes), float32.

    Convolutions down to 4x4, a linear layer to 64 features (normalised, ReLU; the penultimate layer), then classes.
    """

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        size = min(resolution, MAX_SIZE)
        width = 32
        stride = 2 if size > 16 else 1  # at 32x32 the first layer would cost more than all others
        layers = [conv(channels, width, stride)]
        size = -(-size // stride)
        while size > 4:
            outputs = min(2 * width, 128)
            layers += [conv(width, outputs, stride=2)]
            width, size = outputs, -(-size // 2)
            layers += [conv(width, width)] if width == 64 else []
        self.resolution = resolution
        last = nn.Linear(width * size * size, FEATURES, bias=False)
        norm = nn.BatchNorm1d(FEATURES, affine=False)  # fixes the features' scale, hence the distance's
        self.body = nn.Sequential(*layers, nn.Flatten(), last, norm, nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float() / 127.5 - 1
        if self.resolution > MAX_SIZE:
            x = nn.functional.interpolate(x, size=(MAX_SIZE, MAX_SIZE), mode="area")
        features = self.body(x)
        return features, self.head(features)
