"""Between data and what the model sees: pixels, vectors, latents and their scaling, and what they are told.

    model.codec = dataset.codec(cfg)
    x, conditions = model.codec.to_model(*dataset.read(indices), draws)
    samples = model.codec.from_model(multistep(model, z, sigmas, noise_at, **model.codec.told(given, z)))

A codec moves with its model, but is no part of its weights: `state()` goes into the checkpoint apart, and
`codec_from` makes it again. What a new kind of data needs is one class here; nothing behind it asks for the kind.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import one_hot

from config import ConfigError
from objectives.draws import Draws
from sources.augment import augment, flip

DECODED = 2**20  # pixels that an autoencoder makes at a time: 16 images of 256 pixels
SQUASHED = 0.999  # tanh reaches its bounds only at infinity: data nearer than this to them are moved here


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 0..255 to `dtype` in [-1, 1]: x / 127.5 - 1. Any shape."""
    return (images.to(torch.float32) / 127.5 - 1).to(dtype)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 0..255, rounded and clamped: the inverse of `to_float`, exact for all 256 values."""
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ImageCodec(torch.nn.Module):
    """uint8 images (B, C, R, R) to [-1, 1] and back; int64 classes (B,) to one-hot labels."""

    kind = "images"

    def __init__(
        self,
        resolution: int,  # pixels per side
        channels: int,
        label_dim: int = 0,  # classes that the network is told; 0: none
        augment_dim: int = 0,  # augmentation labels that the network takes, whether or not images are augmented
        class_counts: list[int] | None = None,  # training images of each class, where there are labels
        flip: bool = False,  # mirror half of a training batch
        augment: float = 0.0,  # probability of each transformation of a training batch
        classes: list[str] | None = None,  # the names of the classes that the network is told
        facts: dict[str, Any] | None = None,  # what it is trained on: facts.identity
        upright: bool = False,  # whether augmentation leaves out rotation and the mirror upside down
    ):
        super().__init__()
        sizes = {"resolution": resolution, "channels": channels, "label_dim": label_dim, "augment_dim": augment_dim}
        self.network_shape: dict[str, Any] = sizes
        self.class_counts, self.flip, self.augment = class_counts, flip, augment
        self.classes, self.facts, self.upright = classes, facts, upright

    def state(self) -> dict[str, Any]:
        """What makes the same codec again, in plain numbers, strings and lists."""
        known = {"classes": self.classes, "data": self.facts}
        return {"shape": self.network_shape, "class_counts": self.class_counts, "scaling": None, **known}

    def to_model(
        self, values: torch.Tensor, given: torch.Tensor | None, draws: Draws, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A training batch, on its device: x (B, C, R, R) of `dtype`, flipped and augmented by `draws`; its labels."""
        if self.flip:
            values = flip(values, draws.integers(2, (len(values),)).bool())
        x = to_float(values, dtype)
        # Tensor cores read channels_last; a CPU's group norm is slower in it.
        x = x.contiguous(memory_format=torch.channels_last if x.is_cuda else torch.contiguous_format)
        conditions = self.told(given, x)
        if self.augment:
            x, conditions["augment_labels"] = augment(x, self.augment, draws, self.upright)
        return x, conditions

    def told(self, given: torch.Tensor | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"class_labels": one-hot (B, label_dim)} of classes (B,), as x is; {} without classes."""
        if given is None or not self.network_shape["label_dim"]:
            return {}
        given = given.to(x.device, non_blocking=True)
        return {"class_labels": one_hot(given, self.network_shape["label_dim"]).to(x.dtype)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image."""
        side = self.network_shape["resolution"]
        return self.network_shape["channels"], side, side

    encode = decode = staticmethod(torch.positive)  # the model sees the pixels themselves, in [-1, 1]
    from_model = staticmethod(to_uint8)  # what the model gives -> uint8 images


class VectorCodec(torch.nn.Module):
    """Normalises vectors to mean 0 and standard deviation sigma_data in every element, conditions to 0 and 1, and back.

    bounds: how samples are kept between `low` and `high`: "clamp" cuts them off; "tanh" has the model learn
    atanh of the data, so that every sample is inside and none is cut; None: they may leave.
    """

    kind = "vectors"
    class_counts = classes = None
    facts: dict[str, Any] | None = None  # what the model is trained on: facts.identity

    def __init__(self, sigma_data: float, bounds: str | None = None, **tensors: Any):
        """tensors: mean, std, condition_mean, condition_std, low, high; numbers in any container, or None."""
        super().__init__()
        self.sigma_data, self.bounds = sigma_data, bounds
        for name in ("mean", "std", "condition_mean", "condition_std", "low", "high"):
            given = tensors.get(name)
            tensor = None if given is None else torch.as_tensor(given, dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def fit(
        cls,
        values: torch.Tensor,  # float32 (N, *shape)
        conditions: torch.Tensor | None = None,  # float32 (N, K)
        sigma_data: float = 0.5,
        bounds: str | None = None,
        low: torch.Tensor | None = None,  # float32 (*shape), for bounds
        high: torch.Tensor | None = None,
    ) -> "VectorCodec":
        """The normalisation of a training set. An element that never changes comes back as it was in every sample."""
        codec = cls(sigma_data, bounds, **({"low": low, "high": high} if bounds else {}))
        for name, part in (("", codec.open(values)), ("condition_", conditions)):
            if part is not None:
                std, mean = torch.std_mean(part.double(), dim=0, correction=0)
                std[std < 1e-6 * mean.abs()] = 0
                setattr(codec, f"{name}mean", mean.float())
                setattr(codec, f"{name}std", std.float())
        return codec

    @property
    def network_shape(self) -> dict[str, Any]:
        """What networks.build needs: the shape of one vector, and K, 0 without conditions."""
        conditions = 0 if self.condition_mean is None else len(self.condition_mean)
        return {"shape": tuple(self.mean.shape), "condition_dim": conditions}

    def state(self) -> dict[str, Any]:
        """What makes the same codec again, in plain numbers and lists."""
        tensors = {name: None if b is None else b.tolist() for name, b in self._buffers.items()}
        scaling = {"sigma_data": self.sigma_data, "bounds": self.bounds, **tensors}
        known = {"classes": None, "data": self.facts}
        return {"shape": self.network_shape, "class_counts": None, "scaling": scaling, **known}

    def to_model(
        self, values: torch.Tensor, given: torch.Tensor | None, draws: Draws, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A training batch, on its device: x (B, *shape) of `dtype` and conditions, normalised. Nothing is drawn."""
        x = self.normalise(values.to(dtype))
        return x, self.told(None if given is None else given.to(dtype), x)

    def told(self, given: torch.Tensor | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"condition": what the model sees of conditions (B, K) in their own units}, where x is; {} without."""
        return {} if given is None else {"condition": self.condition(given.to(x.device))}

    def normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Data (B, *shape) in their own units -> what the model sees; in their dtype."""
        return (self.open(values) - self.mean) / self.std.where(self.std != 0, 1) * self.sigma_data

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """What the model gives (B, *shape) -> data in their own units, inside the bounds: the inverse."""
        values = x / self.sigma_data * self.std + self.mean
        if self.bounds == "tanh":
            values = (self.low + self.high) / 2 + (self.high - self.low) / 2 * values.tanh()
        # tanh rounds too
        return values if self.bounds is None else torch.maximum(torch.minimum(values, self.high), self.low)

    from_model = restore  # what the model gives -> vectors in their own units

    def condition(self, conditions: torch.Tensor) -> torch.Tensor:
        """Conditions (B, K) in their own units -> what the model sees: mean 0, standard deviation 1."""
        return (conditions - self.condition_mean) / self.condition_std.where(self.condition_std != 0, 1)

    def open(self, values: torch.Tensor) -> torch.Tensor:
        """atanh of the values' place between the bounds, for bounds "tanh"; else the values."""
        if self.bounds != "tanh":
            return values
        place = (2 * values - self.low - self.high) / (self.high - self.low)
        return place.clamp(-SQUASHED, SQUASHED).atanh()


def as_input(x: torch.Tensor, input_range: str | None) -> torch.Tensor:
    """What an autoencoder takes of images in [-1, 1]: them, or in [0, 1] where its input_range is "0,1"."""
    return (x + 1) / 2 if input_range == "0,1" else x


class LatentCodec(torch.nn.Module):
    """Latents of a frozen autoencoder to what the model sees, z scale + bias in each channel, and to uint8 images.

    A training batch is drawn from the latents' own spread where it is kept: z = mean + std n. The autoencoder is no
    part of the codec: `attach` gives it, where pixels are wanted.
    """

    kind = "latents"

    def __init__(
        self,
        resolution: int,  # of the latent
        channels: int,
        label_dim: int = 0,  # classes that the network is told; 0: none
        augment_dim: int = 0,  # 0, as latents are not augmented
        *,
        scale: list[float],  # a number a channel
        bias: list[float],
        autoencoder: dict[str, Any],  # source, hash, input_range, factor, image_channels; None where it is not known
        flip: bool = False,  # whether values hold the mirrored images' latents too, and half of a batch takes those
        class_counts: list[int] | None = None,
        classes: list[str] | None = None,
        facts: dict[str, Any] | None = None,
    ):
        super().__init__()
        sizes = {"resolution": resolution, "channels": channels, "label_dim": label_dim, "augment_dim": augment_dim}
        self.network_shape: dict[str, Any] = sizes
        self.autoencoder, self.flip, self.class_counts = autoencoder, flip, class_counts
        self.classes, self.facts = classes, facts
        for name, numbers in (("scale", scale), ("bias", bias)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.encoder: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
        self.decoder: Callable[[torch.Tensor], torch.Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """What makes the same codec again, in plain numbers, strings and lists."""
        scaling = {"scale": self.scale.flatten().tolist(), "bias": self.bias.flatten().tolist()}
        known = {"classes": self.classes, "data": self.facts, "autoencoder": self.autoencoder}
        return {"shape": self.network_shape, "class_counts": self.class_counts, "scaling": scaling, **known}

    def to_model(
        self, values: torch.Tensor, given: torch.Tensor | None, draws: Draws, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A training batch, on its device: x (B, c, r, r) of `dtype`, drawn by `draws`; its labels.

        values: (B, p c, r, r), the means, then the deviations where they are kept; with flip the same of the mirrored.
        """
        if self.flip:
            plain, mirrored = values.chunk(2, dim=1)
            values = mirrored.where(draws.integers(2, (len(values),)).bool()[:, None, None, None], plain)
        z, *std = values.to(dtype).split(self.network_shape["channels"], dim=1)
        if std:
            z = z + std[0] * draws.normal(z.shape, dtype)
        x = z * self.scale.to(dtype) + self.bias.to(dtype)
        x = x.contiguous(memory_format=torch.channels_last if x.is_cuda else torch.contiguous_format)
        return x, self.told(given, x)

    told = ImageCodec.told

    def attach(self, autoencoder: Any, where: str) -> None:
        """Take the autoencoder, a networks.Autoencoder with its `source` and `hash`, for `encode` and `decode`.

        where: the setting or file that named it. Raises ConfigError where it is not the one of these latents.
        """
        known, channels = self.autoencoder, self.network_shape["channels"]
        here = {name: getattr(autoencoder, name) for name in ("hash", "factor", "image_channels")}
        if autoencoder.channels != channels:
            has = f"makes latents of {autoencoder.channels} channels, and these have {channels}"
            raise ConfigError(f"{where}: {autoencoder.source} {has}; give the one that made them")
        for name, words in (("hash", "weights' SHA-256"), ("factor", "factor"), ("image_channels", "image channels")):
            if known.get(name) not in (None, here[name]):
                a, b = (str(value)[:16] for value in (here[name], known[name]))
                what = f"is not the autoencoder of these latents: its {words} is {a}, and theirs is {b}"
                raise ConfigError(f"{where}: {autoencoder.source} {what}; give {known.get('source') or 'that one'}")
        self.autoencoder = {**known, **here, "source": autoencoder.source}
        self.encoder, self.decoder = autoencoder.encode, autoencoder.decode  # no modules of this one

    def remember(self, autoencoder: dict[str, Any]) -> None:
        """Take from a checkpoint what the latents' file does not say of their autoencoder."""
        self.autoencoder = {**autoencoder, **{name: v for name, v in self.autoencoder.items() if v is not None}}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image, once the autoencoder is attached."""
        side = self.network_shape["resolution"] * self.autoencoder["factor"]
        return self.autoencoder["image_channels"], side, side

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, R, R) in [-1, 1] -> what the model sees of their latents' means (B, c, r, r)."""
        if self.encoder is None:
            raise RuntimeError("the codec has no autoencoder; sampling.decoding.attach gives it one")
        x = as_input(x, self.autoencoder["input_range"])
        mean = torch.cat([self.encoder(part)[0] for part in x.split(self._together())])
        return mean * self.scale + self.bias

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What the model gives (B, c, r, r) -> images (B, C, R, R), about [-1, 1]."""
        if self.decoder is None:
            raise RuntimeError("the codec has no autoencoder; sampling.decoding.attach gives it one")
        z = (x.float() - self.bias) / self.scale
        y = torch.cat([self.decoder(part) for part in z.split(self._together())])
        return 2 * y - 1 if self.autoencoder["input_range"] == "0,1" else y

    def from_model(self, x: torch.Tensor) -> torch.Tensor:
        """What the model gives -> uint8 images (B, C, R, R)."""
        return to_uint8(self.decode(x))

    def _together(self) -> int:
        return max(1, DECODED // self.image_shape[1] ** 2)


def codec_from(data: dict[str, Any]) -> ImageCodec | VectorCodec | LatentCodec:
    """The codec of `state()`, for sampling: it neither flips nor augments. Errors are those of a wrong argument."""
    scaling, autoencoder = data.get("scaling"), data.get("autoencoder")
    if scaling and autoencoder is None:
        codec = VectorCodec(**scaling)
        codec.facts = data.get("data")
        return codec
    known = {"classes": data.get("classes"), "facts": data.get("data")}  # which older checkpoints lack
    if scaling:
        return LatentCodec(
            **data["shape"], **scaling, autoencoder=autoencoder, class_counts=data["class_counts"], **known
        )
    return ImageCodec(**data["shape"], class_counts=data["class_counts"], **known)
