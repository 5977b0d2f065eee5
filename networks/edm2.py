"""EDM2's UNet (2312.02696): every layer keeps the magnitude of what it is given, and its weights have length one.

Called as `network(x, c_noise, class_labels=None, augment_labels=None, dropout_keys=None) -> F`, shapes as in unet.py;
`logvar(c_noise)` is u(sigma), the learned log variance of the loss (eq. 21). Wrap it in a `Preconditioner`. Written
from the paper; names of parameters are those of published checkpoints, without their "unet.".
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Resample, attend, dropout, product
from .unet import dropout_keys_of

EPS = 1e-4  # added to a length before dividing by it


def unit(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x divided by its root mean square over `dims`, plus EPS; statistics in float32 or wider, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=tuple(dims), keepdim=True, dtype=wide)
    return x / (length / math.sqrt(math.prod(x.shape[d] for d in dims)) + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU with the magnitude of a normal x kept (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the magnitude of independent a and b (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a (B, N, ...) and b (B, M, ...) concatenated, their shares in the whole 1 - t and t (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt(n + m) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], dim=1)


class MPFourier(nn.Module):
    """Noise labels (B,) -> (B, channels), labels (B, K) -> (B, K channels): cosines of fixed random waves (eq. 75)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.fastest = 2 * math.pi * 3  # radians for each unit of c_noise, at three standard deviations
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Tensor) -> Tensor:
        wide = torch.promote_types(c_noise.dtype, torch.float32)
        angles = c_noise.to(wide)[..., None] * self.freqs.to(wide) + self.phases.to(wide)
        return (math.sqrt(2) * angles.cos()).flatten(1).to(c_noise.dtype)


class MPConv(nn.Module):
    """A convolution (kernel 1 or 3) or, kernel 0, a linear layer, without bias; output rows of unit length (eq. 47)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))

    def unit_weight(self) -> Tensor:
        """The weight with every output's row at root mean square 1, float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return unit(self.weight.to(wide), range(1, self.weight.ndim))

    @torch.no_grad()
    def force(self) -> None:
        """Forced weight normalisation: the parameter itself becomes what the forward pass uses (eq. 66)."""
        self.weight.copy_(self.unit_weight())

    def scaled(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        """gain times the weight that keeps magnitudes."""
        return (self.unit_weight() * (gain / math.sqrt(self.weight[0].numel()))).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.scaled(gain, x.dtype)
        if weight.ndim == 2:
            return product(F.linear, x, weight)
        return product(F.conv2d, x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """Residual block (fig. 21), with self-attention where there are heads. x (B, in_channels, H, W), emb (B, E).

    An encoder's block normalises every pixel first; a decoder's has its skip connection beside the residual branch.
    """

    layer = 0  # its place in the network, which tells its dropout masks from others
    checkpointing = False  # True: the backward pass computes the block again, masks and all, instead of keeping it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        num_heads: int = 0,
        resample: str | None = None,  # "down", "up" or None
        resample_filter: Sequence[float] = (1, 1),
        dropout: float = 0.0,
        drops: bool = True,  # whether dropout is for this block
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        if num_heads and out_channels % num_heads:
            raise ValueError(f"{out_channels} channels do not split into {num_heads} heads; change channels_per_head")
        self.encoder, self.num_heads, self.out_channels = encoder, num_heads, out_channels
        self.dropout, self.drops = dropout, drops
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.resample: nn.Module | None = None
        if resample:
            self.resample = Resample(resample, resample_filter)
            self.resample.register_buffer("resample_filter", self.resample.resample_filter, persistent=False)
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if num_heads else None

    def forward(self, x: Tensor, emb: Tensor, keys: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, keys, use_reentrant=False)
        return self.compute(x, emb, keys)

    def compute(self, x: Tensor, emb: Tensor, keys: Tensor | None) -> Tensor:
        """The block itself; `forward` may compute it again in the backward pass. keys: see layers.dropout."""
        if self.resample is not None:
            x = self.resample(x)
        if self.encoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), [1])
        y = self.conv_res0(mp_silu(x))
        with torch.autocast(x.device.type, enabled=False):  # float32: it tells noise levels apart
            scale = (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None].to(y.dtype)
        y = mp_silu(y * scale)
        if keys is not None and self.drops:
            y = dropout(y, self.dropout, keys, self.layer)
        y = self.conv_res1(y)
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x.to(y.dtype), y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attention(x).to(x.dtype), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention over all positions by queries, keys and values of unit length."""
        b, c, height, width = x.shape
        heads = self.num_heads
        # Published weights order qkv's outputs (heads, channels, 3). Reordering the weight is cheaper than the output.
        weight = self.attn_qkv.scaled(1.0, x.dtype)
        weight = weight.view(heads, c // heads, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c, 1, 1)
        qkv = product(F.conv2d, x, weight).flatten(2).view(b, 3, heads, c // heads, height * width)
        return self.attn_proj(attend(*unit(qkv, [3]).unbind(1)).reshape(b, c, height, width))


class EDM2UNet(nn.Module):
    """The magnitude-preserving UNet; its output is zero until `out_gain` has been trained.

    In training mode every pass that takes a gradient first normalises the weights that it uses, in place (forced weight
    normalisation), unless `forcing` is False: then whoever trains calls `force_weights` once a step. Passes without
    gradient, as a consistency target's, never force.
    """

    forcing = True

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # number of classes; 0: unconditional
        augment_dim: int = 0,  # must be 0: EDM2 has no augmentation labels
        model_channels: int = 192,  # channels at the first level, before channel_mult
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # channels of each level, as multiples
        channel_mult_noise: int | None = None,  # width of the noise embedding; None: the first level's
        channel_mult_emb: int | None = None,  # width of the embedding; None: the widest level's
        num_blocks: int = 3,  # residual blocks per level (the decoder has one more)
        attn_resolutions: Sequence[int] = (16, 8),  # resolutions with self-attention
        channels_per_head: int = 64,  # width of an attention head; narrower levels have no attention
        dropout: float = 0.0,
        dropout_max_resolution: int | None = None,  # the largest resolution with dropout; None: all
        label_balance: float = 0.5,  # share of the class in the embedding
        concat_balance: float = 0.5,  # share of the skip connection in what a decoder's block is given
        res_balance: float = 0.3,  # share of the residual branch
        attn_balance: float = 0.3,  # share of the attention
        resample_filter: Sequence[float] = (1, 1),
        clip_act: float | None = 256.0,  # activations are kept within +- this; None: not
        logvar_channels: int = 128,  # waves that u(sigma) is a sum of
        told: int = 1,  # how many noise labels or times
        heads: int = 1,  # outputs of the images' channels
    ) -> None:
        super().__init__()
        if augment_dim:
            raise ValueError("edm2_unet takes no augmentation labels; set data.augment: 0")
        factor = 2 ** (len(channel_mult) - 1)
        if img_resolution % factor:
            raise ValueError(
                f"resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times (channel_mult has "
                f"{len(channel_mult)} levels); take fewer levels or a resolution divisible by {factor}"
            )
        self.img_resolution, self.img_channels = img_resolution, in_channels
        self.label_dim, self.augment_dim, self.dropout = label_dim, 0, dropout
        self.label_balance, self.concat_balance = label_balance, concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb else max(widths)

        def block(res: int, cin: int, cout: int, encoder: bool, attention: bool, resample: str | None = None) -> Block:
            return Block(
                cin,
                cout,
                emb_channels,
                encoder=encoder,
                num_heads=cout // channels_per_head if attention else 0,
                resample=resample,
                resample_filter=resample_filter,
                dropout=dropout,
                drops=dropout_max_resolution is None or res <= dropout_max_resolution,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
            )

        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(told * noise_channels, emb_channels, 0)
        self.emb_label = MPConv(label_dim, emb_channels, 0) if label_dim else None
        channels = self._add_levels(block, in_channels, widths, num_blocks, attn_resolutions)
        self.out_conv = MPConv(channels, heads * out_channels, 3)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, 0)
        for place, unet_block in enumerate(m for m in self.modules() if isinstance(m, Block)):
            unet_block.layer = place

    def _add_levels(
        self,
        block: Callable[..., Block],  # block(resolution, cin, cout, encoder, attention, resample=None)
        in_channels: int,
        widths: Sequence[int],  # channels of each level
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> int:
        """The encoder and the decoder; the channels of its last block."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips: list[int] = []
        for level, width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"], channels = MPConv(in_channels + 1, width, 3), width
            else:
                self.enc[f"{res}x{res}_down"] = block(res, channels, channels, True, False, "down")
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(res, channels, width, True, res in attn_resolutions)
                channels = width
                skips.append(channels)
        for level, width in reversed([*enumerate(widths)]):
            res = self.img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(res, channels, channels, False, True)
                self.dec[f"{res}x{res}_in1"] = block(res, channels, channels, False, False)
            else:
                self.dec[f"{res}x{res}_up"] = block(res, channels, channels, False, False, "up")
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(res, channels + skips.pop(), width, False, attention)
                channels = width
        return channels

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        if self._forces():
            self.force_weights(logvar=False)
        keys = dropout_keys_of(self, x, dropout_keys)
        with torch.autocast(x.device.type, enabled=False):
            emb = self.embed(c_noise, class_labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # a channel of ones, for the bias that no layer has
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, MPConv) else block(x, emb, keys)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = block(x, emb, keys)
        return self.out_conv(x, self.out_gain)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, emb_channels) from the noise level and the class."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(1, self.label_dim)
            label = self.emb_label(class_labels * math.sqrt(self.label_dim))
            emb = mp_sum(emb, label.expand_as(emb), self.label_balance)
        return mp_silu(emb)

    def logvar(self, c_noise: Tensor) -> Tensor:
        """u(sigma) of noise labels (B,), (B,)."""
        if self._forces():
            self.logvar_linear.force()
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.logvar_linear(self.logvar_fourier(c_noise)).flatten()

    def force_weights(self, logvar: bool = True) -> None:
        """Bring every weight to unit length, in place; logvar: that of u(sigma) too."""
        for module in self.modules():
            if isinstance(module, MPConv) and (logvar or module is not self.logvar_linear):
                module.force()

    def _forces(self) -> bool:
        return self.training and self.forcing and torch.is_grad_enabled()
