"""A residual MLP for vectors, actions and short signals, conditioned on a vector such as a robot's state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .layers import FourierEmbedding, Linear
from .unet import single


class Block(nn.Module):
    """x + W2 silu(s W1 silu(norm(x)) + b), where the embedding gives scale and shift s - 1, b; W2 starts at almost 0.

    x: (B, width), emb: (B, width) -> (B, width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lin0 = Linear(width, width)
        self.affine = Linear(width, 2 * width)
        self.lin1 = Linear(width, width)
        with torch.no_grad():
            self.lin1.weight *= 1e-2
            self.lin1.bias.zero_()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.affine(emb).chunk(2, dim=1)
        return x + self.lin1(silu(torch.addcmul(shift, self.lin0(silu(self.norm(x))), scale + 1)))


class MLP(nn.Module):
    """Residual MLP over all elements of a sample, whatever its shape: F(x, c_noise, condition) of x's shape.

    Args:
        shape: of one sample: (D,) for vectors, (C, T) for signals.
        condition_dim: K, the elements of the condition vector; 0: none.
        width: of the residual stream.
        depth: residual blocks, of two layers each.
        told: numbers a sample in c_noise, each embedded, the embeddings side by side.
        heads: outputs; F has `heads` times shape[0].

    It has a forward-mode derivative (torch.func.jvp), which sCM asks for.
    """

    img_resolution = img_channels = None  # it makes no images
    label_dim = augment_dim = 0

    def __init__(
        self, shape: Sequence[int], condition_dim: int = 0, width: int = 256, depth: int = 4, told: int = 1,
        heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.condition_dim, self.told = tuple(shape), condition_dim, told
        size = math.prod(self.shape)
        self.map_noise = FourierEmbedding(width, scale=0.3)  # smooth in c_noise: larger scales made worse samples
        self.map_layer0 = Linear(told * width, width)
        self.map_layer1 = Linear(width, width)
        self.first = Linear(size + condition_dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = Linear(width, heads * size)
        with torch.no_grad():  # D starts at c_skip x
            self.last.weight *= 1e-2
            self.last.bias.zero_()

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """x: (B, *shape); c_noise: (B,) or (B, told); condition: (B, condition_dim), normalised. Returns (B, *shape),
        or, for several heads, (B, heads * shape[0], ...).

        Labels are for images and must be None. ValueError for a condition that is missing or of another shape.
        """
        found = None if condition is None else tuple(condition.shape)
        wanted = (len(x), self.condition_dim) if self.condition_dim else None
        if found != wanted:
            raise ValueError(f"condition has shape {found}; this network needs {wanted}")
        emb = self.map_noise(single(c_noise, self.told)).view(len(x), -1)
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))
        h = x.flatten(1) if condition is None else torch.cat([x.flatten(1), condition], dim=1)
        h = self.first(h)
        for block in self.blocks:
            h = block(h, emb)
        return self.last(silu(self.norm(h))).view(len(x), -1, *self.shape[1:])
