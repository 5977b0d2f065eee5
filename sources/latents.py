"""Latents of a frozen autoencoder: what encode.py, EDM2 and LightningDiT keep of them, their scaling, and the set.

    dataset = data.load(cfg.data)  # a LatentSet where data.name is latents

All three forms are read in place, row by row, through memory maps: nothing is unpacked, and a set of any size costs
memory for its labels and places alone.
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import ConfigError
from sources import facts
from sources.codecs import LatentCodec
from sources.files import MAX_FILE, read_member, reason, show
from sources.images import draw_labels
from sources.labels import class_numbers, in_json, unused
from sources.latent_files import DTYPES, LatentFiles, header, npy_starts, small, stamp

log = logging.getLogger(__name__)

# data.scaling -> raw latents' mean and std, a number a channel, the std that the model sees, the images' range
IMM = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
PRESETS = {
    "edm2": ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5, "0,1"),
    "imm": (*IMM, 0.5, "-1,1"),
    "sd": ((0.0,) * 4, (1 / 0.18215,) * 4, 1.0, "-1,1"),
}
MEASURED = 10_000  # rows that a mean and spread are measured on, where a file does not say its own
FINGERPRINTED = 1024  # rows, spread over the set
PARTS = ("latents", "latents_std", "latents_flip", "latents_flip_std")  # tensors: means and deviations, then mirrored
ABOUT = "consistency_latents"  # the key of encode.py's metadata
FORMAT = 1
UNKNOWN = dict.fromkeys(("source", "hash", "input_range", "factor", "image_channels"))


@dataclass
class LatentSet:
    """Latents of a set of images, in memory (`values`) or read row by row; what images.ImageSet is for images."""

    rows: LatentFiles  # only the parts that are asked for
    channels_of_latent: int
    spread: bool  # whether deviations are kept
    mirrored: bool  # whether rows hold the mirrored images' latents too, after the others
    path: str
    labels: torch.Tensor | None = None  # int64 (N,)
    classes: list[str] = field(default_factory=list)
    conditional: bool = True  # as of ImageSet
    autoencoder: dict[str, Any] = field(default_factory=lambda: dict(UNKNOWN))
    measured: tuple[list[float], list[float]] | None = None  # mean and std a channel, as the file says
    images: dict[str, Any] | None = None  # the config's `data` of the images, and their "fingerprint"
    values: torch.Tensor | None = None  # all rows, on the CPU or a device
    left_out: dict[str, int] = field(default_factory=dict)
    name = "latents"
    known: dict[str, Any] | None = None  # facts(), once they were asked for

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> LatentFiles | None:
        """What is read later; None where all is in memory: see data.batches."""
        return self.rows if self.values is None else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent."""
        return (self.channels_of_latent, *self.rows.part[1:])

    @property
    def num_classes(self) -> int:
        """0: no labels."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> "LatentSet":
        """The same set with its values and labels on `device`; one that is not in memory is returned as it is."""
        if self.values is None:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, values=self.values.to(device), labels=labels)

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows (B, p c, r, r) for the codec, as they are stored, and labels int64 (B,) or None."""
        if self.values is None:
            return self.unpack(self.rows.read(indices.tolist()))
        indices = indices.to(self.values.device, non_blocking=True)
        return self.values[indices], None if self.labels is None else self.labels[indices]

    def unpack(self, read: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What LatentFiles.read gave as rows and labels."""
        return read[0], None if self.labels is None else self.labels[read[1]]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and unbiased standard deviation a channel, float64 (c,), of up to 10,000 rows spread over the set.

        Where deviations are kept they count: it is the spread of what is drawn.
        """
        c, count, total, square = self.channels_of_latent, 0, 0.0, 0.0
        for rows in _spread(len(self), MEASURED).split(256):
            z = self.rows.read(rows.tolist())[0].double()
            total, count = total + z[:, :c].sum((0, 2, 3)), count + z[:, 0].numel()
            square = square + z[:, :c].square().sum((0, 2, 3))
            if self.spread:
                square = square + z[:, c : 2 * c].square().sum((0, 2, 3))
        mean = total / count
        return mean, ((square - count * mean.square()).clamp(min=0) / max(count - 1, 1)).sqrt()

    def scaling(self, preset: str | None, sigma_data: float) -> tuple[list[float], list[float]]:
        """scale and bias of each channel, as data.scaling says: the model sees z scale + bias. Raises ConfigError."""
        if preset in PRESETS:
            mean, std, wanted, _ = PRESETS[preset]
            if len(mean) != self.channels_of_latent:
                has = f"is for latents of {len(mean)} channels, and {self.path} has {self.channels_of_latent}"
                raise ConfigError(f"data.scaling: {preset} {has}; set it to null, or to lightningdit")
        elif preset is None and self.measured is not None:
            (mean, std), wanted = self.measured, sigma_data
        else:
            (mean, std), wanted = self.statistics(), 1.0 if preset else sigma_data
        mean, std = (torch.as_tensor(numbers, dtype=torch.float32) for numbers in (mean, std))
        if not (std > 0).all():
            raise ConfigError(f"data.path: a channel of the latents in {self.path} never changes; encode them again")
        scale = torch.tensor(wanted, dtype=torch.float32) / std
        if preset in PRESETS:
            self.check_scale(preset, mean, std)
        return scale.tolist(), (-mean * scale).tolist()

    def check_scale(self, preset: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Warn where the set's own mean and spread are far from what a preset takes them for."""
        own = self.measured or self.statistics()
        own_mean, own_std = (torch.as_tensor(numbers, dtype=torch.float32) for numbers in own)
        ratio = float((own_std / std).log().mean().exp())
        if not 0.5 < ratio < 2 or float(((own_mean - mean) / std).abs().max()) > 1:
            what = f"{preset} is not the scaling of {self.path}: its latents are {ratio:.2g} times as wide"
            log.warning("data.scaling: %s, or lie elsewhere; another autoencoder or input range? null fits them", what)

    def codec(self, cfg: Any) -> LatentCodec:
        """Between these latents and a model that a Config asks for. Raises ConfigError."""
        scale, bias = self.scaling(cfg.data.scaling, cfg.network.sigma_data)
        label_dim = self.num_classes if cfg.data.conditional else 0
        counts = torch.bincount(self.labels, minlength=label_dim).tolist() if label_dim else None
        own = dict(self.autoencoder)
        own["input_range"] = own["input_range"] or PRESETS.get(cfg.data.scaling, (0, 0, 0, "-1,1"))[3]
        known = {"classes": self.classes if label_dim else None, "facts": facts.identity(self.facts())}
        scaling = {"scale": scale, "bias": bias, "autoencoder": own, "flip": self.mirrored}
        return LatentCodec(self.shape[1], self.shape[0], label_dim, **scaling, class_counts=counts, **known)

    def facts(self) -> dict[str, Any]:
        """What was read: as images.ImageSet.facts; the size is that of a latent."""
        self.known = self.known or self._facts()
        return self.known

    def _facts(self) -> dict[str, Any]:
        counts = None if self.labels is None else torch.bincount(self.labels, minlength=self.num_classes).tolist()
        digest = hashlib.sha256(repr((len(self), self.shape)).encode())
        if self.conditional and self.labels is not None:
            digest.update(self.labels.cpu().numpy().tobytes())
        for rows in _spread(len(self), FINGERPRINTED).split(256):  # of the means: flip and what else is read may change
            digest.update(self.rows.read(rows.tolist())[0][:, : self.channels_of_latent].float().numpy().tobytes())
        source, factor = self.autoencoder["source"], self.autoencoder["factor"]
        side = f"of {self.shape[1] * factor} pixels, " if factor else ""
        return {
            "name": self.name,
            "from": self.path,
            "count": len(self),
            "size": list(self.shape),
            "channels": None,
            "resize": f"{side}by {show(source)}" if source else None,
            "classes": None if counts is None else dict(zip(self.classes, counts, strict=True)),
            "left_out": self.left_out,
            "given": "no labels" if self.labels is None else None,
            "fingerprint": digest.hexdigest()[:16],
        }

    def said(self) -> list[str]:
        """The line that a run begins with."""
        return [facts.told(self.facts(), "latents")]

    def draw_given(self, seed: int, indices: Sequence[int]) -> torch.Tensor | None:
        """A class for each sample, as of ImageSet."""
        if self.labels is None or not self.conditional:
            return None
        return draw_labels(seed, indices, torch.bincount(self.labels, minlength=self.num_classes).tolist())


def _spread(count: int, most: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


# Opened ---------------------------------------------------------------------------------------------------------------


def from_path(cfg: Any) -> LatentSet:
    """The latents of data.path, as the config's `data` section (cfg) asks for them, told apart by content.

    encode.py's file or LightningDiT's (safetensors), a folder of such shards, or EDM2's zip. Raises ConfigError.
    """
    path = os.fspath(cfg.path or "")
    for option in ("resolution", "channels", "augment"):
        if getattr(cfg, option):
            raise ConfigError(f"data.{option}: is for images, and {path} holds latents; leave it out")
    if not os.path.exists(path):
        raise ConfigError(f"data.path: {path} does not exist; set it to latents: of encode.py, EDM2 or LightningDiT")
    if os.path.isdir(path):
        shards = sorted(str(shard) for shard in Path(path).glob("*.safetensors"))
        if not shards:
            raise ConfigError(f"data.path: {path} holds no *.safetensors; give a folder of such latents, or a file")
        dataset = in_safetensors(cfg, path, shards)
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        dataset = in_zip(cfg, path) if zipped else in_safetensors(cfg, path, [path])
    else:
        raise ConfigError(f"data.path: {path} is not a regular file; set it to a file of latents")
    if cfg.conditional and dataset.labels is None:
        raise ConfigError(f"data.conditional: {path} has no labels; encode images that have, or set it to false")
    dataset.conditional = cfg.conditional
    size = dataset.rows.starts.size * int(np.prod(dataset.rows.part)) * dataset.rows.dtype.itemsize
    return dataset if size > cfg.memory_gb * 2**30 else _read_all(dataset)


def _read_all(dataset: LatentSet) -> LatentSet:
    (c, height, width), parts = dataset.rows.part, len(dataset.rows.starts)
    values = torch.empty(len(dataset), parts * c, height, width, dtype=dataset.rows.dtype)
    for start in range(0, len(dataset), 1024):
        piece = values[start : start + 1024] = dataset.rows.read(range(start, min(start + 1024, len(dataset))))[0]
        bad = (~piece.isfinite().flatten(1).all(1)).nonzero()
        if len(bad):
            what = f"latent {start + int(bad[0])} in {dataset.path} is not finite"
            raise ConfigError(f"data.path: {what}; the file is damaged, or its autoencoder is: encode again")
    return replace(dataset, values=values)


def _no_mirror(cfg: Any, path: str) -> None:
    if cfg.flip:
        why = f"{path} holds no latents of mirrored images, and a latent cannot be mirrored afterwards"
        raise ConfigError(f"data.flip: {why}; encode with data.flip=true, or set it to false")


# Safetensors: encode.py's and LightningDiT's --------------------------------------------------------------------------


def in_safetensors(cfg: Any, path: str, shards: list[str]) -> LatentSet:
    """The set in files with a tensor `latents` (N, c, r, r), and where they are kept `latents_std`, `latents_flip`,
    `latents_flip_std` and `labels` (N,). Raises ConfigError.
    """
    which, starts, labels, first = [], [], [], None
    about: dict[str, Any] = {}
    for number, shard in enumerate(shards):
        tensors, base = header(shard)
        parts = [name for name in PARTS if name in tensors and (cfg.flip or "flip" not in name)]
        if not parts or parts[0] != "latents":
            raise ConfigError(
                f"data.path: {shard} has no tensor `latents`; it holds {', '.join(sorted(tensors))[:200]}"
            )
        kinds = {(tensors[name]["dtype"], *tensors[name]["shape"]) for name in parts}
        dtype, count, *part = next(iter(kinds))
        if len(kinds) > 1 or dtype not in DTYPES or len(part) != 3 or part[1] != part[2] or not count:
            have = ", ".join(f"{name} {tensors[name]['dtype']} {tensors[name]['shape']}" for name in parts)
            wanted = f"all (N, c, r, r) of {', '.join(DTYPES)}"
            raise ConfigError(f"data.path: latents in {shard} must be {wanted}, and are {have}")
        if first not in (None, (parts, dtype, part, "labels" in tensors)):
            raise ConfigError(
                f"data.path: {shard} holds other tensors than {shards[0]}; keep each set in its own folder"
            )
        first = parts, dtype, part, "labels" in tensors
        row = np.arange(count, dtype=np.int64) * (int(np.prod(part)) * DTYPES[dtype].itemsize)
        starts.append(np.stack([base + tensors[name]["data_offsets"][0] + row for name in parts]))
        which.append(np.full(count, number, np.int32))
        if "labels" in tensors:
            labels.append(small(shard, tensors, base, "labels"))
            if len(labels[-1]) != count:
                raise ConfigError(f"data.path: {shard} holds {len(labels[-1]):,} labels for {count:,} latents")
        if ABOUT in tensors.get("__metadata__", {}):
            about = _about(shard, tensors, base)
    if cfg.flip and "latents_flip" not in parts:
        _no_mirror(cfg, path)
    stamps = [stamp(shard) for shard in shards]
    rows = LatentFiles(shards, stamps, np.concatenate(which), np.concatenate(starts, 1), tuple(part), DTYPES[dtype])
    dataset = LatentSet(rows, part[0], "latents_std" in parts, "latents_flip" in parts, path, **about)
    return _labelled(dataset, cfg, np.concatenate(labels) if labels else None)


def _labelled(dataset: LatentSet, cfg: Any, labels: np.ndarray | None) -> LatentSet:
    """With its labels, which are left out where they are no classes and the network is not told them."""
    if labels is None:
        return replace(dataset, classes=[])
    try:
        numbers, count = class_numbers(f"data.path: {dataset.path}", labels)
    except ConfigError as error:
        if cfg.conditional:
            raise
        return replace(dataset, classes=[], left_out={unused(error): 1})
    classes = dataset.classes if len(dataset.classes) >= count else [str(i) for i in range(count)]
    return replace(dataset, labels=torch.from_numpy(numbers), classes=classes)


def _about(path: str, tensors: dict[str, Any], base: int) -> dict[str, Any]:
    """What encode.py says of its latents, as arguments of LatentSet."""
    try:
        about = json.loads(tensors["__metadata__"][ABOUT])
        if about["format"] != FORMAT:
            raise ConfigError(f"data.path: {path} is of format {about['format']}; this version reads format {FORMAT}")
        measured = tuple(small(path, tensors, base, name).tolist() for name in ("channel_mean", "channel_std"))
        autoencoder = {name: about["autoencoder"][name] for name in UNKNOWN}
        known = {"classes": about["classes"] or [], "images": about["images"]}
        return {"autoencoder": autoencoder, "measured": measured, **known}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = f"does not say what it was made of ({reason(error)})"
        raise ConfigError(f"data.path: {path} {why}; encode again") from None


# EDM2's zip -----------------------------------------------------------------------------------------------------------


def in_zip(cfg: Any, path: str) -> LatentSet:
    """EDM2's form: stored .npy members (2 c, r, r), mean and deviation, in their names' order, and dataset.json."""
    _no_mirror(cfg, path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((m for m in archive.infolist() if m.filename.endswith(".npy")), key=lambda m: m.filename)
            labelled = "dataset.json" in archive.namelist()
            told = read_member(archive, archive.getinfo("dataset.json"), MAX_FILE) if labelled else b'{"labels": null}'
    except Exception as error:
        raise ConfigError(f"data.path: {path} is no whole zip ({reason(error)}); copy or make it again") from None
    if not members:
        raise ConfigError(f"data.path: {path} holds no .npy; images in a zip are data.name: zip")
    if odd := next((m.filename for m in members if m.compress_type or m.flag_bits & 1), None):
        why = f"{show(odd)} in {path} is compressed, and latents are read in place"
        raise ConfigError(f"data.path: {why}; store them (zip -0)")
    starts, shape, dtype = npy_starts(path, members)
    rows = LatentFiles([path], [stamp(path)], np.zeros(len(members), np.int32), starts[None], shape, dtype)
    dataset = LatentSet(rows, shape[0] // 2, True, False, path)
    try:
        numbers, classes = in_json(f"data.path: dataset.json in {path}", told, [m.filename for m in members])
    except ConfigError as error:
        if cfg.conditional:
            raise
        return replace(dataset, left_out={unused(error): 1})
    labels = None if numbers is None else torch.from_numpy(numbers)
    return replace(dataset, labels=labels, classes=classes)
