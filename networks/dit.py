"""A transformer over the patches of an image: DiT (2212.09748), and iMF's (2512.02012) newer parts as settings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Conv2d, Linear, PositionalEmbedding, attend
from .unet import single

WAVES = 256  # inputs of a number's embedding: cosines and sines of frequencies from 1 to 1/10000
LABEL_TOKENS, AUGMENT_TOKENS = 8, 2  # of prefix conditioning; of each number it is told 4, of the interval's 2 (iMF)


class RMSNorm(nn.Module):
    """x (..., width) over its root mean square, in float32 or wider; affine: times a learned vector."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (wide if self.weight is None else wide * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """W2 (silu(W0 x) * W1 x), without biases (2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.lin0 = Linear(width, inner, bias=False)
        self.lin1 = Linear(width, inner, bias=False)
        self.lin2 = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.silu(self.lin0(x)) * self.lin1(x))


class Block(nn.Module):
    """Attention, then an MLP, each a residual branch behind a norm: x (B, N, hidden) -> (B, N, hidden).

    adaln: emb (B, hidden) scales and shifts what a branch is given and gates what it gives, both 0 at the start
    (adaLN-zero). Without it emb is not read, and the gates are learned vectors, 0 at the start. rms: RMSNorm, and no
    biases in the attention.
    """

    checkpointing = False  # True: the backward pass computes the block again instead of keeping it

    def __init__(
        self, hidden: int, num_heads: int, mlp_ratio: float, rms: bool, swiglu: bool, qk_norm: bool, adaln: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm0, self.norm1 = norm_of(hidden, rms, not adaln), norm_of(hidden, rms, not adaln)
        self.qkv = Linear(hidden, 3 * hidden, bias=not rms)
        self.proj = Linear(hidden, hidden, bias=not rms)
        self.norm_qk = nn.ModuleList(RMSNorm(hidden // num_heads, True) for _ in range(2)) if qk_norm else None
        inner = int(hidden * mlp_ratio)
        gelu = nn.GELU(approximate="tanh")
        plain = nn.Sequential(Linear(hidden, inner), gelu, Linear(inner, hidden))
        self.mlp = SwiGLU(hidden, inner) if swiglu else plain
        for layer in self.modules():
            if isinstance(layer, Linear):
                initialise(layer, None if adaln else 0.32)
        if adaln:
            self.modulation = zeros(Linear(hidden, 6 * hidden))
        else:
            self.modulation = None
            self.gates = nn.Parameter(torch.zeros(2, hidden))

    def forward(self, x: Tensor, emb: Tensor, turn: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, turn, use_reentrant=False)
        return self.compute(x, emb, turn)

    def compute(self, x: Tensor, emb: Tensor, turn: Tensor | None) -> Tensor:
        """The block itself; `forward` may compute it again in the backward pass. turn: see `rotated`; None: none."""
        if self.modulation is None:
            x = x + self.gates[0] * self.attention(self.norm0(x), turn)
            return x + self.gates[1] * self.mlp(self.norm1(x))
        with torch.autocast(x.device.type, enabled=False):  # float32: it tells times apart
            shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(emb)[:, None].chunk(6, dim=2)
        x = x + gate0 * self.attention(torch.addcmul(shift0, self.norm0(x), scale0 + 1), turn)
        return x + gate1 * self.mlp(torch.addcmul(shift1, self.norm1(x), scale1 + 1))

    def attention(self, x: Tensor, turn: Tensor | None) -> Tensor:
        """Self-attention over all tokens."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).unbind(2)
        if self.norm_qk is not None:
            q, k = self.norm_qk[0](q), self.norm_qk[1](k)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        out = attend(*(part.permute(0, 2, 3, 1) for part in (q, k, v)))  # (B, heads, channels, N)
        return self.proj(out.permute(0, 3, 1, 2).reshape(b, n, -1))


class Last(nn.Module):
    """Tokens (B, N, hidden) to the pixels of their patches (B, N, outputs), 0 at the start; emb as in `Block`."""

    def __init__(self, hidden: int, outputs: int, rms: bool, adaln: bool) -> None:
        super().__init__()
        self.norm = norm_of(hidden, rms, not adaln)
        self.modulation = zeros(Linear(hidden, 2 * hidden)) if adaln else None
        self.linear = zeros(Linear(hidden, outputs))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.norm(x)
        if self.modulation is not None:
            with torch.autocast(x.device.type, enabled=False):
                shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
            x = torch.addcmul(shift, x, scale + 1)
        return self.linear(x)


class DiT(nn.Module):
    """The transformer: `network(x, c_noise, class_labels=None, augment_labels=None, first=False) -> F`.

    x (B, C, H, W), H and W any multiples of the patch; c_noise (B,) or (B, told), class_labels (B, label_dim),
    augment_labels (B, augment_dim) -> (B, heads * out_channels, H, W), 0 until it is trained; first: of the first head
    alone, (B, out_channels, H, W). Wrap it in a `FlowMap` or a `Preconditioner`.
    """

    several_heads = True  # takes `first`

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # number of classes; 0: unconditional
        augment_dim: int = 0,  # number of augmentation labels; 0: none
        patch_size: int = 2,  # pixels of a patch's side
        hidden: int = 768,  # width of a token
        depth: int = 12,  # blocks between input and output
        num_heads: int = 12,  # of the attention
        mlp_ratio: float = 4.0,  # width of the MLP's inner layer, as a multiple; iMF: 8/3 with swiglu
        norm: str = "layer",  # "layer" or "rms", then without biases in the attention
        mlp: str = "gelu",  # "gelu" or "swiglu"
        qk_norm: bool = False,  # RMSNorm of queries and keys
        positions: str = "sincos",  # "sincos", added to the patches, or "rope", a rotation by the place in the sequence
        conditioning: str = "adaln",  # "adaln" (DiT): the embeddings' sum; "prefix" (iMF): tokens before the patches
        head_blocks: int = 8,  # where there are two heads: of the depth, blocks that each has for itself
        told: int = 1,  # numbers a sample in c_noise, each with an embedding
        heads: int = 1,  # outputs of out_channels each, 1 or 2
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("norm", norm, ("layer", "rms")),
            ("mlp", mlp, ("gelu", "swiglu")),
            ("positions", positions, ("sincos", "rope")),
            ("conditioning", conditioning, ("adaln", "prefix")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if hidden % num_heads or hidden % 4 or (hidden // num_heads) % 2:
            raise ValueError(f"hidden {hidden} does not split into {num_heads} heads of an even width")
        if heads == 2 and head_blocks > depth:
            raise ValueError(f"head_blocks {head_blocks} is more than the depth {depth}")
        self.img_resolution, self.img_channels = img_resolution, in_channels
        self.label_dim, self.augment_dim, self.told, self.heads = label_dim, augment_dim, told, heads
        self.patch_size, self.hidden, self.num_heads = patch_size, hidden, num_heads
        self.positions, self.adaln = positions, conditioning == "adaln"
        self._grid(img_resolution, img_resolution)
        style = {"rms": norm == "rms", "swiglu": mlp == "swiglu", "qk_norm": qk_norm, "adaln": self.adaln}

        self.patches = initialise(Conv2d(in_channels, hidden, patch_size, stride=patch_size))
        self.map_noise = PositionalEmbedding(WAVES)
        std = None if self.adaln else 1.0
        self.map_layers = nn.ModuleList(
            nn.Sequential(number_layer(WAVES, hidden, std), nn.SiLU(), number_layer(hidden, hidden, std))
            for _ in range(told)
        )
        for name, size in (("map_label", label_dim), ("map_augment", augment_dim)):
            if size:
                table = Linear(size, hidden, bias=False)  # the null label is the vector 0
                setattr(self, name, table)
                nn.init.normal_(table.weight, std=0.02 if self.adaln else hidden**-0.5)
        if not self.adaln:
            counts = {"label": LABEL_TOKENS} if label_dim else {}
            counts |= {f"told{i}": 2 if told > 3 and i >= told - 2 else 4 for i in range(told)}
            counts |= {"augment": AUGMENT_TOKENS} if augment_dim else {}
            self.tokens = nn.ParameterDict({name: torch.randn(n, hidden) * hidden**-0.5 for name, n in counts.items()})
        self.blocks = nn.ModuleList(Block(hidden, num_heads, mlp_ratio, **style) for _ in range(depth))
        outputs = (hidden, patch_size**2 * out_channels, style["rms"], self.adaln)
        self.last = Last(*outputs)
        if heads == 2:
            self.blocks_2 = nn.ModuleList(Block(hidden, num_heads, mlp_ratio, **style) for _ in range(head_blocks))
            self.last_2 = Last(*outputs)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        first: bool = False,
    ) -> Tensor:
        rows, cols = self._grid(*x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):  # float32: it tells times apart
            vectors = self.embed(c_noise, class_labels, augment_labels)
        h = self.patches(x).flatten(2).transpose(1, 2)
        if self.positions == "sincos":
            h = h + sincos(rows, cols, self.hidden, x.device).to(x.dtype)
        emb = vectors[0]
        if self.adaln:
            emb = F.silu(sum(vectors[1:], emb))
        else:
            prefix = [token + vector[:, None] for token, vector in zip(self.tokens.values(), vectors, strict=True)]
            h = torch.cat([*prefix, h], dim=1)
        turn = None
        if self.positions == "rope":
            turn = angles(h.shape[1], self.hidden // self.num_heads, x.device)[:, None]
            turn = torch.stack([turn.cos(), turn.sin()])
        blocks = [*self.blocks]
        shared = len(blocks) - (len(self.blocks_2) if self.heads == 2 else 0)
        for block in blocks[:shared]:
            h = block(h, emb, turn)
        branches = [(blocks[shared:], self.last)]
        if self.heads == 2 and not first:
            branches.append((self.blocks_2, self.last_2))
        outputs = []
        for own, last in branches:
            tokens = h
            for block in own:
                tokens = block(tokens, emb, turn)
            outputs.append(pixels(last(tokens[:, -rows * cols :], emb), rows, cols, self.patch_size))
        return torch.cat(outputs, dim=1)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> list[Tensor]:
        """The vectors (B, hidden) of the label, of each number that the network is told, and of the augmentation."""
        waves = self.map_noise(single(c_noise, self.told)).view(c_noise.shape[0], self.told, WAVES)
        vectors = [layers(waves[:, i]) for i, layers in enumerate(self.map_layers)]
        null = torch.zeros_like(vectors[0])
        if self.label_dim:
            vectors.insert(0, null if class_labels is None else self.map_label(class_labels))
        if self.augment_dim:
            vectors.append(null if augment_labels is None else self.map_augment(augment_labels))
        return vectors

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"an image of {height}x{width} pixels does not split into patches of {p}x{p}")
        return height // p, width // p


def norm_of(hidden: int, rms: bool, affine: bool) -> nn.Module:
    """A norm over the width of a token; affine: with learned scales (and shifts, if it is a layer norm)."""
    return RMSNorm(hidden, affine) if rms else nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=affine)


def initialise(layer: nn.Module, std: float | None = None) -> nn.Module:
    """Weights Xavier-uniform over inputs and outputs, also a convolution's (DiT), or normal, of std / sqrt(inputs)
    (iMF); bias 0."""
    with torch.no_grad():
        if std is None:
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
        else:
            layer.weight.normal_(std=std * layer.weight[0].numel() ** -0.5)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def number_layer(inputs: int, outputs: int, std: float | None) -> nn.Module:
    """A layer of a number's embedding: weights normal, of 0.02 (DiT), or of std / sqrt(inputs) (iMF)."""
    return initialise(Linear(inputs, outputs), 0.02 * inputs**0.5 if std is None else std)


def zeros(layer: nn.Module) -> nn.Module:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def pixels(x: Tensor, rows: int, cols: int, p: int) -> Tensor:
    """Patches (B, rows * cols, p * p * C) as an image (B, C, rows * p, cols * p)."""
    x = x.view(x.shape[0], rows, cols, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], -1, rows * p, cols * p)  # len: torch.export would take it for a constant


def angles(n: int, channels: int, device: torch.device) -> Tensor:
    """The places 0 ... n - 1 times channels / 2 frequencies from 1 to almost 1/10000: float32 (n, channels / 2)."""
    half = channels // 2
    frequencies = 1e-4 ** (torch.arange(half, dtype=torch.float32, device=device) / half)
    return torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequencies


def sincos(rows: int, cols: int, hidden: int, device: torch.device) -> Tensor:
    """Positions (rows * cols, hidden), fixed: sines and cosines of the row, then of the column."""
    row, col = (angles(n, hidden // 2, device) for n in (rows, cols))
    row, col = row.repeat_interleave(cols, 0), col.repeat(rows, 1)
    return torch.cat([row.sin(), row.cos(), col.sin(), col.cos()], dim=1)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, N, heads, c), the pairs (i, i + c/2) of its channels turned by angles, turn their cosines and sines
    (2, N, 1, c/2) (RoPE, 2104.09864)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = turn.to(wide)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
