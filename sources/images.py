"""Image datasets: square images of one size, in memory or decoded when they are read, and what makes one of pixels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from config import ConfigError
from objectives.draws import key
from sources.augment import AUGMENT_DIM
from sources.codecs import ImageCodec
from sources.files import SUFFIXES, Files, decoded, settle

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

    def codec(self, cfg: Any) -> ImageCodec:
        """Between these images and a model that a Config asks for, by its data.conditional, flip and augment."""
        label_dim = self.num_classes if cfg.data.conditional else 0
        counts = torch.bincount(self.labels, minlength=label_dim).tolist() if label_dim else None
        sizes = (self.resolution, self.channels, label_dim, AUGMENT_DIM if cfg.data.augment else 0)
        return ImageCodec(*sizes, counts, cfg.data.flip, cfg.data.augment)

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


def in_memory(cfg: Any, images: torch.Tensor, labels: Any, num_classes: int) -> ImageSet:
    """uint8 images (N, C, H, W) at the config's size and channels; labels: N integers, or None and num_classes 0."""
    images = fit_channels(fit_resolution(images, cfg.resolution), cfg.channels)
    return ImageSet(
        cfg.name, num_classes, None if labels is None else torch.as_tensor(labels, dtype=torch.int64), images
    )


def from_files(cfg: Any, files: Files, labels: list[int] | None, num_classes: int) -> ImageSet:
    """Settle size and channels, then decode all, where they fit in data.memory_gb, or none. Raises ConfigError."""
    if not files.names:
        raise ConfigError(f"data.path: {files.path} holds no images ({', '.join(SUFFIXES)}); give the path of some")
    settle(files, cfg.resolution, cfg.channels)
    dataset = ImageSet(cfg.name, num_classes, None if labels is None else torch.tensor(labels), files=files)
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
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in images.split(4096)])


def fit_resolution(images: torch.Tensor, resolution: int | None) -> torch.Tensor:
    """uint8 (N, C, H, W), centre-cropped to a square and resized: area means down, bicubic up. None: cropped only."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if resolution is None or resolution == side:
        return images.contiguous()
    how = {"mode": "area"} if resolution < side else {"mode": "bicubic", "align_corners": False}
    parts = [F.interpolate(part.float(), size=(resolution, resolution), **how) for part in images.split(4096)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
