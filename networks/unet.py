"""The UNets of EDM (2206.00364): SongUNet (DDPM++ and NCSN++, 2011.13456) and DhariwalUNet (ADM, 2105.05233).

Both are called as `network(x, c_noise, class_labels=None, augment_labels=None, dropout_keys=None) -> F`, shapes
(B, C, H, W), (B,) or (B, told), (B, label_dim), (B, augment_dim), int64 (B,) -> (B, heads * out_channels, H, W). Wrap
them in a `Preconditioner` to get a denoiser, in a `FlowMap` to get a velocity. Module names spell resolution and role,
"16x16_block0", as published ones do.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    Resample,
    ResampleConv,
    UNetBlock,
    initialised,
    kaiming,
    xavier,
)

ZERO_SCALE = 1e-5  # "zero" initialisation: small, so that gradients reach every layer at once


def dropout_keys_of(net: nn.Module, x: Tensor, keys: Tensor | None) -> Tensor | None:
    """What the masks of a pass follow from, int64 (B,): the given keys, new ones, or None where nothing is dropped."""
    if not net.training or getattr(net, "dropout", 0) == 0:
        return None
    return torch.randint(2**31, (len(x),), device=x.device) if keys is None else keys


def single(c_noise: Tensor, told: int) -> Tensor:
    """c_noise (B,) or (B, told) as (B * told,), a sample's numbers one after another. ValueError for other shapes."""
    if tuple(c_noise.shape[1:]) not in ((told,), () if told == 1 else (told,)):
        wanted = "(B,)" if told == 1 else f"(B, {told})"
        raise ValueError(f"c_noise has shape {tuple(c_noise.shape)}; this network needs {wanted}")
    return c_noise.flatten()


class UNet(nn.Module):
    """What both share: levels of residual blocks down and up again, joined by skip connections, and the way through."""

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int, augment_dim: int, dropout: float, told: int
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.augment_dim, self.dropout, self.told = label_dim, augment_dim, dropout, told

    def _add_levels(
        self,
        block: Callable[..., UNetBlock],  # block(cin, cout, attention=False, resample=None)
        first: nn.Module,  # the first convolution
        widths: Sequence[int],  # channels of each level
        num_blocks: int,
        attends: Callable[[int, int | None], bool],  # (resolution, the decoder's block or None) -> attention there
    ) -> None:
        factor = 2 ** (len(widths) - 1)
        if self.img_resolution % factor:
            raise ValueError(
                f"resolution {self.img_resolution} cannot be halved {len(widths) - 1} times (channel_mult has "
                f"{len(widths)} levels); take fewer levels or a resolution divisible by {factor}"
            )
        self.num_blocks = num_blocks
        self.resolutions = [self.img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips: list[int] = []
        for res, width in zip(self.resolutions, widths, strict=True):
            at = f"{res}x{res}"
            if res == self.img_resolution:
                self.enc[f"{at}_conv"], channels = first, first.out_channels
            else:
                self.enc[f"{at}_down"] = block(channels, channels, resample="down")
                self._extend_down(at, channels)
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{at}_block{i}"] = block(channels, width, attention=attends(res, None))
                channels = width
                skips.append(channels)
        for res, width in zip(reversed(self.resolutions), reversed(widths), strict=True):
            at = f"{res}x{res}"
            if res == self.resolutions[-1]:
                self.dec[f"{at}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{at}_in1"] = block(channels, channels)
            else:
                self.dec[f"{at}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{at}_block{i}"] = block(channels + skips.pop(), width, attention=attends(res, i))
                channels = width
            self._extend_up(at, channels)
        for place, unet_block in enumerate(m for m in self.modules() if isinstance(m, UNetBlock)):
            unet_block.layer = place

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        keys = dropout_keys_of(self, x, dropout_keys)
        with torch.autocast(x.device.type, enabled=False):  # float32, as in EDM
            emb = self.embed(c_noise, class_labels, augment_labels)
        enc, dec = self.enc, self.dec
        aux, out, skips = x, None, []
        for res in self.resolutions:
            at = f"{res}x{res}"
            if res == self.img_resolution:
                x = enc[f"{at}_conv"](x)
            else:
                x, aux = self._down(at, enc[f"{at}_down"](x, emb, keys), aux)
            skips.append(x)
            for i in range(self.num_blocks):
                x = enc[f"{at}_block{i}"](x, emb, keys)
                skips.append(x)
        for res in reversed(self.resolutions):
            at = f"{res}x{res}"
            for name in ("in0", "in1") if res == self.resolutions[-1] else ("up",):
                x = dec[f"{at}_{name}"](x, emb, keys)
            for i in range(self.num_blocks + 1):
                x = dec[f"{at}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb, keys)
            out = self._out(at, x, out)
        return out


class SongUNet(UNet):
    """DDPM++ (the defaults) and NCSN++ (fourier, residual, [1, 3, 3, 1], channel_mult_noise 2)."""

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # number of classes; 0: unconditional
        augment_dim: int = 0,  # number of augmentation labels; 0: none
        model_channels: int = 128,  # channels at the first level, before channel_mult
        channel_mult: Sequence[int] = (1, 2, 2, 2),  # channels of each level, as multiples
        channel_mult_emb: int = 4,  # width of the embedding, as a multiple
        num_blocks: int = 4,  # residual blocks per level (the decoder has one more)
        attn_resolutions: Sequence[int] = (16,),  # resolutions with self-attention
        dropout: float = 0.10,
        embedding_type: str = "positional",  # of c_noise: "positional" (DDPM++) or "fourier" (NCSN++)
        channel_mult_noise: int = 1,  # width of the noise embedding: 1 (DDPM++) or 2 (NCSN++)
        encoder_type: str = "standard",  # "standard" (DDPM++), "residual" (NCSN++) or "skip"
        decoder_type: str = "standard",  # "standard" or "skip"
        resample_filter: Sequence[float] = (1, 1),  # (1, 1) (DDPM++) or (1, 3, 3, 1) (NCSN++)
        fourier_scale: float = 16.0,  # std of the Fourier frequencies: 16 (EDM), 0.02 (iCT, 2310.14189)
        scale_shift_norm: bool = False,  # the embedding scales and shifts (AdaGN) instead of being added
        pixel_norm: bool = False,  # normalise that scale and shift over channels (sCM)
        told: int = 1,  # numbers a sample in c_noise, each embedded, the embeddings side by side
        heads: int = 1,  # outputs of out_channels each
    ) -> None:
        super().__init__(img_resolution, in_channels, label_dim, augment_dim, dropout, told)
        for name, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual", "skip")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        self.encoder_type, self.decoder_type, self.resample_filter = encoder_type, decoder_type, resample_filter
        self.aux_channels, self.out_channels = in_channels, heads * out_channels
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        def block(cin: int, cout: int, attention: bool = False, resample: str | None = None) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels=emb_channels,
                init=xavier,
                zero_scale=ZERO_SCALE,
                attention_scale=math.sqrt(0.2),
                eps=1e-6,
                num_heads=int(attention),
                resample=resample,
                resample_filter=resample_filter,
                resample_proj=True,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                scale_shift_norm=scale_shift_norm,
                pixel_norm=pixel_norm,
            )

        if embedding_type == "positional":
            self.map_noise: nn.Module = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels, fourier_scale)
        if label_dim:
            self.map_label = initialised(Linear(label_dim, told * noise_channels), xavier)
        if augment_dim:
            self.map_augment = initialised(Linear(augment_dim, told * noise_channels, bias=False), xavier)
        self.map_layer0 = initialised(Linear(told * noise_channels, emb_channels), xavier)
        self.map_layer1 = initialised(Linear(emb_channels, emb_channels), xavier)

        first = initialised(Conv2d(in_channels, model_channels, 3, padding=1), xavier)
        widths = [model_channels * mult for mult in channel_mult]
        attends = lambda res, i: res in attn_resolutions and i in (None, num_blocks)  # noqa: E731
        self._add_levels(block, first, widths, num_blocks, attends)

    def _extend_down(self, at: str, channels: int) -> None:
        if self.encoder_type == "skip":
            self.enc[f"{at}_aux_down"] = Resample("down", self.resample_filter)
            self.enc[f"{at}_aux_skip"] = initialised(Conv2d(self.aux_channels, channels, 1), xavier)
        if self.encoder_type == "residual":
            aux = ResampleConv(self.aux_channels, channels, 3, "down", self.resample_filter, filter_last=True)
            self.enc[f"{at}_aux_residual"] = initialised(aux, xavier)
            self.aux_channels = channels

    def _extend_up(self, at: str, channels: int) -> None:
        if self.decoder_type == "skip" and f"{at}_in0" not in self.dec:
            self.dec[f"{at}_aux_up"] = Resample("up", self.resample_filter)
        if self.decoder_type == "skip" or f"{at}_conv" in self.enc:
            self.dec[f"{at}_aux_norm"] = GroupNorm(channels, eps=1e-6)
            out = Conv2d(channels, self.out_channels, 3, padding=1)
            self.dec[f"{at}_aux_conv"] = initialised(out, xavier, ZERO_SCALE)

    def _down(self, at: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder_type == "skip":
            aux = self.enc[f"{at}_aux_down"](aux)
            x = x + self.enc[f"{at}_aux_skip"](aux)
        if self.encoder_type == "residual":
            x = aux = (x + self.enc[f"{at}_aux_residual"](aux)) * math.sqrt(0.5)
        return x, aux

    def _out(self, at: str, x: Tensor, out: Tensor | None) -> Tensor | None:
        if f"{at}_aux_conv" not in self.dec:
            return None
        y = self.dec[f"{at}_aux_conv"](F.silu(self.dec[f"{at}_aux_norm"](x)))
        return y if out is None else y + self.dec[f"{at}_aux_up"](out)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """(B, emb_channels) from the noise level and the labels."""
        emb = self.map_noise(single(c_noise, self.told))
        cos, sin = emb.chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # published weights expect the sines first
        emb = emb.view(c_noise.shape[0], -1)
        if self.label_dim and class_labels is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.augment_dim and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(UNet):
    """ADM: multi-head attention, adaptive group norm, plain residual sums.

    As in EDM, a level with fewer channels than channels_per_head has no attention, whatever attn_resolutions says.
    """

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # number of classes; 0: unconditional
        augment_dim: int = 0,  # number of augmentation labels; 0: none
        model_channels: int = 192,  # channels at the first level, before channel_mult
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # channels of each level, as multiples
        channel_mult_emb: int = 4,  # width of the embedding, as a multiple
        num_blocks: int = 3,  # residual blocks per level (the decoder has one more)
        attn_resolutions: Sequence[int] = (32, 16, 8),  # resolutions with self-attention
        dropout: float = 0.10,
        scale_shift_norm: bool = True,  # the embedding scales and shifts (AdaGN) instead of being added
        channels_per_head: int = 64,  # width of an attention head
        norm_groups: int | None = None,  # groups of every group norm; None: min(32, channels // 4)
        pixel_norm: bool = False,  # normalise that scale and shift over channels (sCM)
        told: int = 1,  # numbers a sample in c_noise, each embedded, the embeddings side by side
        heads: int = 1,  # outputs of out_channels each
    ) -> None:
        super().__init__(img_resolution, in_channels, label_dim, augment_dim, dropout, told)
        emb_channels = model_channels * channel_mult_emb

        def block(cin: int, cout: int, attention: bool = False, resample: str | None = None) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels=emb_channels,
                init=kaiming,
                zero_scale=0.0,
                attention_scale=1.0,
                eps=1e-5,
                norm_groups=norm_groups,
                num_heads=cout // channels_per_head if attention else 0,
                resample=resample,
                dropout=dropout,
                scale_shift_norm=scale_shift_norm,
                pixel_norm=pixel_norm,
            )

        self.map_noise = PositionalEmbedding(model_channels)
        if augment_dim:
            self.map_augment = initialised(Linear(augment_dim, told * model_channels, bias=False), kaiming, 0.0)
        self.map_layer0 = initialised(Linear(told * model_channels, emb_channels), kaiming)
        self.map_layer1 = initialised(Linear(emb_channels, emb_channels), kaiming)
        if label_dim:
            self.map_label = Linear(label_dim, emb_channels, bias=False)
            nn.init.normal_(self.map_label.weight)  # one row per class, like an embedding table

        widths = [model_channels * mult for mult in channel_mult]
        first = initialised(Conv2d(in_channels, widths[0], 3, padding=1), kaiming)
        self._add_levels(block, first, widths, num_blocks, lambda res, i: res in attn_resolutions)
        self.out_norm = GroupNorm(widths[0], eps=1e-5, groups=norm_groups)
        self.out_conv = initialised(Conv2d(widths[0], heads * out_channels, 3, padding=1), kaiming, 0.0)

    def _extend_down(self, at: str, channels: int) -> None:
        """Nothing beside the blocks."""

    _extend_up = _extend_down

    def _down(self, at: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        return x, aux

    def _out(self, at: str, x: Tensor, out: Tensor | None) -> Tensor | None:
        return self.out_conv(F.silu(self.out_norm(x))) if f"{at}_conv" in self.enc else None

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """(B, emb_channels) from the noise level and the labels."""
        emb = self.map_noise(single(c_noise, self.told)).view(c_noise.shape[0], -1)
        if self.augment_dim and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.label_dim and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)
