"""Arrays in an npz: never unpickled, none unpacked beyond a limit; and what images and labels must be there."""

import io
import zipfile

import numpy as np
import torch

from config import ConfigError
from sources.files import MAX_CLASSES, read_member, reason

# Array -> its other name in files of other programs
NPZ_ARRAYS = {"images": "arr_0", "labels": "arr_1", "vectors": "", "conditions": "", "low": "", "high": ""}


def read(path: str, limit: float) -> dict[str, np.ndarray | None]:
    """The arrays of NPZ_ARRAYS, each None if absent. Raises ConfigError, also for more than `limit` bytes of them."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
            names = {name: next((n for n in (name, other) if n in sizes), None) for name, other in NPZ_ARRAYS.items()}
            total = sum(sizes[name] for name in names.values() if name)
            if total <= limit:
                return {key: name and _read_npy(archive, f"{name}.npy", int(limit)) for key, name in names.items()}
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"data.path: {path} cannot be read as an npz file ({reason(error)})") from error
    raise ConfigError(
        f"data.memory_gb: {path} unpacks to {total / 2**30:.1f} GB; raise data.memory_gb, or keep the images in a "
        "folder or a zip, which are read piece by piece"
    )


def _read_npy(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    return np.load(io.BytesIO(read_member(archive, archive.getinfo(name), limit)), allow_pickle=False)


def images_in(path: str, arrays: dict[str, np.ndarray | None]) -> tuple[torch.Tensor, np.ndarray | None, int]:
    """Images uint8 (N, C, H, W), labels int64 (N,) or None, classes' number, of `read(path)`. Raises ConfigError."""
    images, labels = arrays["images"], arrays["labels"]
    if images is None:
        raise ConfigError(
            f"data.path: {path} holds no array named `images`, `arr_0` or `vectors`; save one: np.savez(..., images=x)"
        )
    if images.ndim == 3:
        images = images[..., None]
    channels_last = images.ndim == 4 and images.shape[3] in (1, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or not (channels_last or images.shape[1] in (1, 3)):
        raise ConfigError(
            f"data.path: images in {path} are {images.dtype} {images.shape}; they must be uint8, (N, H, W, C) or "
            "(N, C, H, W), with 1 or 3 channels"
        )
    if images.size == 0:
        raise ConfigError(f"data.path: images in {path} are empty, {images.shape}; give at least one")
    num_classes = 0
    if labels is not None:
        whole = labels.shape == (len(images),) and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise ConfigError(
                f"data.path: labels in {path} are {labels.dtype} {labels.shape}; they must be integers "
                f"0 to {MAX_CLASSES - 1}, ({len(images)},)"
            )
        labels, num_classes = labels.astype(np.int64), int(labels.max()) + 1
    return torch.from_numpy(images.transpose(0, 3, 1, 2) if channels_last else images), labels, num_classes
