"""Image datasets: square images of one size, in memory or decoded when they are read, and what makes one of pixels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from config import ConfigError
from objectives.draws import key
from sources import facts
from sources.augment import AUGMENT_DIM
from sources.codecs import ImageCodec
from sources.files import SUFFIXES, Files, decoded, not_square, settle, square

log = logging.getLogger(__name__)


@dataclass
class ImageSet:
    """Square images of one size, labelled or not; in memory (`images`) or decoded when read (`files`)."""

    name: str
    num_classes: int = 0  # 0: no labels
    labels: torch.Tensor | None = None  # int64 (N,)
    images: torch.Tensor | None = None  # uint8 (N, C, H, W), on the CPU or a device
    files: Files | None = None
    conditional: bool = True  # False: the labels are for scores, and samples are not asked for by class
    reported: set[str] = field(default_factory=set)  # broken files that have been named already
    classes: list[str] = field(default_factory=list)  # their names; none: "0", "1", ...
    path: str | None = None  # of the file that arrays were read from
    source: Files | None = None  # where the images were decoded from, whether when they are read or before
    resize: str | None = None  # what was done to their size, in words
    left_out: dict[str, int] = field(default_factory=dict)  # what was not read, beside what `source` knows
    known: dict[str, Any] | None = None  # facts(), once they were asked for

    def __len__(self) -> int:
        return len(self.files.names) if self.images is None else len(self.images)

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.files.channels if self.images is None else self.images.shape[1]

    @property
    def resolution(self) -> int:
        """Pixels per side."""
        return self.files.resolution if self.images is None else self.images.shape[3]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.channels, self.resolution, self.resolution

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same dataset with its decoded images and labels on `device`; a lazy set is returned as it is."""
        if self.images is None:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) for int64 (B,) indices; on the device of `images`, on the CPU for a lazy set."""
        return self.read(indices)[0]

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) or None. Raises ConfigError for files that cannot be used."""
        if self.images is None:
            return self.unpack(self.files.read(indices.tolist()))
        indices = indices.to(self.images.device, non_blocking=True)
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def unpack(self, read: tuple[torch.Tensor, torch.Tensor, list[str]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Files.read gave as images and labels; each broken file is named once."""
        images, used, broken = read
        for message in broken:
            if message not in self.reported:
                self.reported.add(message)
                log.warning("%s; the next image is read in its place", message)
        return images, None if self.labels is None else self.labels[used]

    @property
    def class_names(self) -> list[str]:
        """A name for each class, no two the same."""
        names = self.classes or [str(i) for i in range(self.num_classes)]
        return [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]

    def facts(self) -> dict[str, Any]:
        """What was read, in plain numbers and strings: name, from, count, size, channels, resize, classes {name:
        images of it} or None, left_out {reason: count}, given, fingerprint. The fingerprint is of the labels too where
        the network is told them.
        """
        self.known = self.known or self._facts()
        return self.known

    def _facts(self) -> dict[str, Any]:
        labels = self.labels if self.conditional else None
        source, counts = self.source, None
        if self.labels is not None:
            counts = torch.bincount(self.labels, minlength=self.num_classes).tolist()
        left_out = {**self.left_out, **(source.left_out if source else {})}
        return {
            "name": self.name,
            "from": source.path if source else self.path or self.name,
            "count": len(self),
            "size": [self.resolution, self.resolution],
            "channels": self.channels,
            "resize": self.resize,
            "classes": None if counts is None else dict(zip(self.class_names, counts, strict=False)),
            "left_out": {what: count for what, count in sorted(left_out.items()) if count > 0},
            "given": "no labels" if labels is None and counts is None else None,
            "fingerprint": facts.of_files(source, labels) if source else facts.of_tensors(self.images, labels),
        }

    def said(self) -> list[str]:
        """The line that a run begins with, and a warning where the images use little of their range."""
        warning = facts.range_warning(self)
        return [facts.told(self.facts(), "images"), *([warning] if warning else [])]

    def codec(self, cfg: Any) -> ImageCodec:
        """Between these images and a model that a Config asks for, by its data.conditional, flip and augment."""
        label_dim = self.num_classes if cfg.data.conditional else 0
        counts = torch.bincount(self.labels, minlength=label_dim).tolist() if label_dim else None
        sizes = (self.resolution, self.channels, label_dim, AUGMENT_DIM if cfg.data.augment else 0)
        known = (self.class_names if label_dim else None, facts.identity(self.facts()))
        return ImageCodec(*sizes, counts, cfg.data.flip, cfg.data.augment, *known, cfg.data.upright)

    def draw_given(self, seed: int, indices: Sequence[int]) -> torch.Tensor | None:
        """A class for each sample, int64 (len(indices),), as often as in the training set; by (seed, index) alone."""
        if self.labels is None or not self.conditional:
            return None
        return draw_labels(seed, indices, torch.bincount(self.labels, minlength=self.num_classes).tolist())


def draw_labels(seed: int, indices: Sequence[int], class_counts: Sequence[int]) -> torch.Tensor:
    """Class of each sample, int64 (len(indices),), as often as in the training set; depends on (seed, index) alone."""
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    uniform = [key(seed, "label", int(i)) / 2**63 for i in indices]
    return torch.searchsorted(shares, torch.tensor(uniform, dtype=torch.float64) * shares[-1], right=True)


# Made from pixels or files, as the config's `data` section (cfg) says ------------------------------------------------


def in_memory(
    cfg: Any,
    images: torch.Tensor,  # uint8 (N, C, H, W)
    labels: Any,  # N integers, or None and num_classes 0
    num_classes: int,
    classes: Sequence[str] = (),  # their names, if they have any
    resize: str | None = None,  # what was done to the images already, in words
) -> ImageSet:
    """The images at the config's size and channels. Raises ConfigError where they are not square and none is given."""
    height, width = images.shape[2:]
    if cfg.resolution is None and height != width:
        raise not_square(cfg.path or cfg.name, width, height)
    images = fit_resolution(fit_channels(images, cfg.channels), cfg.resolution)
    done = [part for part in (resize, facts.sizes([(width, height)], images.shape[3])) if part]
    numbers = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    more = {"classes": list(classes), "path": cfg.path, "resize": ", ".join(done) or None}
    return ImageSet(cfg.name, num_classes, numbers, images, **more)


def from_files(cfg: Any, files: Files, labels: np.ndarray | None, classes: Sequence[str]) -> ImageSet:
    """Settle size and channels, then decode all, where they fit in data.memory_gb, or none. Raises ConfigError."""
    if not files.names:
        held = ", ".join(f"{count:,} {what}" for what, count in sorted(files.left_out.items()))
        held = f"; it holds {held}" if held else ""
        shards = next((kind for kind in ("parquet", "tar") if files.left_out[f".{kind}"]), None)
        advice = f"set data.name: {shards}" if shards else "give the path of some"
        raise ConfigError(f"data.path: {files.path} holds no images ({', '.join(SUFFIXES)}){held}; {advice}")
    files.white = cfg.white_level
    settle(files, cfg.resolution, cfg.channels)
    numbers = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    resize = facts.sizes(files.sizes, files.resolution)
    more = {"classes": list(classes), "source": files, "resize": resize}
    dataset = ImageSet(cfg.name, len(classes), numbers, files=files, **more)
    if len(files.names) * files.channels * files.resolution**2 > cfg.memory_gb * 2**30:
        return dataset
    images, kept = decoded(files, cfg.dir)
    if len(kept) < len(files.names):
        log.warning("data.path: skipped %d of %d images", len(files.names) - len(kept), len(files.names))
    return replace(dataset, labels=None if labels is None else dataset.labels[kept], images=images, files=None)


def fit_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W) to 1 or 3 channels; grey is PIL's (ITU-R 601) luma. None: as they are."""
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(1, 3, 1, 1)  # of 65536
    parts = [(part * weights).sum(1, keepdim=True, dtype=torch.int32) for part in images.split(4096)]
    return torch.cat([((part + 32768) >> 16).to(torch.uint8) for part in parts])


def fit_resolution(images: torch.Tensor, resolution: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W), cropped to the central square and resized as files are: PIL's Lanczos, antialiased.

    None: cropped only.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if resolution in (None, side):
        return images.contiguous()
    fitted = np.empty((len(images), images.shape[1], resolution, resolution), np.uint8)
    for row, image in enumerate(images):
        for channel, plane in enumerate(image.contiguous().numpy()):
            fitted[row, channel] = square(Image.fromarray(plane), resolution)
    return torch.from_numpy(fitted)
