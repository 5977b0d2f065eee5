"""What a sample of each kind is asked for, written as, read as, shown as and scored by.

    samples = samples_of(model.codec)
    given = samples.given_for_grid(dataset, seed, count)
    path, picture = samples.write_grid(drawing.draw(0, count), given, folder / "step-1")

A new kind of data is one class here: the commands and the trainer ask the two for the same things.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
from checkpoints.disk import write_atomically
from config import Config, ConfigError
from metrics import distance, pictures, scores
from metrics.common import progress
from sampling import choices, decoding, shards
from sampling.drawing import Drawing, Stream
from sources import vectors
from sources.codecs import ImageCodec, LatentCodec, VectorCodec
from sources.images import ImageSet, fit_channels
from sources.latents import LatentSet
from sources.vectors import VectorSet

GRID = 400  # most samples in a grid
Given = torch.Tensor | None  # what each sample is asked for


@dataclass
class ImageSamples:
    """Samples that are uint8 images (N, C, H, W), each asked for by its class, int64 (N,), or by nothing."""

    codec: ImageCodec | LatentCodec

    # What generate.py asks; args: its options ----

    def asked(self, args: argparse.Namespace, cfg: Config, training_set: Callable[[], Any]) -> tuple[int, Given, str]:
        """How many samples, what each is asked for, and what they are kept as: "png", "npz" or "grid", one picture.

        Raises ConfigError for options of another kind.
        """
        choices.refuse(args, ["conditions"], "is for models of vectors; --class asks an image model for a class")
        usual = cfg.metrics.num if args.calc_fid or args.sweep else 64
        num = args.num or (min(cfg.metrics.num, 5000) if args.search else usual)
        format = args.format or ("npz" if args.calc_fid or num > GRID else "grid")
        return num, choices.chosen_labels(args, num, self.codec), format

    def needs_set(self, args: argparse.Namespace, cfg: Config) -> bool:
        """Whether the training set is needed; not where metrics.reference holds all that is asked for."""
        scored = args.calc_fid or args.search or args.sweep
        return bool(args.nearest or (scored and cfg.metrics.reference is None))

    def training_set(self, cfg: Config) -> ImageSet:
        """The config's dataset. Raises ConfigError where it is not like the model's."""
        dataset = data.load(cfg.data)
        if dataset.shape != self.codec.image_shape:
            a, b = ("x".join(map(str, shape)) for shape in (dataset.shape, self.codec.image_shape))
            raise ConfigError(f"data: is {a} and the checkpoint's {b}")
        return dataset

    def said(self, drawing: Drawing, out: Path, where: str) -> str:
        """What was drawn, how fast, and where it lies."""
        return f"{drawing.told('samples')}: {drawing.speed()} on {where}\nwritten: {out}"

    # On disk ----

    def given_for_grid(self, dataset: ImageSet, seed: int, count: int) -> Given:
        """The classes in turn, int64 (count,), for `write_grid`; None without."""
        classes = self.classes_shown()
        return torch.tensor(classes)[torch.arange(count) % len(classes)] if classes else None

    def classes_shown(self) -> list[int]:
        """The classes that the network has seen images of: a column of a grid each."""
        counts = self.codec.class_counts or [1] * self.codec.network_shape["label_dim"]
        return [number for number, images in enumerate(counts) if images]

    def write_grid(self, samples: torch.Tensor, given: Given, path: Path) -> tuple[Path, torch.Tensor | None]:
        """Write a grid, a column for each of up to 20 classes; (its path, the picture, uint8 (3, H, W))."""
        classes = 0 if given is None else len(self.classes_shown())
        picture = pictures.grid(samples, classes if 1 < classes <= 20 else None)
        pictures.write_png(picture, path.with_suffix(".png"))
        return path.with_suffix(".png"), picture

    def write(self, samples: torch.Tensor, given: Given, start: int, path: Path) -> None:
        """Write the shard of the samples from `start` on, an npz or a folder of PNG files; whole or not at all."""
        if path.suffix == ".npz":
            arrays = {"images": samples.permute(0, 2, 3, 1).numpy()}
            arrays |= {} if given is None else {"labels": given.numpy()}
            write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
            return
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
        part.mkdir(parents=True)
        for i, image in enumerate(samples, start):
            pictures.to_pil(image).save(part / f"{i:06d}.png")
        part.rename(path)

    def write_labels(self, drawing: Drawing, out: Path, format: str) -> None:
        """The classes of single images as EDM's dataset.json: the folder `samples` is a dataset, and so is its zip."""
        if format != "png" or drawing.given is None:
            return
        folders = (shards.path(out, i - i % shards.SHARD, format).name for i in range(drawing.num))
        labels = [[f"{folder}/{i:06d}.png", int(drawing.given[i])] for i, folder in enumerate(folders)]
        content = json.dumps({"labels": labels}).encode()
        write_atomically(out / "samples" / "dataset.json", lambda file: file.write(content))

    def kept(self, drawing: Drawing, out: Path, format: str, cfg: Config) -> Any:
        """All samples, read from their shards or drawn when they are read; and a grid of the first.

        It lies in `out`, beside the folder where this has single images: other programs score all that it holds.
        """
        if format != "grid":
            images = read_images(out, cfg, self.codec.image_shape[0])
        else:
            with progress("sampling", drawing.num, "sample") as drawing.bar:
                images = drawing.draw(0, drawing.num) if drawing.num <= GRID else drawing.stream()
            drawing.bar = None
        grid = out / "grid" if format != "png" else out.with_name(f"{out.name}-grid")
        if format != "png" or not grid.with_suffix(".png").exists():  # of something else
            self.write_grid(scores.fetch(images, torch.arange(min(drawing.num, GRID))), None, grid)
        return images

    # Scores ----

    def score(
        self, samples: Any, given: Given, dataset: Any, cfg: Config, device: torch.device, log: Callable = print,
        of_class: int | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """The figures that the config asks for. samples: a tensor, or images read piece by piece.

        dataset: the training set; None is enough where metrics.reference is set. of_class: the one that all samples
        are of, whose images they are compared with. Raises metrics.scores.ScoreError.
        """
        return scores.score(samples, dataset, cfg.metrics, cfg.data.dir, device, log=log, of_class=of_class)

    def check_reference(self, dataset: ImageSet | None, cfg: Config, of_class: int) -> None:
        """ConfigError where the training set has no images that samples of this class can be compared with."""
        try:
            scores.reference_images(dataset, cfg.metrics, of_class)
        except scores.ScoreError as error:
            raise ConfigError(f"--class: {error}") from None
        here, there = (names[of_class] if names else None for names in (dataset.classes, self.codec.classes))
        if here and there and here != there:
            what = f"is {there} in the checkpoint and {here} in the training set"
            raise ConfigError(f"--class: class {of_class} {what}; give the data that it was trained on")

    def to_score(self, num: int, dataset: ImageSet | None) -> int:
        """How many of `num` samples a score takes, with this training set."""
        return num

    def describe(self, found: dict[str, float], cfg: Config, num: int, dataset: Any, drawing: Drawing) -> str:
        """The scores of `num` samples of a drawing in words; dataset as for `score`."""
        against = scores.reference(cfg.metrics, dataset, drawing.of_class)
        return scores.describe(found, cfg.metrics, num, drawing.asked(), against)


@dataclass
class VectorSamples:
    """Samples that are float32 vectors (N, *shape), each asked for by its condition, float32 (N, K), or by nothing.

    Methods are those of ImageSamples.
    """

    codec: VectorCodec

    def asked(self, args: argparse.Namespace, cfg: Config, training_set: Callable[[], Any]) -> tuple[int, Given, str]:
        """Conditions are the rows of --conditions in turn, or drawn from the training set's."""
        images_only = ["nearest", "search", "sweep", "class_index"]
        choices.refuse(args, images_only, f"is for images, and {args.ckpt} makes vectors")
        if args.format not in (None, "npz"):
            raise ConfigError(f"--format: {args.format} is for images; vectors are written as npz")
        dim = self.codec.network_shape["condition_dim"]
        if args.conditions is None:
            num = args.num or (distance.SCORED if args.calc_fid else 64)
            return num, training_set().draw_given(args.seed, range(num)) if dim else None, "npz"
        if not dim:
            raise ConfigError("--conditions: this model was trained without; train one with data.conditional: true")
        if args.calc_fid:
            why = "compares with the training set under its own conditions; leave out --conditions"
            raise ConfigError(f"--calc_fid: {why}")
        rows = vectors.read_conditions(args.conditions, dim)
        num = args.num or len(rows)
        return num, rows[torch.arange(num) % len(rows)], "npz"

    def needs_set(self, args: argparse.Namespace, cfg: Config) -> bool:
        return args.calc_fid

    def training_set(self, cfg: Config) -> VectorSet:
        dataset = data.load(cfg.data)
        shape, dim = self.codec.network_shape["shape"], self.codec.network_shape["condition_dim"]
        if not isinstance(dataset, VectorSet) or dataset.shape != shape:
            raise ConfigError(f"data.path: {cfg.data.path} does not hold vectors of the checkpoint's shape {shape}")
        if dataset.condition_dim != dim:
            raise ConfigError(f"data.path: the conditions in {cfg.data.path} are not of the checkpoint's size")
        return dataset

    def said(self, drawing: Drawing, out: Path, where: str) -> str:
        return f"{drawing.told('vectors')}; written: {out / 'samples'}"

    def given_for_grid(self, dataset: VectorSet, seed: int, count: int) -> Given:
        """Conditions drawn from the training set's."""
        return dataset.draw_given(seed, range(count))

    def write_grid(self, samples: torch.Tensor, given: Given, path: Path) -> tuple[Path, None]:
        """Write an npz; (its path, None: there is no picture)."""
        self.write(samples, given, 0, path.with_suffix(".npz"))
        return path.with_suffix(".npz"), None

    def write(self, samples: torch.Tensor, given: Given, start: int, path: Path) -> None:
        write_atomically(path, lambda file: vectors.write(samples, given, file))

    def write_labels(self, drawing: Drawing, out: Path, format: str) -> None:
        """Conditions are in the npz."""

    def kept(self, drawing: Drawing, out: Path, format: str, cfg: Config) -> torch.Tensor:
        files = (shards.path(out, start, format) for start in range(0, drawing.num, shards.SHARD))
        return torch.cat([torch.from_numpy(np.load(file)["vectors"]) for file in files])

    def score(
        self, samples: Any, given: Given, dataset: Any, cfg: Config, device: torch.device, log: Callable = print,
        of_class: None = None,
    ) -> dict[str, float]:  # fmt: skip
        """The distance to the training set, {"w2", "w2_of_data"}."""
        return distance.score(samples, given, dataset, self.codec)

    def to_score(self, num: int, dataset: VectorSet) -> int:
        return distance.to_score(num, dataset)

    def describe(self, found: dict[str, float], cfg: Config, num: int, dataset: VectorSet, drawing: Drawing) -> str:
        return distance.describe(found, num)


class LatentSamples(ImageSamples):
    """Samples that are decoded from latents: images, compared with images."""

    images: ImageSet | None = None  # what the latents of training are of

    def training_set(self, cfg: Config) -> ImageSet:
        """The images that the config's latents are of; or images of the size of the samples, where it names those."""
        dataset = data.load(cfg.data)
        if not isinstance(dataset, LatentSet):
            return super().training_set(cfg)
        c, r = (self.codec.network_shape[name] for name in ("channels", "resolution"))
        if dataset.shape != (c, r, r):
            what = f"{'x'.join(map(str, dataset.shape))}, and the checkpoint's are {c}x{r}x{r}"
            raise ConfigError(f"data.path: {cfg.data.path} holds latents of {what}")
        return self.in_pixels(dataset, cfg)

    def in_pixels(self, dataset: Any, cfg: Config) -> Any:
        """Latents as images, those they were made of or decoded; anything else as it is."""
        if not isinstance(dataset, LatentSet):
            return dataset
        self.images = self.images or decoding.images_of(dataset, self.codec, cfg)
        return self.images

    def score(
        self, samples: Any, given: Given, dataset: Any, cfg: Config, device: torch.device, log: Callable = print,
        of_class: int | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """As ImageSamples.score; dataset: latents or images."""
        return super().score(samples, given, self.in_pixels(dataset, cfg), cfg, device, log, of_class)

    def describe(self, found: dict[str, float], cfg: Config, num: int, dataset: Any, drawing: Drawing) -> str:
        """As ImageSamples.describe; dataset: latents or images."""
        return super().describe(found, cfg, num, self.in_pixels(dataset, cfg), drawing)


Samples = ImageSamples | LatentSamples | VectorSamples


def samples_of(codec: ImageCodec | LatentCodec | VectorCodec) -> Samples:
    """What is done with the samples of a model with this codec."""
    return {"images": ImageSamples, "latents": LatentSamples, "vectors": VectorSamples}[codec.kind](codec)


# Images made elsewhere ------------------------------------------------------------------------------------------------


def read_images(path: Path, cfg: Config, channels: int | None) -> Any:
    """Images of a folder that generate.py made, another folder of images or npz files, or one npz; read piece by piece.

    channels: to bring them to (grey images are often saved as RGB). Raises ConfigError.
    """
    path = shards.finished(path)
    arrays = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if path.suffix == ".npz" or (path.is_dir() and arrays):
        sizes = [len(read_npz(file, channels)) for file in arrays]
        return Stream(lambda piece: read_npz(arrays[piece], channels), sizes)
    section = {"name": "folder", "path": str(path), "resolution": None, "channels": channels, "on_broken": "fail"}
    try:
        return data.folder(cfg.data.model_copy(update={**section, "memory_gb": 0.0}))
    except ConfigError as error:
        raise ConfigError(re.sub(r"^data\.\w+", "--samples", str(error))) from None


def read_npz(path: Path, channels: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W) of the array `images` (or arr_0), NHWC or NCHW, in an npz."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays else "arr_0"]
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"--samples: {path} cannot be read as an npz of images ({error})".split("\n")[0]) from None
    if images.dtype != np.uint8 or images.ndim != 4 or not {images.shape[1], images.shape[3]} & {1, 3}:
        have = f"{images.dtype} {images.shape}"
        raise ConfigError(f"--samples: images in {path} are {have}: give uint8 (N, H, W, 1 or 3)")
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return fit_channels(torch.from_numpy(images), channels)
