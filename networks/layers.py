"""The pieces the UNets are built of: resampling convolutions, group norm, attention, the residual block, embeddings.

Parameter and buffer names are those of published EDM checkpoints. Nothing here copies a tensor only to change its
layout: the network works in the layout of its weights and input, NCHW or channels_last.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Init = Callable[..., None]  # init(layer, scale=1.0) fills layer.weight and layer.bias in place

_PLAIN = False
QUERIES = 1024  # of plain attention at a time


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """For torch.func.jvp: within this context attention is written out in elementary operations, and group norm and
    products have derivatives of their own.

    The fused attention kernels have no forward mode, the compiler cannot trace that of group norm, and see `product`.
    """
    global _PLAIN
    before = _PLAIN
    _PLAIN = True
    try:
        yield
    finally:
        _PLAIN = before


# ----------------------------------------------------------------------------
# Initialisation


def xavier(layer: nn.Module, scale: float = 1.0) -> None:
    """DDPM++/NCSN++: uniform, variance 2 / (fan_in + fan_out), times scale; bias 0 (2011.13456, EDM's settings)."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def kaiming(layer: nn.Module, scale: float = 1.0) -> None:
    """ADM: weight and bias uniform in +-scale / sqrt(fan_in), which is PyTorch's own default (2105.05233)."""
    fan_in = layer.weight[0].numel()
    for p in (layer.weight, layer.bias):
        if p is not None:
            nn.init.uniform_(p, -scale / math.sqrt(fan_in), scale / math.sqrt(fan_in))


def initialised(layer: nn.Module, init: Init, scale: float = 1.0) -> nn.Module:
    """Fill the layer's parameters and return it."""
    init(layer, scale)
    return layer


# ----------------------------------------------------------------------------
# Layers


def product(
    operation: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, **how: object
) -> Tensor:
    """operation(x, weight, bias, **how), linear in x, by a constant weight; in forward mode two products, not three.

    torch's own rule multiplies x by the weight's tangent too, a tensor of zeros.
    """
    if not _PLAIN:
        return operation(x, weight, bias, **how)
    x, dx = forward_ad.unpack_dual(x)
    y = operation(x, weight, bias, **how)
    return y if dx is None else forward_ad.make_dual(y, operation(dx, weight, None, **how))


class Conv2d(nn.Conv2d):
    """torch's, with the forward mode of `product`; padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return product(F.conv2d, x, self.weight, self.bias, **how)


class Linear(nn.Linear):
    """torch's, with the forward mode of `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(F.linear, x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the dtype of its input (statistics in float32); groups None: min(32, channels // 4)."""

    def __init__(self, channels: int, eps: float, groups: int | None = None) -> None:
        groups = min(32, channels // 4) if groups is None else groups
        if groups == 0 or channels % groups:
            raise ValueError(
                f"group norm: {channels} channels do not split into {groups} groups; "
                "take model_channels and channel_mult so that every level has a multiple of 32 channels, "
                "or a multiple of 4 up to 128"
            )
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would run this in float32 and write twice the bytes; the kernels sum in float32 anyway.
        with torch.autocast(x.device.type, enabled=False):
            x, dx = forward_ad.unpack_dual(x) if _PLAIN else (x, None)
            y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            return y if dx is None else forward_ad.make_dual(y, self.tangent(x, dx))

    def tangent(self, x: Tensor, dx: Tensor) -> Tensor:
        """The derivative along dx, both (B, C, ...), by elementary operations in float32; in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        v, dv = (v.to(wide).unflatten(1, (self.num_groups, -1)) for v in (x, dx))
        over = {"dim": tuple(range(2, v.ndim)), "keepdim": True}
        v, dv = v - v.mean(**over), dv - dv.mean(**over)
        scale = (v.square().mean(**over) + self.eps).rsqrt()
        v = v * scale
        dv = torch.addcmul(dv, v, (v * dv).mean(**over), value=-1) * scale
        return (dv.flatten(1, 2) * self.weight.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)


class Resample(nn.Module):
    """Halve ("down") or double ("up") the resolution with a separable FIR filter, without learned weights.

    x: (B, C, H, W). The filter is a list of even length, [1, 1] (box) or [1, 3, 3, 1].
    """

    def __init__(self, direction: str, resample_filter: Sequence[float]) -> None:
        super().__init__()
        if len(resample_filter) % 2:
            raise ValueError(f"resample_filter {list(resample_filter)}: its length must be even, e.g. [1, 1]")
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None])
        self.direction = direction
        self.box = list(resample_filter) == [1, 1]
        self.padding = len(resample_filter) // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2.0)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        if self.direction == "down":
            return product(F.conv2d, x, kernel, stride=2, padding=self.padding, groups=x.shape[1])
        return product(F.conv_transpose2d, x, 4 * kernel, stride=2, padding=self.padding, groups=x.shape[1])


class ResampleConv(Resample):
    """Filter down or up, then convolve; with `filter_last`, convolve, then filter down.

    Where the two are one convolution of stride 2 exactly, zero padding included, they run as one: no large tensor
    between them, and for the box filter less than half the multiplications on the way up.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        direction: str,
        resample_filter: Sequence[float],
        filter_last: bool = False,
    ) -> None:
        super().__init__(direction, resample_filter)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.same = kernel_size // 2  # padding that keeps the resolution
        self.one_pass = kernel_size == 1 or filter_last or (direction == "up" and self.box)
        # Row by row, what a single 1 in the kernel becomes when convolved with the filter.
        ones = torch.eye(kernel_size**2).view(-1, 1, kernel_size, kernel_size)
        spread = F.conv_transpose2d(ones, self.resample_filter).flatten(1)
        self.register_buffer("spread", 4 * spread.flip(0) if direction == "up" else spread, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.one_pass:
            return product(F.conv2d, super().forward(x), self.weight, self.bias, padding=self.same)
        size = math.isqrt(self.spread.shape[1])
        kernel = (self.weight.flatten(2) @ self.spread).unflatten(2, (size, size))
        padding = self.same + self.padding
        if self.direction == "down":
            return product(F.conv2d, x, kernel, self.bias, stride=2, padding=padding)
        return product(F.conv_transpose2d, x, kernel.transpose(0, 1), self.bias, stride=2, padding=padding)


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 that looks random (Wellons' lowbias32); products wrap, the same on every device."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


def dropout(x: Tensor, p: float, keys: Tensor, layer: int) -> Tensor:
    """x (B, ...) with each element 0 with probability p (to within 2^-17), the others scaled by 1 / (1 - p).

    The mask is a function of the sample's key, int64 (B,), the layer and the element's place alone, by integers: the
    same bits eager, compiled and in forward mode, on every device, however a batch is split.
    """
    size = x[0].numel()
    rows = mix(keys.to(torch.int32) + layer * 0x3C6EF372)
    places = torch.arange(-(-size // 2), dtype=torch.int32, device=x.device) * (0x9E3779B1 - 2**32)
    bits = mix(places + rows[:, None])  # each makes two elements of the mask
    both = torch.cat([bits & 0xFFFF, (bits >> 16) & 0xFFFF], dim=1)
    keep = both[:, :size].view(x.shape) >= round(p * 2**16)
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def unit_rms(x: Tensor, eps: float = 1e-4) -> Tensor:
    """x (B, C, ...) divided by its root mean square over channels (pixel norm, 1710.10196 sec. 4.2)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (wide.square().mean(1, keepdim=True) + eps).rsqrt().to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(c)) over the keys, times v; all (B, heads, c, length)."""
    # On CPUs the fused kernel is the slower one until the weights' length^2 elements no longer fit the caches.
    if _PLAIN or (q.device.type == "cpu" and q.shape[-1] <= 256):
        # A block of queries at a time: at 64 x 64 pixels the whole matrix would be 64 MiB a head and sample.
        blocks = [
            v @ ((block.transpose(-1, -2) * q.shape[-2] ** -0.5) @ k).softmax(dim=-1).to(v.dtype).transpose(-1, -2)
            for block in q.split(QUERIES, dim=-1)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


class UNetBlock(nn.Module):
    """Residual block of DDPM++, NCSN++ and ADM, with self-attention where num_heads > 0.

    x: (B, in_channels, H, W); emb: (B, emb_channels). Returns (B, out_channels, H', W'), H' as `resample` says
    ("up", "down" or None). scale_shift_norm: the embedding scales and shifts the second norm's output
    (ADM's AdaGN) instead of being added before it. skip_scale multiplies every residual sum.
    pixel_norm: scale and shift are normalised over channels (sCM, 2410.11081 sec. 4.1).
    """

    layer = 0  # its place in the network, which tells its dropout masks from others
    checkpointing = False  # True: the backward pass computes the block again, masks and all, instead of keeping it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        init: Init,
        zero_scale: float,
        attention_scale: float,
        eps: float,
        norm_groups: int | None = None,
        num_heads: int = 0,
        resample: str | None = None,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        scale_shift_norm: bool = False,
        pixel_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.scale_shift_norm = scale_shift_norm
        self.pixel_norm = pixel_norm

        def conv(cin: int, cout: int, kernel: int, scale: float = 1.0) -> nn.Module:
            return initialised(Conv2d(cin, cout, kernel, padding=kernel // 2), init, scale)

        def resample_conv(cin: int, cout: int, kernel: int) -> nn.Module:
            return initialised(ResampleConv(cin, cout, kernel, resample, resample_filter), init)

        self.norm0 = GroupNorm(in_channels, eps, norm_groups)
        self.conv0 = (resample_conv if resample else conv)(in_channels, out_channels, 3)
        emb_outputs = out_channels * (2 if scale_shift_norm else 1)
        self.affine = initialised(Linear(emb_channels, emb_outputs), init)
        self.norm1 = GroupNorm(out_channels, eps, norm_groups)
        self.conv1 = conv(out_channels, out_channels, 3, zero_scale)

        self.skip: nn.Module | None = None
        if resample and (resample_proj or in_channels != out_channels):
            self.skip = resample_conv(in_channels, out_channels, 1)
        elif resample:
            self.skip = Resample(resample, resample_filter)
        elif in_channels != out_channels:
            self.skip = conv(in_channels, out_channels, 1)

        if num_heads:
            self.norm2 = GroupNorm(out_channels, eps, norm_groups)
            self.qkv = conv(out_channels, 3 * out_channels, 1, attention_scale)
            self.proj = conv(out_channels, out_channels, 1, zero_scale)

    def forward(self, x: Tensor, emb: Tensor, keys: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():  # else nothing is kept anyway, as in JVPs
            return checkpoint(self.compute, x, emb, keys, use_reentrant=False)
        return self.compute(x, emb, keys)

    def compute(self, x: Tensor, emb: Tensor, keys: Tensor | None) -> Tensor:
        """The block itself; `forward` may compute it again in the backward pass. keys: see `dropout`; None: none."""
        h = self.conv0(F.silu(self.norm0(x)))
        with torch.autocast(x.device.type, enabled=False):  # float32, as in EDM: it tells noise levels apart
            params = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.scale_shift_norm:
            scale, shift = params.chunk(2, dim=1)
            if self.pixel_norm:
                scale, shift = unit_rms(scale), unit_rms(shift)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h.add_(params)))
        h = self.conv1(h if keys is None else dropout(h, self.dropout, keys, self.layer))
        x = (h + (x if self.skip is None else self.skip(x))).mul_(self.skip_scale)
        if self.num_heads:
            x = (self.attention(self.norm2(x)) + x).mul_(self.skip_scale)
        return x

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention over all positions; every step is a view in x's own layout, NCHW or channels_last."""
        b, c, height, width = x.shape
        heads = self.num_heads
        # Published weights order qkv's outputs (heads, channels, 3). Reordering the weight is cheaper than the output.
        weight = self.qkv.weight.view(heads, c // heads, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c, 1, 1)
        bias = self.qkv.bias.view(heads, c // heads, 3).permute(2, 0, 1).reshape(3 * c)
        qkv = product(F.conv2d, x, weight, bias)
        q, k, v = qkv.flatten(2).view(b, 3, heads, c // heads, height * width).unbind(1)
        return self.proj(attend(q, k, v).reshape(b, c, height, width))


# ----------------------------------------------------------------------------
# Embeddings of c_noise


class PositionalEmbedding(nn.Module):
    """(B,) -> (B, channels): cos, then sin, at frequencies spaced geometrically from 1 to 1/10000.

    endpoint: 1/10000 is the last of them (DDPM++), not the one after the last (ADM).
    """

    fastest = 1.0  # radians for each unit of c_noise

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.endpoint = endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - int(self.endpoint))
        angles = c_noise[:, None] * (1e-4**steps).to(c_noise.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """(B,) -> (B, channels): cos, then sin, at fixed random frequencies: normal with std `scale` (16; iCT: 0.02)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)
        self.fastest = 2 * math.pi * 3 * scale  # radians for each unit of c_noise, at three standard deviations

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None] * (2 * math.pi * self.freqs).to(c_noise.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
