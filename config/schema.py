"""The settings of a run: their types, ranges, defaults and meaning."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from config.values import EXACT, is_text, meant

Dataset = Literal[
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "imagenet9",
    "folder",
    "zip",
    "npz",
    "tar",
    "parquet",
    "latents",
]
NEEDS_PATH = ("imagenet9", "folder", "zip", "npz", "tar", "parquet", "latents")  # datasets that data.path leads to
DEFAULT_NAMES = {"network": "song_unet", "objective": "ect"}


def path_text(text: str) -> str:
    """A path as a file system takes it, ~ expanded, which no shell does after `run.dir=`; ValueError for others.

    Every path goes through here: settings (PathText) and the commands' options (their type).
    """
    text = os.path.expanduser(text)
    if text.startswith("~") and not os.path.exists(text):
        raise ValueError(f"{text.split('/')[0]} is no user's home here; write ./{text} for a name that begins with ~")
    if "\0" in text or len(text) > 4000 or any(len(os.fsencode(part)) > 240 for part in text.split("/")):
        raise ValueError("a path has no NUL character and no name of over 240 bytes")
    return text


def _length(least: int) -> Any:
    """The type of a length of the run: an integer from `least` on is steps, a float below 1 a share of the run."""

    def check(value: Any) -> Any:
        if type(value) is float and 1 < value <= EXACT and value.is_integer():  # 1e3; 1.0 could mean either
            value = int(value)
        if (type(value) is int and value >= least) or (type(value) is float and 0 < value < 1):
            return value
        text = f"input should be an integer from {least} (steps) or a number between 0 and 1 (a share of the run)"
        raise PydanticCustomError("length", text)

    steps, share = Annotated[int, Field(ge=least)], Annotated[float, Field(gt=0, lt=1)]
    return Annotated[steps | share, BeforeValidator(check)]


def in_steps(length: int | float, steps: int, whole: bool = True) -> int | float:
    """A length of a run of `steps` steps, in steps: an integer as it is; a share of them, but at least one step,
    rounded to whole steps unless `whole` is False."""
    if isinstance(length, int):
        return length
    return max(round(length * steps) if whole else length * steps, 1)


def _weight_or_pair(value: Any) -> Any:
    """The value, where it is a weight of guidance or a pair between which weights are drawn and told; else an error."""
    numbers = value if isinstance(value, list) else [0.0 if value is None else value]
    right = all(type(number) in (int, float) and 0 <= number < float("inf") for number in numbers)
    if right and isinstance(value, list):
        right = len(value) == 2 and 1 <= value[0] < value[1]
    if not right:
        text = "input should be a number from 0, or [w_min, w_max] with 1 <= w_min < w_max (1 is unguided)"
        raise PydanticCustomError("guidance", text)
    return value


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Length = _length(0)
Interval = _length(1)
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Guidance = Annotated[NonNegative | Pair | None, BeforeValidator(_weight_or_pair)]
PathText = Annotated[str, AfterValidator(path_text)]
Lower = Annotated[str, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)]
Mean = Annotated[float, Field(description="Mean of ln sigma (ECT writes t).")]
Std = Annotated[float, Field(gt=0, description="Standard deviation of ln sigma.")]


class Section(BaseModel, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A part of the config: no unknown key, no conversion but `meant`'s; the text under a key is its description."""

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = cls.model_fields
        return {key: meant(known[key].annotation, v) if key in known else v for key, v in values.items()}


class Run(Section):
    """Where the run is kept, its seed and device."""

    name: PathText = Field("digits", pattern=r"^[\w.-]+$")
    """Name of the run; its folder is runs/<name> unless run.dir says otherwise."""
    dir: PathText | None = None
    """Folder of the run: config, checkpoints, samples, curves. null: runs/<name>."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: initial weights, data order, noise."""
    device: Lower = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto (a GPU where there is one), cpu, cuda, cuda:N or mps."""

    @property
    def folder(self) -> Path:
        """dir, or runs/<name>."""
        return Path(self.dir) if self.dir else Path("runs") / self.name


class Data(Section):
    """What it learns."""

    name: Dataset | None = "digits"
    """Dataset. digits come with scikit-learn; the next four are downloaded; those from imagenet9 on read data.path.
    null: the kind that data.path is."""
    dir: PathText = "data"
    """Folder for downloads and caches."""
    path: PathText | None = None
    """A folder tree (folder), ImageNet's train folder (imagenet9), EDM's dataset (zip), images or vectors (npz); a
    folder of shards, one, or a pattern as 'a-{000..049}.tar' (tar, parquet); a file of encode.py, EDM2's zip or
    LightningDiT's shards (latents)."""
    autoencoder: PathText | None = None
    """Of latents: a diffusers folder, a name on the hub or a checkpoint of objective autoencoder, which makes images of
    them. null: the one that the file names."""
    scaling: Literal["edm2", "imm", "lightningdit", "sd"] | None = None
    """What the model sees of latents: a preset as published, or null: their own mean and spread, to sigma_data."""
    image_column: str | None = None
    """The column of a parquet that holds the images. null: the one that can be."""
    label_column: str | None = None
    """The column of a parquet that holds the labels. null: the one that is said to, or is called label."""
    resolution: int | None = Field(None, ge=4, le=1024)
    """Side of the square images in pixels; others are resized and centre-cropped. null: the dataset's own."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB). null: the dataset's own."""
    conditional: bool | None = False
    """Train the network on class labels, so that it can be asked for a class; on conditions, where data are vectors.
    null: chosen by the images; resolution and channels then are too (docs/own_images.md)."""
    flip: bool = False
    """Mirror half of the images. Not for digits or letters. Unlike augment's mirror, the network is not told of it."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability p of each transformation of EDM's augmentation pipe (2206.00364 app. F.2). 0: off."""
    upright: bool = False
    """Leave rotation and the mirror upside down out of the augmentation, as MeanFlow and SoFlow do."""
    on_broken: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read, or is of another size than the others where resolution is null."""
    white_level: int | None = Field(None, ge=1, le=65535)
    """The value of white in 16-bit image files, as 4095 where they hold 12-bit data. null: 65535."""
    workers: int = Field(2, ge=0, le=64)
    """Processes that decode images, for sets too large to be kept in memory."""
    memory_gb: NonNegative = 4.0
    """A set that decodes to less than this many GiB of uint8 is kept in memory, on the device where it fits."""
    bounds: Literal["clamp", "tanh"] | None = None
    """Keep sampled vectors between the npz's low and high: cut them off, or learn their atanh. null: not kept."""


class Network(Section):
    """What every network's settings share; names and defaults are EDM's (2206.00364)."""

    precond: Literal["edm", "cm", "trigflow", "flow"] | None = None
    """edm (2206.00364 tab. 1), cm with D(x) = x at sigma_min (2303.01469 app. C), trigflow (2410.11081 sec. 3), or
    flow, the velocity itself. null: the method's own, here and in the next four."""
    c_noise: Literal["log", "log250", "t", "time"] | None = None
    """Noise label: ln(sigma)/4, 250 ln(sigma) as in OpenAI's models, t = atan(sigma/sigma_data) as in sCM, or a flow
    map's time from 0 to 1."""
    times: Literal["t", "t,t-r", "t,r", "t-r"] | None = None
    """What a flow map's network is told of its times: t (flow matching), t,t-r (MeanFlow, SoFlow), t,r or t-r
    (iMF)."""
    heads: Literal[1, 2] | None = None
    """Outputs of a flow map: 2 for iMF, which also learns the velocity at t."""
    guidance_inputs: bool | None = None
    """Tell the network the guidance that it is asked for, as methods do whose objective.guidance is a pair; and its
    interval, as iMF does."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data, in [-1, 1]."""
    sigma_min: Positive = 0.002
    """Lowest noise level."""
    sigma_max: Positive = 80.0
    """Highest noise level: where sampling starts."""


class UNet(Network):
    """What both UNets' settings share."""

    model_channels: int = Field(128, ge=4, multiple_of=4)
    """Channels of the first resolution."""
    channel_mult: list[Count] = Field([2, 2, 2], min_length=1)
    """Channels of each resolution, times model_channels; one entry a resolution, halving each time."""
    channel_mult_emb: Count = 4
    """Width of the noise and class embedding, times model_channels."""
    num_blocks: Count = 4
    """Residual blocks per resolution."""
    attn_resolutions: list[Count] = [16]
    """Resolutions in pixels with self-attention; the deepest block has it anyway."""
    dropout: Share = 0.0
    """Dropout inside residual blocks; both passes of a step share the mask."""
    label_dropout: Share = 0.0
    """Share of labels dropped in training, for classifier-free guidance."""
    pixel_norm: bool = False
    """Normalise AdaGN's scale and shift over channels, for sCM (2410.11081 sec. 4.1); needs scale_shift_norm."""


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021, 2011.13456), with EDM's arguments."""

    name: Literal["song_unet"] = "song_unet"
    model_channels: int | None = Field(128, ge=4, multiple_of=4)
    """Channels of the first resolution. null: chosen by the images and the device, here and in the next three
    (docs/own_images.md)."""
    channel_mult: list[Count] | None = Field([2, 2, 2], min_length=1)
    """Channels of each resolution, times model_channels; one entry a resolution, halving each time."""
    num_blocks: Count | None = 4
    """Residual blocks per resolution."""
    attn_resolutions: list[Count] | None = [16]
    """Resolutions in pixels with self-attention; the deepest block has it anyway."""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """Embedding of the noise label: positional (DDPM++) or fourier (NCSN++)."""
    fourier_scale: Positive = 16.0
    """Scale of the Fourier frequencies: EDM 16, iCT 0.02."""
    channel_mult_noise: Count = 1
    """Width of the noise embedding, times model_channels: 1 for DDPM++, 2 for NCSN++."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """standard for DDPM++, residual for NCSN++."""
    decoder_type: Literal["standard", "skip"] = "standard"
    """standard for both."""
    resample_filter: list[Count] = [1, 1]
    """Up- and downsampling filter: [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++."""
    scale_shift_norm: bool = False
    """Let the embedding scale and shift (AdaGN), not only shift."""


class DhariwalUNet(UNet):
    """ADM (Dhariwal & Nichol 2021, 2105.05233), with EDM's arguments."""

    name: Literal["dhariwal_unet"]
    model_channels: int = Field(192, ge=4, multiple_of=4)
    """Channels of the first resolution; ADM's 192."""
    channel_mult: list[Count] = Field([1, 2, 3, 4], min_length=1)
    """Channels of each resolution, times model_channels; one entry a resolution, halving each time."""
    num_blocks: Count = 3
    """Residual blocks per resolution; ADM's 3."""
    attn_resolutions: list[Count] = [32, 16, 8]
    """Resolutions in pixels with self-attention."""
    dropout: Share = 0.1
    """Dropout inside residual blocks; both passes of a step share the mask."""
    scale_shift_norm: bool = True
    """Let the embedding scale and shift (AdaGN), not only shift."""
    channels_per_head: Count = 64
    """Channels of an attention head; ADM's 64."""
    norm_groups: Count | None = None
    """Groups of every group norm; OpenAI's models: 32. null: EDM's min(32, channels / 4)."""


class EDM2UNet(Network):
    """EDM2's magnitude-preserving UNet (Karras et al. 2024, 2312.02696); the defaults are its ImageNet-64 S."""

    name: Literal["edm2_unet"]
    model_channels: Count = 192
    """Channels of the first resolution: XS 128, S 192, M 256, L 320, XL 384."""
    channel_mult: list[Count] = Field([1, 2, 3, 4], min_length=1)
    """Channels of each resolution, times model_channels; one entry a resolution, halving each time."""
    channel_mult_noise: Count | None = None
    """Width of the noise embedding, times model_channels. null: the first resolution's."""
    channel_mult_emb: Count | None = None
    """Width of the noise and class embedding, times model_channels. null: the widest resolution's."""
    num_blocks: Count = 3
    """Residual blocks per resolution."""
    attn_resolutions: list[Count] = [16, 8]
    """Resolutions in pixels with self-attention; the deepest block has it anyway."""
    channels_per_head: Count = 64
    """Channels of an attention head; a resolution with fewer has no attention."""
    dropout: Share = 0.0
    """Dropout inside residual blocks; both passes of a step share the mask."""
    dropout_max_resolution: Count | None = None
    """Drop at this resolution and below only: ECT's 16 on ImageNet. null: at all."""
    label_dropout: Share = 0.0
    """Share of labels dropped in training, for classifier-free guidance."""
    label_balance: Part = 0.5
    """Share of the class in the embedding, the noise level's the rest."""
    concat_balance: Part = 0.5
    """Share of the skip connection in what a block of the decoder is given."""
    res_balance: Part = 0.3
    """Share of the residual branch in a block's output."""
    attn_balance: Part = 0.3
    """Share of the attention in a block's output."""
    resample_filter: list[Count] = [1, 1]
    """Up- and downsampling filter."""
    clip_act: Positive | None = 256.0
    """Activations are kept between this and its negative. null: not."""
    logvar_channels: Count = 128
    """Width of the part that learns the loss's size, for objective.logvar."""


class MLP(Network):
    """A residual MLP for vectors: data.name: npz with an array `vectors`."""

    name: Literal["mlp"]
    width: int = Field(256, ge=4, multiple_of=2)
    """Width of every layer."""
    depth: Count = 4
    """Residual blocks, of two layers each."""


class DiT(Network):
    """A transformer over patches (Peebles & Xie 2022, 2212.09748): B/2 as it stands, iMF's by its other settings."""

    name: Literal["dit"]
    patch_size: Count = 2
    """Pixels of a patch's side; divides the images'."""
    hidden: int = Field(768, ge=4, multiple_of=4)
    """Width of a token: 384 (S), 768 (B), 1024 (L), 1152 (XL)."""
    depth: Count = 12
    """Blocks: 12 (S, B), 24 (L), 28 (XL)."""
    num_heads: Count = 12
    """Heads of the attention: 6 (S), 12 (B), 16 (L, XL)."""
    mlp_ratio: Positive = 4.0
    """Width of the inner layer of an MLP, as a multiple of hidden; iMF 8/3."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm, or RMSNorm and no biases in the attention (iMF)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Two layers with GELU, or SwiGLU's three (iMF)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys (iMF)."""
    positions: Literal["sincos", "rope"] = "sincos"
    """Where a patch stands: fixed sines and cosines added to it, or rotations of queries and keys (iMF)."""
    conditioning: Literal["adaln", "prefix"] = "adaln"
    """How times and labels come in: they scale, shift and gate every block, or are tokens before the patches (iMF)."""
    head_blocks: int = Field(8, ge=0)
    """With two heads: of the depth, how many blocks each has for itself."""
    label_dropout: Share = 0.0
    """Share of labels dropped in training, for classifier-free guidance."""


class AutoencoderKL(Section):
    """diffusers' AutoencoderKL, for objective autoencoder (2112.10752); the defaults are Stable Diffusion's."""

    name: Literal["autoencoder"]
    latent_channels: Count = 4
    """Channels of the latent."""
    block_out_channels: list[Count] = Field([128, 256, 512, 512], min_length=1)
    """Channels of each level; each but the first halves the image: the default's latents are 8 times smaller."""
    layers_per_block: Count = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    norm_num_groups: Count = 32
    """Groups of every group norm; divides all of block_out_channels."""
    mid_block_add_attention: bool = True
    """Self-attention at the latent's resolution."""


class Distance(Section):
    """The loss's distance: between the two outputs of a pair, or (CMT) to the end of a trajectory."""

    metric: Literal["l1", "l2", "lpips", "pseudo_huber"] = "l2"
    """Distance d of the loss. lpips (CMT's in its paper) needs VGG16's weights; images are not resized for it."""
    lpips_weights: PathText | None = None
    """Local file with torchvision's VGG16 weights; null: downloaded."""
    huber_c: NonNegative | None = None
    """c of pseudo_huber. null: 0.00054 sqrt(d), d the elements of a sample."""


class Distilled(Section):
    """What starts from a teacher."""

    teacher: PathText
    """Checkpoint of the teacher, a diffusion model; the student starts from it unless train.init_from is set."""


class EDM(Section):
    """Denoising: trains a diffusion model, the teacher (Karras et al. 2022, 2206.00364)."""

    name: Literal["edm"]
    P_mean: Mean = -1.2
    P_std: Std = 1.2
    logvar: bool = False
    """Weigh each noise level by what the network learns of its loss (EDM2, 2312.02696 eq. 21); edm2_unet does."""


class CT(Distance):
    """Consistency training with an EMA target (Song et al. 2023, 2303.01469)."""

    name: Literal["ct"]
    s0: int = Field(2, ge=2)
    """Noise levels N at the start."""
    s1: int = Field(150, ge=2)
    """Noise levels at the end, less one."""
    mu0: float = Field(0.9, gt=0, lt=1)
    """Decay of the target network at the start. 0.9 is for 800,000 steps; a few thousand stay grey with it: 0.01."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "uniform"
    """Weight of the loss by the student's signal-to-noise ratio; the paper's is uniform."""


class Neighbours(Section):
    """What methods share that compare one network's outputs at two near noise levels."""

    difference: Literal["auto", "two_passes", "forward_mode"] = "auto"
    """How the outputs' difference is taken: two passes, or its derivative by one pass in forward mode at the midpoint,
    which half precision cannot drown. auto: forward_mode in half precision where the pair is near."""


class ICT(Neighbours):
    """Improved consistency training (Song & Dhariwal 2023, 2310.14189)."""

    name: Literal["ict"]
    huber_c: NonNegative | None = None
    """c of the pseudo-Huber distance. null: 0.00054 sqrt(d), d the elements of a sample."""
    s0: int = Field(10, ge=2)
    """Intervals N - 1 between noise levels at the start."""
    s1: int = Field(1280, ge=2)
    """Intervals at the end."""
    P_mean: Mean = -1.1
    P_std: Std = 2.0


class ECT(Neighbours):
    """Easy consistency tuning (Geng et al. 2024, 2406.14548)."""

    name: Literal["ect"] = "ect"
    q: float = Field(2.0, gt=1)
    """The gap t - r shrinks by this factor per stage."""
    stage: Interval | None = None
    """Length of a stage: steps, or a share of the run below 1. null: as double_kimg says."""
    double_kimg: Positive | None = 3200.0
    """Instead of stage: its length in thousands of images. null, and no stage: one stage, held to the end."""
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    """n(t) in r = t (1 - n(t) / q^(stage+1)): 1 + 8 sigmoid(-t), or 1."""
    P_mean: Mean = -1.1
    P_std: Std = 2.0
    huber_c: NonNegative = 0.0
    """c of the pseudo-Huber distance."""
    weighting: Literal["gap", "c_out"] = "gap"
    """Weight of the loss: 1 / (t - r), or 1 / c_out(t)^2, the original's on ImageNet."""


class CD(Distilled, Distance):
    """Consistency distillation of a teacher (Song et al. 2023, 2303.01469)."""

    name: Literal["cd"]
    guidance: Guidance = None
    """w of classifier-free guidance of the teacher, D_null + w (D - D_null), 1 unguided; or [w_min, w_max], between
    which it is drawn and told to the network, for sampling to choose (2310.04378). null: as it is."""
    N: int = Field(18, ge=2)
    """Noise levels in the grid."""
    mu: float = Field(0.0, ge=0, lt=1)
    """Decay of the target network. 0: the target is the student."""
    solver: Literal["heun", "euler"] = "heun"
    """Solver of the teacher's step to the next level."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "uniform"
    """Weight of the loss by the student's signal-to-noise ratio; the paper's is uniform."""


class TrigFlow(Section):
    """Diffusion training in TrigFlow's clock, tan(t) = sigma/sigma_data: start of sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["trigflow"]
    P_mean: Mean = -1.0
    P_std: Std = 1.4


class SCT(TrigFlow):
    """Continuous-time consistency training, sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["sct"]
    warmup: Length = 10_000
    """H: steps, or a share of the run below 1, over which the tangent's second half grows in."""
    c: Positive = 0.1
    """The tangent is normalised as g / (|g| + c), |g| the L2 norm of the whole sample."""
    anchor: NonNegative = 0.0
    """Weight of FACM's flow-matching anchor (2507.03738), told apart by the time -t; 1 there, beside a consistency loss
    larger than sCM's. 0: none."""


class SCD(SCT, Distilled):
    """Continuous-time consistency distillation, sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["scd"]
    guidance: Guidance = None
    """w of classifier-free guidance of the teacher, D_null + w (D - D_null), 1 unguided; or [w_min, w_max], between
    which it is drawn and told to the network, for sampling to choose (2310.04378). null: as it is."""


class TCM(Neighbours):
    """Truncated consistency model: the second stage over a finished ECT or iCT model (Lee et al. 2024, 2410.14895)."""

    name: Literal["tcm"]
    teacher: PathText
    """Checkpoint of the first stage; the second starts from its weights unless train.init_from is set."""
    t_prime: Positive = 1.0
    """Noise level t' where the second stage begins."""
    q: float = Field(1000.0, gt=9)
    """r = t (1 - n(t) / q), n(t) = 1 + 8 sigmoid(-t)."""
    boundary_share: Share = 0.25
    """Share of the batch at t = t'."""
    boundary_weight: NonNegative = 0.1
    """Weight of its loss."""
    df: Positive = 0.01
    """ln t is drawn from Student's t with so many degrees of freedom, mean 0, truncated to [t', sigma_max]."""
    scale: Positive = 0.2
    """Scale of that distribution."""
    huber_c: NonNegative = 0.0
    """c of the pseudo-Huber distance."""
    weighting: Literal["gap", "c_out"] = "gap"
    """Weight of the loss: 1 / (t - r), or 1 / c_out(t)^2, the original's on ImageNet."""


class CMT(Distilled, Distance):
    """Mid-training on the teacher's trajectories, before ECT (Hu et al. 2025, 2509.24526)."""

    name: Literal["cmt"]
    steps: int = Field(16, ge=2)
    """Points of a trajectory: steps of DPM-Solver++(2M), even in ln sigma. Divides the images of a pass."""


class PD(Distilled):
    """Progressive distillation, the baseline (Salimans & Ho 2022, 2202.00512)."""

    name: Literal["pd"]
    N: int = Field(512, ge=2)
    """Intervals of the student's first grid, a power of two; halved to 1 in equal parts of the run."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "truncated-snr"
    """Weight of the loss by the signal-to-noise ratio; the paper's is truncated-snr."""


class Flow(Section):
    """Flow matching: trains a velocity, the start of a flow map (Lipman et al. 2022, 2210.02747)."""

    name: Literal["flow"]
    P_mean: float = 0.0
    """Mean of ln(t / (1 - t)), t from 0 (data) to 1 (noise)."""
    P_std: Positive = 1.0
    """Its standard deviation."""


class Guided(Section):
    """What methods share that are guided while they train; null: not guided."""

    guidance: NonNegative | None = None
    """w of the guidance that is learned, so that sampling costs one evaluation; needs data.conditional. null: none."""
    label_dropout: Share = 0.1
    """Share of labels dropped where guided, in place of network.label_dropout."""


class TwoTimes(Guided):
    """What MeanFlow's and SoFlow's settings share: the times t and r (SoFlow writes s), and the adaptive weight."""

    P_mean_t: float = -0.6
    """Mean of ln(t / (1 - t)), t from 0 (data) to 1 (noise)."""
    P_std_t: Positive = 1.6
    """Its standard deviation."""
    P_mean_r: float = -4.0
    """Mean of ln(r / (1 - r)), r the time that is jumped to."""
    P_std_r: Positive = 1.6
    """Its standard deviation."""
    p: NonNegative = 0.75
    """A sample weighs (l + eps)^-p, l its squared error: summed over the sample (MeanFlow), or its mean (SoFlow)."""
    eps: Positive = 1e-3
    """See p."""


class MeanFlow(TwoTimes):
    """MeanFlow: average velocities, by one forward-mode derivative a step (Geng et al. 2025, 2505.13447)."""

    name: Literal["meanflow"]
    teacher: PathText | None = None
    """A diffusion or flow model to distil: the target is its velocity, the run starts from its weights. null: none."""
    sampler: Literal["v0", "v1"] = "v1"
    """v0 (the paper): the larger of two times is t; v1 (released code): t stays, and r is at most t."""
    ratio: float = Field(0.75, ge=0, le=1)
    """Probability that r differs from t; where r = t, plain flow matching is trained."""
    flow: Length = 0
    """First steps, or their share of the run below 1, of flow matching alone (r = t), which cost less."""
    derivative: Literal["forward_mode", "difference"] = "forward_mode"
    """du/dt: forward_mode, exact, in any precision; difference, of two outputs at times 0.01 apart, which costs a third
    of that on a CPU and needs fp32 (auto takes it)."""
    guidance: Guidance = None
    """w of the guidance that is learned, so that sampling costs one evaluation; or [w_min, w_max], between which it is
    drawn and told to the network, for sampling to choose. Needs data.conditional. null: none."""
    kappa: Share = 0.0
    """Share of the network's own guided velocity in the target; the effective guidance is guidance / (1 - kappa)."""
    interval: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 1.0], min_length=2, max_length=2)
    """[lowest, highest] t that is guided."""


class SoFlow(TwoTimes, Neighbours):
    """SoFlow: solution flow models, without a forward-mode derivative (Luo et al. 2025, 2512.15657)."""

    name: Literal["soflow"]
    P_mean_t: float = -0.9
    """Mean of ln(t / (1 - t)), t from 0 (data) to 1 (noise)."""
    rho: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0, 0.0003125], min_length=2, max_length=2)
    """l = t + (r - t) rho: where between t and r the two outputs are compared, at the first and at the last step."""
    schedule: Literal["exponential", "linear", "cosine", "constant"] = "exponential"
    """How rho goes from the one to the other; constant: the last from the start."""
    velocity_share: float = Field(0.0, ge=0, le=1)
    """Share of the batch that learns the velocity, r = t."""
    P_mean_v: float = -0.9
    """Mean of ln(t / (1 - t)) there."""
    P_std_v: Positive = 1.6
    """Its standard deviation."""
    mix: float = Field(0.25, gt=0, le=1)
    """m: share of the data's guided velocity in the target; the rest is the network's own."""
    fade: float = Field(0.8, ge=0, le=1)
    """t above which guidance falls smoothly to none. 1: nowhere."""


class IMF(Guided):
    """iMF: improved MeanFlow, a regression on the velocity along a predicted tangent (Geng et al. 2025, 2512.02012)."""

    name: Literal["imf"]
    guidance: float | None = Field(None, gt=1)
    """The largest w that is told to the network; w = guidance^U(0, 1), 8 in the paper. Sampling chooses. null: none."""
    P_mean: float = -0.4
    """Mean of ln(t / (1 - t)), of two times, the larger of which is t."""
    P_std: Positive = 1.0
    """Its standard deviation."""
    equal_share: float = Field(0.5, ge=0, le=1)
    """Share of the batch with r = t, plain flow matching."""
    p: NonNegative = 1.0
    """A sample weighs (l + eps)^-p, l its squared error, summed over the sample."""
    eps: Positive = 0.01
    """See p."""


class Autoencode(Section):
    """Training of the autoencoder that latents are made by, without a discriminator (2112.10752 app. G)."""

    name: Literal["autoencoder"]
    metric: Literal["l1", "l2"] = "l1"
    """Distance of pixels in [-1, 1], a mean over them."""
    kl_weight: NonNegative = 1e-6
    """Weight of the latent's KL from a normal distribution, summed over it, over the image's values."""
    lpips_weight: NonNegative = 0.0
    """Weight of LPIPS beside the distance: 1 in the paper; needs VGG16's weights. 0: none."""
    lpips_weights: PathText | None = None
    """Local file with torchvision's VGG16 weights; null: downloaded."""
    held_out: PathText | None = None
    """Other images, of the kind of data.name, that grids and scores are of. null: every 20th of data.path's, which then
    are never trained on."""


class Ema(Section):
    """The averaged weights that are sampled."""

    decay: list[Share] | None = Field([0.9999], min_length=1)
    """Decay per step, one entry for each average kept; the first is sampled and scored."""
    half_life_kimg: list[Positive] | None = Field(None, min_length=1)
    """Instead of decay: half-lives in thousands of images."""
    warmup: NonNegative = 0.05
    """The half-life is at most this share of the steps so far (2206.00364 app. F). 0: off."""
    std: list[Annotated[float, Field(gt=0, lt=0.28)]] | None = Field(None, min_length=1)
    """Widths of power-function averages as shares of the run, kept after decay's; EDM2's: 0.05, 0.1. null: none."""
    snapshot_every: Length = 0.03125
    """Steps, or a share of the run below 1, between snapshots of std's, of which ema.py rebuilds others. 0: none."""


class Train(Section):
    """The optimizer and the loop."""

    steps: Count | None = 400_000
    """Optimizer steps. null: chosen by the images and the device, as is batch_size (docs/own_images.md)."""
    batch_size: Count | None = 128
    """Images per step over all devices."""
    microbatch: Count | Literal["auto"] | None = None
    """Images per pass on one device; gradients accumulate to batch_size. auto: what a GPU holds. null: all at once."""
    checkpointing: bool = False
    """Compute each residual block again in the backward pass instead of keeping it: less memory, a third more time."""
    optimizer: Literal["radam", "adam", "adamw", "muon"] = "radam"
    """RAdam in the papers on consistency models, Adam for EDM; muon, Muon for matrices and convolutions and RAdam for
    the rest, learns fastest in short runs."""
    lr: Positive = 1e-4
    """Learning rate at its peak."""
    betas: list[Share] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay of the optimizer's first and second moments."""
    eps: Positive = 1e-8
    """What the optimizer adds to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decay of the weights: adamw's and muon's own, times the rate; in adam and radam a part of the gradient."""
    lr_warmup: Length = 0
    """Steps, or a share of the run below 1, over which the learning rate rises linearly from 0."""
    lr_decay: Literal["none", "linear", "cosine", "inverse_sqrt"] = "none"
    """How it falls: to 0 at the last step; or as 1 / sqrt(step / lr_decay_batches) (EDM2, 2312.02696 eq. 67), with a
    first step of rate 0 where lr_warmup is set."""
    lr_decay_batches: Positive | None = None
    """Steps from which inverse_sqrt falls: EDM2 70,000, at 64 px 35,000."""
    grad_clip: Positive | None = None
    """Largest norm of the gradient. null: not clipped."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic inside the network. auto: bf16 where GPU or CPU has it, else fp16 on a GPU and fp32 on a CPU; and fp32
    in the steps of a method that half precision would get wrong."""
    tf32: bool = False
    """Let a GPU round what float32 products read to TF32's 10 bits: faster, and too coarse for the last stages."""
    compile: bool | Literal["auto", "reduce-overhead"] = "auto"
    """torch.compile the network. auto: on a GPU. reduce-overhead: with CUDA graphs, for networks of small kernels."""
    init_from: PathText | None = None
    """A checkpoint whose EMA weights the run starts from."""
    log_every: Interval = 100
    """Steps, or a share of the run below 1, between entries in the curves."""
    save_every: Interval = 5000
    """Steps, or a share of the run below 1, between checkpoints."""
    keep: Count = 2
    """Newest checkpoints kept, beside last.ckpt."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written. The one before it stays good."""
    max_bad_steps: int = Field(100, ge=0)
    """Steps in a row with a non-finite loss or gradient after which the run stops and says where it began. 0: never."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project of Weights & Biases that gets the curves, grids and config too; needs `pip install wandb`. null: none."""


class Sample(Section):
    """Sample grids and few-step sampling."""

    every: Length = 0
    """Steps, or a share of the run below 1, between sample grids. 0: only at the end."""
    grid: int = Field(64, ge=1, le=1024)
    """Images in a grid."""
    sigmas: list[Positive] | None = Field(None, min_length=1)
    """Noise levels of few-step sampling, descending; `--steps S` takes the first S. null: sigma_max, then 0.821."""
    times: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(None, min_length=1)
    """Instead of sigmas, a flow map's times: 1 is noise, 0 data; `--steps S` takes the first S. null: even from 1."""
    solver: Literal["auto", "multistep", "heun", "jumps", "renoise"] = "auto"
    """heun for diffusion and flow models, multistep for consistency models; flow maps: jumps from time to time, or
    renoise, to the data and back with new noise. auto: the one of the method's paper."""
    guidance: NonNegative | None = None
    """w of classifier-free guidance in sampling, D_null + w (D - D_null) (2207.12598). null: none; of a network that is
    told it, the least that it knows (w_min of objective.guidance)."""
    interval: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(None, min_length=2, max_length=2)
    """[t_min, t_max] inside which a network that is told its guidance (imf) is guided. null: everywhere."""
    heun_steps: int = Field(18, ge=2)
    """Steps of the heun solver; evaluations are twice that less one."""


class Metrics(Section):
    """Scores."""

    features: Literal["inception", "classifier", "dinov2", "clip"] = "inception"
    """Features to compare: InceptionV3, DINOv2, CLIP, or a small classifier trained on the dataset's own labels."""
    weights: PathText | None = None
    """Local file with torch-fidelity's InceptionV3 or CLIP weights. null: downloaded."""
    reference: PathText | None = None
    """EDM's reference statistics (npz with mu and sigma) instead of the training set; inception only."""
    scores: list[Literal["fid", "kid", "isc", "prc"]] = Field(["fid"], min_length=1)
    """What to compute: Frechet distance, kernel distance, Inception score, precision and recall."""
    num: int = Field(50_000, ge=100)
    """Samples to score."""
    every: Length = 0
    """Steps, or a share of the run below 1, between scores; the best weights become best.ckpt. 0: only at the end."""
    at_end: bool = True
    """Score when training ends."""


# What a method asks of the network: (precond, c_noise) and, of flow maps, times.
CLOCKS = {"trigflow": ("trigflow", "t"), "sct": ("trigflow", "t"), "scd": ("trigflow", "t")}  # the others: edm, log
FLOW_MAPS = {"flow": "t", "meanflow": "t,t-r", "soflow": "t,t-r", "imf": "t-r"}


def tells_guidance(objective: Section) -> bool:
    """Whether a method tells the network the guidance that it learns: iMF's largest, or a pair."""
    guidance = getattr(objective, "guidance", None)
    return isinstance(guidance, list) or (objective.name == "imf" and guidance is not None)


class Config(Section):
    """Settings of main.py and generate.py. Every key has a default; config.yml shows them all."""

    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    network: SongUNet | DhariwalUNet | EDM2UNet | DiT | MLP | AutoencoderKL = Field(
        default_factory=SongUNet, discriminator="name"
    )
    objective: (
        EDM | CT | ICT | ECT | CD | TrigFlow | SCT | SCD | TCM | CMT | PD | Flow | MeanFlow | SoFlow | IMF | Autoencode
    ) = Field(default_factory=ECT, discriminator="name")
    ema: Ema = Field(default_factory=Ema)
    train: Train = Field(default_factory=Train)
    sample: Sample = Field(default_factory=Sample)
    metrics: Metrics = Field(default_factory=Metrics)

    @model_validator(mode="after")
    def _follow(self) -> "Config":
        """What the method asks of the network, where the network's settings leave it open (null)."""
        n, o = self.network, self.objective
        if n.name == "autoencoder":
            return self
        times = FLOW_MAPS.get(o.name)
        precond, c_noise = ("flow", "time") if times else CLOCKS.get(o.name, ("edm", "log"))
        if n.precond is not None:  # as before there was anything to follow
            c_noise = "time" if n.precond == "flow" else "log"
        asked = {
            "precond": precond, "c_noise": c_noise, "times": times, "heads": 2 if o.name == "imf" else 1,
            "guidance_inputs": tells_guidance(o),
        }  # fmt: skip
        self.network = n.model_copy(update={key: value for key, value in asked.items() if getattr(n, key) is None})
        pair = self.network.guidance_inputs and isinstance(getattr(o, "guidance", None), list)
        if pair and self.sample.guidance is None:
            self.sample = self.sample.model_copy(update={"guidance": float(o.guidance[0])})
        return self


def kinds(section: str) -> dict[str, type[Section]]:
    """The settings classes of a section by their `name`, where that chooses among several; else one, by the section."""
    annotation = Config.model_fields[section].annotation
    several = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(annotation)}
    return several or {section: annotation}


def is_text_setting(section: str, key: str) -> bool:
    """Whether section.key is a path or a name, which is taken as it is written."""
    among = kinds(section).values() if section in Config.model_fields else ()
    return any(is_text(kind.model_fields[key].annotation) for kind in among if key in kind.model_fields)


def json_schema() -> str:
    """JSON schema for editors: what config.schema.json holds."""
    return json.dumps(Config.model_json_schema(), indent=1) + "\n"
