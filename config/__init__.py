"""The settings of a run: their types, ranges and meaning, how they are read, and every message about a bad one."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
PathText = Annotated[str, AfterValidator(lambda text: path_text(text))]

MAX_TEXT = 1_000_000  # characters of a config file
NEEDS_PATH = ("imagenet9", "folder", "zip", "npz")  # datasets that data.path leads to


class ConfigError(ValueError):
    """Bad input from the user: its message is one line, and the commands exit with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunFailed(RuntimeError):
    """The machine or the numbers failed, not the user: its message is one line, and the commands exit with code 1."""


class Arguments(argparse.ArgumentParser):
    """A command line whose errors are one line too, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and exit with code 2."""
        print(f"{self.prog}: {printable(message)}; --help shows what there is", file=sys.stderr)
        sys.exit(2)


def path_text(text: str) -> str:
    """A text that a file system takes as a path; ValueError for others."""
    if "\0" in text or len(text) > 4000 or any(len(os.fsencode(part)) > 240 for part in text.split("/")):
        raise ValueError("a path has no NUL character and no name of over 240 bytes")
    return text


def machine_failure(error: OSError | MemoryError) -> str:
    """One line for what the machine refused."""
    if isinstance(error, MemoryError):
        return "the memory of this machine is full"
    return printable(f"{error.filename or 'a file'}: {error.strerror or error}")


def printable(text: str) -> str:
    """Text with every invisible character written out, so that a name with a line break or colour code stays tame."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Section(BaseModel):
    """A part of the config: no unknown key, no silent conversion; the text under a key is its description."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )


class Run(Section):
    """Where the run is kept, its seed and device."""

    name: PathText = Field("digits", pattern=r"^[\w.-]+$")
    """Name of the run; its folder is runs/<name> unless run.dir says otherwise."""
    dir: PathText | None = None
    """Folder of the run: config, checkpoints, samples, curves. null: runs/<name>."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: initial weights, data order, noise."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto (a GPU where there is one), cpu, cuda, cuda:N or mps."""

    @property
    def folder(self) -> Path:
        """dir, or runs/<name>."""
        return Path(self.dir) if self.dir else Path("runs") / self.name


class Data(Section):
    """What it learns."""

    name: Literal[
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet9", "folder", "zip", "npz"
    ] = "digits"  # fmt: skip
    """Dataset. digits come with scikit-learn; the next four are downloaded; those from imagenet9 on read data.path."""
    dir: PathText = "data"
    """Folder for downloads and caches."""
    path: PathText | None = None
    """A folder tree (folder), ImageNet's train folder (imagenet9), EDM's dataset (zip), images or vectors (npz)."""
    resolution: int | None = Field(None, ge=4, le=1024)
    """Side of the square images in pixels; others are resized and centre-cropped. null: the dataset's own."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB). null: the dataset's own."""
    conditional: bool = False
    """Train the network on class labels, so that it can be asked for a class; on conditions, where data are vectors."""
    flip: bool = False
    """Mirror half of the images. Not for digits or letters."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability p of each transformation of EDM's augmentation pipe (2206.00364 app. F.2). 0: off."""
    on_broken: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read."""
    workers: int = Field(2, ge=0, le=64)
    """Processes that decode images, for sets too large to be kept in memory."""
    memory_gb: NonNegative = 4.0
    """A set that decodes to less than this many GiB of uint8 is kept in memory, on the device where it fits."""
    bounds: Literal["clamp", "tanh"] | None = None
    """Keep sampled vectors between the npz's low and high: cut them off, or learn their atanh. null: not kept."""


class Network(Section):
    """What every network's settings share; names and defaults are EDM's (2206.00364)."""

    precond: Literal["edm", "cm", "trigflow"] = "edm"
    """edm (2206.00364 tab. 1), cm with D(x) = x at sigma_min (2303.01469 app. C), or trigflow (2410.11081 sec. 3)."""
    c_noise: Literal["log", "log250", "t"] = "log"
    """Noise label: ln(sigma)/4, 250 ln(sigma) as in OpenAI's models, or t = atan(sigma/sigma_data) as in sCM."""
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


class MLP(Network):
    """A residual MLP for vectors: data.name: npz with an array `vectors`."""

    name: Literal["mlp"]
    width: int = Field(256, ge=4, multiple_of=2)
    """Width of every layer."""
    depth: Count = 4
    """Residual blocks, of two layers each."""


class EDM(Section):
    """Denoising: trains a diffusion model, the teacher (Karras et al. 2022, 2206.00364)."""

    name: Literal["edm"]
    P_mean: float = -1.2
    """Mean of ln sigma."""
    P_std: Positive = 1.2
    """Standard deviation of ln sigma."""


class CT(Section):
    """Consistency training with an EMA target (Song et al. 2023, 2303.01469)."""

    name: Literal["ct"]
    metric: Literal["l1", "l2", "lpips", "pseudo_huber"] = "l2"
    """Distance d of the loss. lpips needs VGG16's weights."""
    lpips_weights: PathText | None = None
    """Local file with torchvision's VGG16 weights; null: downloaded."""
    huber_c: NonNegative | None = None
    """c of pseudo_huber. null: 0.00054 sqrt(d), d the elements of a sample."""
    s0: int = Field(2, ge=2)
    """Noise levels N at the start."""
    s1: int = Field(150, ge=2)
    """Noise levels at the end, less one."""
    mu0: float = Field(0.9, gt=0, lt=1)
    """Decay of the target network at the start. 0.9 is for 800,000 steps; in a few thousand that target lags too far
    behind, and samples stay grey: take 0.01 there."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "uniform"
    """Weight of the loss by the student's signal-to-noise ratio; the paper's is uniform."""


class ICT(Section):
    """Improved consistency training (Song & Dhariwal 2023, 2310.14189)."""

    name: Literal["ict"]
    huber_c: NonNegative | None = None
    """c of the pseudo-Huber distance. null: 0.00054 sqrt(d), d the elements of a sample."""
    s0: int = Field(10, ge=2)
    """Intervals N - 1 between noise levels at the start."""
    s1: int = Field(1280, ge=2)
    """Intervals at the end."""
    P_mean: float = -1.1
    """Mean of ln sigma of the pairs."""
    P_std: Positive = 2.0
    """Its standard deviation."""


class ECT(Section):
    """Easy consistency tuning (Geng et al. 2024, 2406.14548)."""

    name: Literal["ect"] = "ect"
    q: float = Field(2.0, gt=1)
    """The gap t - r shrinks by this factor per stage."""
    double_kimg: Positive | None = 3200.0
    """Length of a stage in thousands of images. null: one stage, held to the end."""
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    """n(t) in r = t (1 - n(t) / q^(stage+1)): 1 + 8 sigmoid(-t), or 1."""
    P_mean: float = -1.1
    """Mean of ln t."""
    P_std: Positive = 2.0
    """Its standard deviation."""
    huber_c: NonNegative = 0.0
    """c of the pseudo-Huber distance."""


class CD(Section):
    """Consistency distillation of a teacher (Song et al. 2023, 2303.01469)."""

    name: Literal["cd"]
    teacher: PathText
    """Checkpoint of the teacher, a diffusion model; the student starts from it unless train.init_from is set."""
    guidance: NonNegative | None = None
    """w of classifier-free guidance of the teacher, D_null + w (D - D_null). null: as it is."""
    N: int = Field(18, ge=2)
    """Noise levels in the grid."""
    mu: float = Field(0.0, ge=0, lt=1)
    """Decay of the target network. 0: the target is the student."""
    solver: Literal["heun", "euler"] = "heun"
    """Solver of the teacher's step to the next level."""
    metric: Literal["l1", "l2", "lpips", "pseudo_huber"] = "l2"
    """Distance d of the loss. lpips needs VGG16's weights."""
    lpips_weights: PathText | None = None
    """Local file with torchvision's VGG16 weights; null: downloaded."""
    huber_c: NonNegative | None = None
    """c of pseudo_huber. null: 0.00054 sqrt(d), d the elements of a sample."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "uniform"
    """Weight of the loss by the student's signal-to-noise ratio; the paper's is uniform."""


class TrigFlow(Section):
    """Diffusion training in TrigFlow's clock: the start of sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["trigflow"]
    P_mean: float = -1.0
    """Mean of ln sigma, sigma = sigma_data tan(t)."""
    P_std: Positive = 1.4
    """Its standard deviation."""


class SCT(Section):
    """Continuous-time consistency training, sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["sct"]
    P_mean: float = -1.0
    """Mean of ln sigma, sigma = sigma_data tan(t)."""
    P_std: Positive = 1.4
    """Its standard deviation."""
    warmup: int = Field(10_000, ge=0)
    """H: steps over which the tangent's second half grows in."""
    c: Positive = 0.1
    """The tangent is normalised as g / (|g| + c), |g| the L2 norm of the whole sample."""


class SCD(SCT):
    """Continuous-time consistency distillation, sCM (Lu & Song 2024, 2410.11081)."""

    name: Literal["scd"]
    teacher: PathText
    """Checkpoint of the teacher, a diffusion model; the student starts from it unless train.init_from is set."""
    guidance: NonNegative | None = None
    """w of classifier-free guidance of the teacher, D_null + w (D - D_null). null: as it is."""


class TCM(Section):
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


class CMT(Section):
    """Mid-training on the teacher's trajectories, before ECT (Hu et al. 2025, 2509.24526)."""

    name: Literal["cmt"]
    teacher: PathText
    """Checkpoint of the teacher, a diffusion model; the student starts from it unless train.init_from is set."""
    steps: int = Field(16, ge=2)
    """Points of a trajectory: steps of DPM-Solver++(2M), even in ln sigma. Divides the images of a pass."""
    metric: Literal["l1", "l2", "lpips", "pseudo_huber"] = "l2"
    """Distance to the trajectory's end. lpips, the paper's, needs VGG16's weights; images are not resized for it."""
    lpips_weights: PathText | None = None
    """Local file with torchvision's VGG16 weights; null: downloaded."""
    huber_c: NonNegative | None = None
    """c of pseudo_huber. null: 0.00054 sqrt(d), d the elements of a sample."""


class PD(Section):
    """Progressive distillation, the baseline (Salimans & Ho 2022, 2202.00512)."""

    name: Literal["pd"]
    teacher: PathText
    """Checkpoint of the teacher, a diffusion model; the student starts from it unless train.init_from is set."""
    N: int = Field(512, ge=2)
    """Intervals of the student's first grid, a power of two; halved to 1 in equal parts of the run."""
    weighting: Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"] = "truncated-snr"
    """Weight of the loss by the signal-to-noise ratio; the paper's is truncated-snr."""


class Ema(Section):
    """The averaged weights that are sampled."""

    decay: list[Share] | None = Field([0.9999], min_length=1)
    """Decay per step, one entry for each average kept; the first is sampled and scored."""
    half_life_kimg: list[Positive] | None = Field(None, min_length=1)
    """Instead of decay: half-lives in thousands of images."""
    warmup: NonNegative = 0.05
    """The half-life is at most this share of the steps so far (2206.00364 app. F). 0: off."""


class Train(Section):
    """The optimizer and the loop."""

    steps: Count = 400_000
    """Optimizer steps."""
    batch_size: Count = 128
    """Images per step over all devices."""
    microbatch: Count | Literal["auto"] | None = None
    """Images per pass on one device; gradients accumulate to batch_size. auto: what a GPU holds. null: all at once."""
    checkpointing: bool = False
    """Compute each residual block again in the backward pass instead of keeping it: less memory, a third more time."""
    optimizer: Literal["radam", "adam", "adamw"] = "radam"
    """RAdam in the papers on consistency models, Adam for EDM."""
    lr: Positive = 1e-4
    """Learning rate at its peak."""
    betas: list[Share] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay of the optimizer's first and second moments."""
    lr_warmup: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    """How it falls to 0 at the last step."""
    grad_clip: Positive | None = None
    """Largest norm of the gradient. null: not clipped."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic inside the network. auto: bf16 where GPU or CPU has it, else fp16 on a GPU and fp32 on a CPU."""
    compile: bool | Literal["auto", "reduce-overhead"] = "auto"
    """torch.compile the network. auto: on a GPU. reduce-overhead: with CUDA graphs, for networks of small kernels."""
    init_from: PathText | None = None
    """A checkpoint whose EMA weights the run starts from."""
    log_every: Count = 100
    """Steps between entries in the curves."""
    save_every: Count = 5000
    """Steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints kept, beside last.ckpt."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written. The one before it stays good."""
    max_bad_steps: int = Field(100, ge=0)
    """Steps in a row with a non-finite loss or gradient after which the run stops and says where it began. 0: never."""


class Sample(Section):
    """Sample grids and few-step sampling."""

    every: int = Field(0, ge=0)
    """Steps between sample grids. 0: only at the end."""
    grid: int = Field(64, ge=1, le=1024)
    """Images in a grid."""
    sigmas: list[Positive] | None = Field(None, min_length=1)
    """Noise levels of few-step sampling, descending; `--steps S` takes the first S. null: sigma_max, then 0.821."""
    solver: Literal["auto", "multistep", "heun"] = "auto"
    """auto: heun for diffusion models (edm, trigflow), multistep for consistency models."""
    guidance: NonNegative | None = None
    """w of classifier-free guidance in sampling, D_null + w (D - D_null) (2207.12598). null: none."""
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
    every: int = Field(0, ge=0)
    """Steps between scores in training; the best weights are kept as best.ckpt. 0: only at the end."""
    at_end: bool = True
    """Score when training ends."""


class Config(Section):
    """Settings of main.py and generate.py. Every key has a default; config.yml shows them all."""

    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    network: Annotated[SongUNet | DhariwalUNet | MLP, Field(discriminator="name")] = Field(default_factory=SongUNet)
    objective: Annotated[
        EDM | CT | ICT | ECT | CD | TrigFlow | SCT | SCD | TCM | CMT | PD, Field(discriminator="name")
    ] = Field(default_factory=ECT)
    ema: Ema = Field(default_factory=Ema)
    train: Train = Field(default_factory=Train)
    sample: Sample = Field(default_factory=Sample)
    metrics: Metrics = Field(default_factory=Metrics)


# Reading --------------------------------------------------------------------------------------------------------------


DEFAULT_NAMES = {"network": "song_unet", "objective": "ect"}


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 reads a string) and refuses a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # a few lines of them unfold to more than any memory
            raise yaml.composer.ComposerError(
                None, None, "references (*name) are not read here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$"), list("-+0123456789")
)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The checked config in the file `path`, after `section.key=value` overrides.

    Raises ConfigError: one line with the file, the key, what is wrong and the nearest right name.
    """
    raw, lines = _read_yaml(Path(path))
    where = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply(raw, override, where)
    return parse(raw, lambda key: where.get(key, str(path)))


def parse(raw: dict[str, Any], place: Callable[[str], str] = lambda key: "config") -> Config:
    """A checked config from nested dictionaries; `place(key)` says in messages where a key was set."""
    for section, name in DEFAULT_NAMES.items():
        if isinstance(raw.get(section), dict):
            raw = {**raw, section: {"name": name, **raw[section]}}
    if isinstance(raw.get("ema"), dict) and raw["ema"].get("half_life_kimg") is not None:
        raw = {**raw, "ema": {"decay": None, **raw["ema"]}}  # the default decay gives way
    try:
        cfg = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, place)) from None
    _check_together(cfg, place)
    return cfg


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's content, and the line of each section.key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"it is longer than {MAX_TEXT:,} characters")
        raw = yaml.load(text, _Loader)
        node = yaml.compose(text, _Loader)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: there is no such file; try config.yml or one of configs/*.yml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is no text file in UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_one_line(getattr(error, 'problem', error))}") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', found {type(raw).__name__}")
    lines = {}
    for section, values in node.value:
        lines[str(section.value)] = section.start_mark.line + 1
        if isinstance(values, yaml.MappingNode):
            for key, _ in values.value:
                lines[f"{section.value}.{key.value}"] = key.start_mark.line + 1
    return raw, lines


def _apply(raw: dict[str, Any], override: str, where: dict[str, str]) -> None:
    """Set one `section.key=value` from the command line in `raw`."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, re.DOTALL)
    if not match:
        raise ConfigError(f"command line: {override!r} is no setting; write section.key=value, as train.lr=1e-3")
    section, key, text = match.groups()
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"command line: {section}.{key}: {text!r} is not valid YAML ({_one_line(error)})") from None
    content = raw.setdefault(section, {})
    if content is None:
        content = raw[section] = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where.get(section, 'config')}: {section}: expected keys and values below it")
    if key == "name" and section in ("network", "objective"):
        _change_name(section, content, value)
    content[key] = value
    where[f"{section}.{key}"] = "command line"


def _change_name(section: str, content: dict[str, Any], name: Any) -> None:
    """Another name from the command line: an objective starts from its own defaults (a P_mean for ECT is none for EDM),
    a network keeps the settings that both kinds know."""
    old, new = (
        next((k for k in _kinds(section) if n in get_args(k.model_fields["name"].annotation)), None)
        for n in (content.get("name", DEFAULT_NAMES[section]), name)
    )
    if old and new and old is not new:
        kept = set(new.model_fields) if section == "network" else {"teacher"} & set(new.model_fields)
        for key in [k for k in content if k in old.model_fields and k not in kept]:
            del content[key]


def _kinds(section: str) -> tuple[type[BaseModel], ...]:
    """The settings classes of a section: several where its `name` chooses among them."""
    annotation = Config.model_fields[section].annotation
    return get_args(annotation) or (annotation,)


# Messages -------------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, place) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    # A union's error names the member (network.song_unet.x): users write network.x.
    loc = [str(part) for part in first["loc"]]
    if len(loc) > 1 and loc[0] in ("network", "objective") and loc[1] in _names(loc[0]):
        del loc[1]
    if first["type"] == "union_tag_invalid":
        loc.append("name")
    key, value = ".".join(loc), first["input"]
    message = f"{place('.'.join(loc[:2]))}: {key}: "
    if first["type"] == "extra_forbidden":
        return message + "there is no such setting" + _nearest(loc, error)
    if first["type"] == "union_tag_invalid":
        name = str(value.get("name") if isinstance(value, dict) else value)
        return message + f"there is no {name!r}{_did_you_mean(name, _names(loc[0]))}"
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"]
        guess = _did_you_mean(str(value), re.findall(r"'([^']+)'", allowed))
        return message + f"{_short(value)} is not one of {allowed}{guess if 'did you' in guess else ''}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return message + f"expected keys and values below it, found {_short(value)}"
    what = first["msg"][0].lower() + first["msg"][1:]
    return message + f"{what}, found {_short(value)}"


def _names(section: str) -> list[str]:
    return [get_args(kind.model_fields["name"].annotation)[0] for kind in _kinds(section)]


def _nearest(loc: list[str], error: ValidationError) -> str:
    """A hint for an unknown key: the nearest of its section, or the same name in another section."""
    if len(loc) == 1:
        return _did_you_mean(loc[0], list(Config.model_fields))
    section, key = loc[0], loc[1]
    fields = {f for kind in _kinds(section) for f in kind.model_fields}
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if key in fields:
        owners = [n for n, kind in zip(_names(section), _kinds(section), strict=True) if key in kind.model_fields]
        return f" for this {section}.name (it belongs to {', '.join(owners)})"
    if near:
        return f"; did you mean {section}.{near[0]}?"
    for other in Config.model_fields:
        if any(key in kind.model_fields for kind in _kinds(other)):
            return f"; did you mean {other}.{key}?"
    return f"; {section} has: {', '.join(sorted(fields))}"


def _did_you_mean(word: str, choices: list[str]) -> str:
    swapped = [choice for choice in choices if sorted(choice) == sorted(word)]  # itc is ict before it is tcm
    near = swapped or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(choices)}"


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _check_together(cfg: Config, place) -> None:
    """Settings that are right alone and wrong together."""
    d, n, o, t = cfg.data, cfg.network, cfg.objective, cfg.train
    images = t.microbatch if isinstance(t.microbatch, int) else t.batch_size  # of a pass
    rules = [
        (n.name == "mlp" and d.name != "npz", "network.name", "mlp makes vectors; set data.name: npz and data.path"),
        (
            n.name == "mlp" and getattr(o, "metric", "") == "lpips",
            "objective.metric",
            "lpips compares images, not vectors",
        ),
        (
            d.bounds is not None and n.name != "mlp",
            "data.bounds",
            "is for vectors; set network.name: mlp",
        ),
        (n.sigma_min >= n.sigma_max, "network.sigma_min", f"must be below network.sigma_max ({n.sigma_max})"),
        (
            d.name in NEEDS_PATH and d.path is None,
            "data.path",
            f"data.name: {d.name} needs the path of your images",
        ),
        (
            d.name not in NEEDS_PATH and d.path is not None,
            "data.path",
            f"data.name: {d.name} takes no path; for your own images set data.name to folder, zip or npz",
        ),
        (
            d.flip and d.augment > 0,
            "data.flip",
            "data.augment mirrors half of the images already, and tells the network; set data.flip: false",
        ),
        (
            getattr(n, "label_dropout", 0) > 0 and not d.conditional,
            "network.label_dropout",
            "there are no labels to drop; set data.conditional: true",
        ),
        (
            t.batch_size % images != 0,
            "train.microbatch",
            f"must divide train.batch_size ({t.batch_size})",
        ),
        (
            getattr(n, "pixel_norm", False) and not n.scale_shift_norm,
            "network.pixel_norm",
            "normalises AdaGN; set scale_shift_norm: true",
        ),
        (
            cfg.sample.guidance is not None and getattr(n, "label_dropout", 0) == 0,
            "sample.guidance",
            "needs a network that knows the null label: data.conditional: true and network.label_dropout above 0",
        ),
        (t.lr_warmup >= t.steps, "train.lr_warmup", f"must be below train.steps ({t.steps})"),
        (
            o.name in ("edm", "trigflow") and n.precond == "cm",
            "network.precond",
            f"objective {o.name} trains a denoiser, and its loss weight is made for edm and trigflow",
        ),
        (
            o.name in ("sct", "scd") and n.precond != "trigflow",
            "network.precond",
            f"objective {o.name} needs trigflow",
        ),
        (
            getattr(o, "guidance", None) is not None and (not d.conditional or n.name == "mlp"),
            "objective.guidance",
            "guides by class labels; it needs images and data.conditional: true",
        ),
        (o.name == "pd" and o.N & (o.N - 1) != 0, "objective.N", "must be a power of two"),
        (
            o.name == "tcm" and not n.sigma_min < o.t_prime < n.sigma_max,
            "objective.t_prime",
            f"must lie between network.sigma_min ({n.sigma_min}) and sigma_max ({n.sigma_max})",
        ),
        (
            o.name == "cmt" and images % o.steps != 0,
            "objective.steps",
            f"must divide the images of a pass ({images})",
        ),
        (o.name in ("ct", "ict") and o.s1 < o.s0, "objective.s1", f"must be at least objective.s0 ({o.name})"),
        (
            getattr(o, "lpips_weights", None) is not None and o.metric != "lpips",
            "objective.lpips_weights",
            f"is for objective.metric: lpips, and the metric is {getattr(o, 'metric', '')}",
        ),
        (
            (cfg.ema.decay is None) == (cfg.ema.half_life_kimg is None),
            "ema.half_life_kimg",
            "give either this or ema.decay, and null for the other",
        ),
        (
            any(a <= b for a, b in itertools.pairwise(cfg.sample.sigmas or [])),
            "sample.sigmas",
            "must descend",
        ),
        (
            max(cfg.sample.sigmas or [0]) > n.sigma_max,
            "sample.sigmas",
            f"starts above network.sigma_max ({n.sigma_max}), which the network never saw",
        ),
        (
            cfg.metrics.reference is not None and cfg.metrics.scores != ["fid"],
            "metrics.scores",
            "metrics.reference has the statistics of a FID alone; set metrics.scores: [fid]",
        ),
        (
            cfg.metrics.reference is not None and cfg.metrics.features != "inception",
            "metrics.reference",
            "holds Inception statistics; set metrics.features: inception",
        ),
        (
            cfg.metrics.features != "inception" and "isc" in cfg.metrics.scores,
            "metrics.scores",
            "isc is defined on Inception's classes; set metrics.features: inception",
        ),
    ]
    for broken, key, message in rules:
        if broken:
            raise ConfigError(f"{place(key)}: {key}: {message}")


# Writing --------------------------------------------------------------------------------------------------------------


def dump(cfg: Config) -> str:
    """The whole config as YAML, readable by load."""
    sections = json.loads(cfg.model_dump_json())
    for section, values in sections.items():
        if "name" in values:
            sections[section] = {"name": values.pop("name"), **values}
    return yaml.safe_dump(sections, sort_keys=False, default_flow_style=None)


def json_schema() -> str:
    """JSON schema for editors: what config.schema.json holds."""
    return json.dumps(Config.model_json_schema(), indent=1) + "\n"


def first_difference(a: BaseModel, b: BaseModel, ignore: frozenset[str] = frozenset()) -> str | None:
    """The first section.key in which two configs differ, with both values; None where they agree."""
    left, right = a.model_dump(), b.model_dump()
    for section in left:
        for key in {**left[section], **right[section]}:
            name = f"{section}.{key}"
            if name not in ignore and left[section].get(key) != right[section].get(key):
                return f"{name} is {left[section].get(key)!r} there and {right[section].get(key)!r} here"
    return None


if __name__ == "__main__":  # python config.py > config.schema.json
    print(json_schema(), end="")
