"""Datasets by name, and the order they are read in.

    dataset = load(cfg.data)
    for images, labels in batches(dataset, seed=0, batch_size=512):  # uint8 (B, C, H, W), int64 (B,) or None
        x = to_float(images)  # [-1, 1]

Add a dataset: write one function that takes the `data` section of the config and returns an `ImageSet` (by
`in_memory` or `from_files`) or a `VectorSet`, name it in DATASETS at the end of this file, and in config/schema.py.
"""

import atexit
import functools
import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import ConfigError, RunFailed
from objectives.draws import key
from sources import arrays, files, finding, parquets, shards, tars, vectors
from sources.codecs import to_float, to_uint8  # noqa: F401  # kept at the top: pixels to [-1, 1], and back
from sources.images import ImageSet, from_files, in_memory
from sources.labels import unused
from sources.latents import LatentSet
from sources.latents import from_path as open_latents
from sources.vectors import VectorSet

EVERY = 20  # where objective.held_out names no images, those 19, 39, ... of the training set are kept out of it
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


def load(data_cfg: Any) -> ImageSet | VectorSet | LatentSet:
    """The training split that the config's `data` section names: images, the vectors of an npz, or latents.

    data_cfg: an object with name, dir, path, resolution, channels, conditional, on_broken, memory_gb and white_level.
    `said()` of the dataset are the lines that tell what was read, `facts()` the same for a program.
    Raises ConfigError: what is missing or wrong and what to do, in one line.
    """
    if data_cfg.name is None:
        raise ConfigError("data.name: null is chosen when a run begins; use the config.yml in the run's folder")
    if data_cfg.name not in DATASETS:
        raise ConfigError(f"data.name: {data_cfg.name!r} is not one of {', '.join(DATASETS)}")
    dataset = DATASETS[data_cfg.name](data_cfg)
    if isinstance(dataset, VectorSet | LatentSet):
        return dataset
    if data_cfg.white_level and dataset.source is None:
        raise ConfigError(f"data.white_level: is for files of images, and data.name is {data_cfg.name}; set it to null")
    dataset.conditional = data_cfg.conditional
    if dataset.conditional and dataset.labels is None:
        raise ConfigError(
            f"data.conditional: {data_cfg.name} {data_cfg.path or ''} has no labels; add them (a folder: one subfolder "
            "per class; a zip: dataset.json; an npz: an array `labels`; a tar: .cls or .json members; "
            "a parquet: a column `label`, or data.label_column) or set data.conditional: false"
        )
    if dataset.files is not None:
        files.check_headers(dataset.files)
    return dataset


def held_out(data_cfg: Any, path: str | None, dataset: ImageSet) -> tuple[ImageSet, torch.Tensor, torch.Tensor | None]:
    """(the set with held-out images, their rows in it, the rows of `dataset` to train on, None for all).

    path: of the images, read as data_cfg.path is; None: they are every EVERY-th of `dataset`. Raises ConfigError for
    images of another size, or too few to keep some out.
    """
    if path is None:
        places = torch.arange(len(dataset))
        out = places % EVERY == EVERY - 1
        if not out.any():
            what = f"the set has {len(dataset)} images, too few to keep every {EVERY}th out of training"
            raise ConfigError(f"objective.held_out: {what}; give the path of others")
        return dataset, places[out], places[~out]
    try:
        others = load(data_cfg.model_copy(update={"path": path}))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "objective.held_out")) from None
    if others.shape != dataset.shape:
        a, b = ("x".join(map(str, images.shape)) for images in (others, dataset))
        raise ConfigError(f"objective.held_out: {path} holds images of {a}, and the training set is {b}")
    return others, torch.arange(len(others)), None


# The order of reading: a pure function of the seed, so no state is saved ----------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(key(seed, "order", epoch)))


def order(n: int, seed: int, positions: torch.Tensor) -> torch.Tensor:
    """Indices into a dataset of n at int64 `positions` (B,) of the endless stream of epochs, each newly shuffled."""
    indices = torch.empty_like(positions)
    epochs = positions // n
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        indices[here] = _permutation(n, seed, epoch)[positions[here] % n]
    return indices


def batches(
    dataset: ImageSet | VectorSet | LatentSet,
    seed: int,
    batch_size: int,  # of all ranks together
    start_step: int = 0,  # the first batch is this step's
    rank_slice: tuple[int, int] | None = None,  # this rank's rows [start, stop) of every batch; None: all
    workers: int = 0,  # processes that decode a lazy set; the batches are the same whatever the number
    among: torch.Tensor | None = None,  # int64, the rows of the dataset that are read; None: all
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Endless (uint8 images (B, C, H, W), int64 labels (B,) or None); step k has places [k B, (k+1) B) of `order`.

    Of vectors: (float32 values (B, ...), float32 conditions (B, K) or None). Raises ConfigError for images that cannot
    be used, as the config says.
    """
    own = torch.arange(*(rank_slice or (0, batch_size)))
    positions = (step * batch_size + own for step in itertools.count(start_step))
    if among is None:
        indices = (order(len(dataset), seed, places) for places in positions)
    else:
        indices = (among[order(len(among), seed, places)] for places in positions)
    yield from read_batches(dataset, indices, workers)


def read_batches(
    dataset: ImageSet | VectorSet | LatentSet, indices: Iterable[torch.Tensor], workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """What `batches` gives, for each int64 (B,) of `indices`; workers and errors as there."""
    if dataset.files is None:
        yield from map(dataset.read, indices)
        return
    loader: Any = torch.utils.data.DataLoader(
        dataset.files,  # type: ignore[arg-type]  # anything with __getitems__
        batch_sampler=(rows.tolist() for rows in indices),
        num_workers=workers,
        collate_fn=shared,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(0),  # else it would draw from, and move, torch's global one
    )
    for read in _started(loader):
        if isinstance(read, Exception):
            raise read
        yield dataset.unpack(read)


def _started(loader: Any) -> Iterator[Any]:
    """iter(loader), with signals held back until the new processes ignore them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    of_children = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the program is when one dies, in the middle of a step; without it, that is
            # noticed when the next batch is waited for.
            signal.signal(signal.SIGCHLD, of_children)


def shared(read: Any) -> Any:
    """What a loading process has read, in memory that the main one sees; or a RunFailed where that has no room for it.

    Torch would move it there in a thread, whose error nobody hears: the main process would wait for ever.
    """
    if torch.utils.data.get_worker_info() is None or isinstance(read, Exception):
        return read
    try:
        for part in read:
            if torch.is_tensor(part):
                part.share_memory_()
        return read
    except RuntimeError as error:
        advice = "give it more room (docker: --shm-size), or set data.workers lower"
        return RunFailed(f"no room for a batch in shared memory ({files.reason(error)}); {advice}")


@atexit.register
def _end_workers() -> None:
    """End loading processes left at exit: they do not hear the SIGTERM after which Python would wait for them."""
    for child in torch.multiprocessing.active_children():
        if child.daemon:
            child.kill()


def ignore_signals(worker: int) -> None:
    """Clusters and Ctrl-C signal a whole group of processes: the main one decides, and needs these to end its step."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


# The datasets ---------------------------------------------------------------------------------------------------------


def digits(cfg: Any) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes; no download. 0..16 is scaled to 0..255."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    return in_memory(cfg, torch.from_numpy(images)[:, None], raw.target, 10)


def _torchvision(cfg: Any, kind: str, place: str) -> Any:
    """torchvision's training split from data.dir, downloaded if it is not there; `place`: what goes where by hand."""
    import torchvision

    dataset_class = getattr(torchvision.datasets, kind)
    try:
        return dataset_class(root=cfg.dir, train=True, download=False)
    except RuntimeError:  # torchvision's word for absent or damaged
        pass
    except Exception as error:
        raise ConfigError(
            f"data.dir: the {cfg.name} files in {cfg.dir} are damaged ({files.reason(error)}); delete them, and they "
            "are downloaded again"
        ) from error
    # Its bar, on a terminal only
    torchvision.datasets.utils.tqdm = functools.partial(tqdm, desc=f"downloading {cfg.name}", disable=None)
    try:
        return dataset_class(root=cfg.dir, train=True, download=True)
    except Exception as error:
        raise ConfigError(
            f"data.dir: {cfg.name} is not in {cfg.dir} and could not be downloaded ({files.reason(error)}); "
            f"place {place} in {Path(cfg.dir) / kind / 'raw' if 'ubyte' in place else cfg.dir}"
        ) from error


# torchvision asks for the test files too.
_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (gunzipped)"


def mnist(cfg: Any, kind: str = "MNIST") -> ImageSet:
    """60,000 handwritten digits, 28x28 grey, 10 classes; padded with black to data.resolution, 32 unless it is set.

    28 is the set as it is; below that, and above 32, the digits padded to 32 are resized.
    """
    raw = _torchvision(cfg, kind, _IDX)
    images, size = raw.data[:, None], cfg.resolution
    side = size if size and 28 <= size <= 32 else 32
    before = (side - 28) // 2
    images = F.pad(images, (before, side - 28 - before, before, side - 28 - before))
    classes = [name.split(" - ")[0] for name in raw.classes]  # "0 - zero"
    return in_memory(cfg, images, raw.targets, 10, classes, "padded from 28x28" if side > 28 else None)


def fashion_mnist(cfg: Any) -> ImageSet:
    """60,000 pieces of clothing, 28x28 grey, 10 classes; padded as mnist is."""
    return mnist(cfg, "FashionMNIST")


def cifar10(cfg: Any, num_classes: int = 10) -> ImageSet:
    """50,000 photographs, 32x32 colour, 10 classes."""
    raw = _torchvision(cfg, f"CIFAR{num_classes}", f"cifar-{num_classes}-python.tar.gz")
    images = torch.from_numpy(raw.data).permute(0, 3, 1, 2)
    return in_memory(cfg, images, raw.targets, num_classes, getattr(raw, "classes", ()))


def cifar100(cfg: Any) -> ImageSet:
    """50,000 photographs, 32x32 colour, 100 classes."""
    return cifar10(cfg, 100)


def _given_path(cfg: Any, folder: bool) -> str:
    """data.path, which must exist and be of the right kind."""
    what = "a folder" if folder else f"a .{cfg.name} file"
    if not cfg.path:
        raise ConfigError(f"data.path: data.name: {cfg.name} reads {what}; set data.path to it")
    path = os.fspath(cfg.path)
    if not os.path.exists(path):
        raise ConfigError(f"data.path: {path} does not exist; set it to {what}")
    if folder != os.path.isdir(path):
        kinds = {".npz": "npz", ".npy": "npz", ".zip": "zip", ".tar": "tar", ".parquet": "parquet"}
        other = "folder" if os.path.isdir(path) else kinds.get(os.path.splitext(path)[1].lower())
        advice = f"correct it, or set data.name: {other}" if other else f"what can be read: {arrays.READ}"
        raise ConfigError(f"data.path: {path} is not {what}; {advice}")
    if not folder and not os.path.isfile(path):
        raise ConfigError(f"data.path: {path} is not a regular file; set it to {what}")
    return path


def folder(cfg: Any) -> ImageSet:
    """A tree of images. Where all lie in subfolders, the top ones are the classes, numbered in sorted order.

    A dataset.json, as in EDM's zips, goes before the subfolders.
    """
    found, labelled = finding.in_folder(_given_path(cfg, folder=True), cfg.on_broken, cfg.conditional)
    return from_files(cfg, found, *labelled)


# Super-class -> its classes' places among ImageNet-1k's sorted class folders
IMAGENET9 = {
    "dog": (151, 207, 234, 235, 254),
    "cat": (281, 282, 283, 284, 285),
    "frog": (30, 31, 32),
    "turtle": (33, 34, 35, 36, 37),
    "bird": (89, 90, 94, 96, 97),
    "monkey": (372, 373, 374, 375, 378),
    "fish": (393, 394, 395, 396, 397),
    "crab": (118, 119, 120, 121),
    "insect": (306, 307, 308, 309, 310),
}


def imagenet9(cfg: Any) -> ImageSet:
    """Nine super-classes, 42 classes of ImageNet-1k's train folder; label 0 is dog, 8 insect, as in IMAGENET9."""
    path = _given_path(cfg, folder=True)
    classes = [entry.name for entry in finding.entries(path) if entry.is_dir()]
    if len(classes) != 1000:
        raise ConfigError(
            f"data.path: {path} has {len(classes)} class folders; ImageNet-1k's train folder, which imagenet9 is read "
            "from, has 1000 (n01440764 to n15075141)"
        )
    label_of = {classes[place]: label for label, places in enumerate(IMAGENET9.values()) for place in places}
    walk = finding.Walk(path)
    names = [name for folder_name in sorted(label_of) for name in walk.names(folder_name)]
    labels = np.array([label_of[name.split("/")[0]] for name in names], np.int64)
    found = files.Files(path, names, zipped=False, on_broken=cfg.on_broken, left_out=walk.left_out)
    return from_files(cfg, found, labels, list(IMAGENET9))


def zip_(cfg: Any) -> ImageSet:
    """EDM's format: images and, if labelled, dataset.json: {"labels": [["00000/img0.png", 6], ...]}, or null."""
    found, labelled = finding.in_zip(_given_path(cfg, folder=False), cfg.on_broken, cfg.conditional)
    return from_files(cfg, found, *labelled)


def npz(cfg: Any) -> ImageSet | VectorSet:
    """An array `images`, uint8, NHWC or NCHW or NHW, and optional `labels`, integers (N,) or (N, 1) or one-hot (N, K).

    They may also be called arr_0 and arr_1, train_images and train_labels (MedMNIST) or x_train and y_train (Keras). Or
    an array `vectors` of floats: see vectors.from_arrays. An npy holds images or vectors alone.
    """
    path = _given_path(cfg, folder=False)
    found = arrays.read(path, cfg.memory_gb * 2**30)
    if found["vectors"] is not None:
        return vectors.from_arrays(cfg, path, found)
    images, left_out = arrays.images_in(path, found), {}
    try:
        labelled = arrays.labels_in(path, found)
    except ConfigError as error:
        if cfg.conditional:
            raise
        labelled, left_out = (None, 0), {unused(error): 1}
    dataset = in_memory(cfg, images, *labelled)
    dataset.left_out = left_out
    return dataset


def tar(cfg: Any) -> ImageSet:
    """WebDataset's shards, plain tars: 000123.jpg and its label in 000123.cls, .json ("label") or .txt.

    The order is data.order's, exactly, as of any other set: headers are read once, where they say is kept under
    data.dir, and each image is then read from its place.
    """
    found, labelled = shards.opened(cfg, tars)
    return from_files(cfg, found, *labelled)


def parquet(cfg: Any) -> ImageSet:
    """The Hub's files: a column of encoded images (bytes, or a struct with them), and one of labels if there is one.

    The order is data.order's, exactly: their images are unpacked once, still encoded, to data.dir, which needs as much
    room as they have, and each is read from its place there.
    """
    found, labelled = shards.opened(cfg, parquets)
    return from_files(cfg, found, *labelled)


def latents(cfg: Any) -> LatentSet:
    """Latents of a frozen autoencoder: encode.py's file, EDM2's zip, or LightningDiT's shards, by their content."""
    return open_latents(cfg)


# What data.name can be -> its function, of the same name
DATASETS = {
    function.__name__.rstrip("_"): function
    for function in (
        digits,
        mnist,
        fashion_mnist,
        cifar10,
        cifar100,
        imagenet9,
        folder,
        zip_,
        npz,
        tar,
        parquet,
        latents,
    )
}
