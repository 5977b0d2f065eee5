"""Arrays in an npz or npy: never unpickled, none unpacked beyond a limit; and what images and labels must be there."""

import io
import zipfile

import numpy as np
import torch

from config import ConfigError
from sources.files import read_member, reason, show
from sources.labels import class_numbers

# Array -> its other names: numpy's for one without a name, MedMNIST's, Keras'
NAMES = {
    "images": ("images", "arr_0", "train_images", "x_train"),
    "labels": ("labels", "arr_1", "train_labels", "y_train"),
    "vectors": ("vectors",),
    "conditions": ("conditions",),
    "low": ("low",),
    "high": ("high",),
}
READ = (
    "a folder of images (data.name: folder), a zip of them (zip), an npz or npy of arrays (npz), tar shards (tar), "
    "parquet files (parquet)"
)

Arrays = dict[str, np.ndarray | None]


def read(path: str, limit: float) -> Arrays:
    """The arrays of NAMES, each None if absent. Raises ConfigError, also for more than `limit` bytes of them.

    An npy is `images` where it is uint8, else `vectors`.
    """
    try:
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                return _of_npy(path, limit)
        with zipfile.ZipFile(path) as archive:
            sizes = {
                info.filename.removesuffix(".npy"): info.file_size
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            names = {key: next((n for n in others if n in sizes), None) for key, others in NAMES.items()}
            total = sum(sizes[name] for name in names.values() if name)
            if not names["images"] and not names["vectors"]:
                raise _nothing(path, list(sizes), archive)
            if total > limit:
                raise _too_large(path, total)
            return {key: name and _read_npy(archive, f"{name}.npy", int(limit)) for key, name in names.items()}
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(
            f"data.path: {path} cannot be read as an npz or npy file ({reason(error)}); what can be read: {READ}"
        ) from error


def _nothing(path: str, names: list[str], archive: zipfile.ZipFile) -> ConfigError:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    there = f"{', '.join(map(show, names[:10]))}{more}"
    if not names:
        there = f"{len(archive.namelist()):,} files that are no arrays: is it a zip of images (data.name: zip)?"
    wanted = ", ".join(f"`{name}`" for name in NAMES["images"])
    return ConfigError(
        f"data.path: {path} holds no array named {wanted} or `vectors`; save one: np.savez(..., images=x). "
        f"It holds {there}"
    )


def _too_large(path: str, total: float) -> ConfigError:
    return ConfigError(
        f"data.memory_gb: {path} unpacks to {total / 2**30:.1f} GB; raise data.memory_gb, or keep the images in a "
        "folder or a zip, which are read piece by piece"
    )


def _read_npy(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    return np.load(io.BytesIO(read_member(archive, archive.getinfo(name), limit)), allow_pickle=False)


def _of_npy(path: str, limit: float) -> Arrays:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.nbytes > limit:
        raise _too_large(path, array.nbytes)
    key = "vectors" if array.dtype.kind == "f" else "images"
    return {**dict.fromkeys(NAMES), key: np.array(array)}


def labels_in(path: str, arrays: Arrays) -> tuple[np.ndarray | None, int]:
    """Labels int64 (N,) and the number of classes, or (None, 0), of `read(path)`. Raises ConfigError."""
    images, labels = arrays["images"], arrays["labels"]
    if images is None or labels is None:
        return None, 0
    numbers, num_classes = class_numbers(f"data.path: {path}", labels)
    if len(numbers) != len(images):
        raise ConfigError(f"data.path: {path} holds {len(numbers):,} labels for {len(images):,} images")
    return numbers, num_classes


def images_in(path: str, arrays: Arrays) -> torch.Tensor:
    """Images uint8 (N, C, H, W) of `read(path)`. Raises ConfigError."""
    images = arrays["images"]
    assert images is not None
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
    return torch.from_numpy(images.transpose(0, 3, 1, 2) if channels_last else images)
