"""Scores of generated images against the training set.

torch-fidelity computes the figures; this file gives it the images, the features and a cache. Features are those of
published networks (`inception`: the FID of papers; `dinov2`, `clip`) or of a small classifier of the training set's own
labels (`classifier`: for digits and other images on which Inception says little). Figures on different features do not
compare, nor do the figures of two classifiers: print `features_name` beside every one.
"""

import contextlib
import hashlib
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached
from tqdm import tqdm

import config
from metrics.classifier import MAX_SIZE, classifier_weights
from metrics.common import Images, ImageSet, Log, ScoreError, class_name, fetch, one_line, progress, spread
from metrics.weights import CLIP, DINOV2, published_weights

FEATURES = {  # metrics.features -> torch-fidelity's extractor, its name for people, and what it resizes images to
    "classifier": ("classifier", "classifier features", None),
    "inception": ("inception-v3-compat", "Inception features", 299),
    "dinov2": (DINOV2, "DINOv2 ViT-B/14 features", 224),
    "clip": (CLIP, "CLIP ViT-B/32 features", 224),
}
KEYS = {  # ours -> torch-fidelity's, by the metric that gives them
    "fid": {"fid": "frechet_inception_distance"},
    "kid": {"kid": "kernel_inception_distance_mean"},
    "isc": {"isc": "inception_score_mean"},
    "prc": {"precision": "precision", "recall": "recall"},
}


def features_name(metrics_cfg: config.Metrics) -> str:
    """Which features the figures are on, as 'classifier features'."""
    return FEATURES[metrics_cfg.features][1]


def describe(
    scores: dict[str, float],
    metrics_cfg: config.Metrics,
    count: int,
    asked: str = "",  # what the samples were asked for, after a comma
    against: str = "",  # what `reference` says
) -> str:
    """One line for people: 'fid 1.23, precision 0.71, recall 0.64 (classifier features, 5,000 samples)'."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return f"{figures} ({features_name(metrics_cfg)}, {count:,} samples{asked}{against and f'; {against}'})"


def reference(metrics_cfg: config.Metrics, dataset: ImageSet | None, of_class: int | None = None) -> str:
    """What samples are scored against, in words: 'against the 183 images of class 3 in digits, 8 pixels'.

    And what the features' network resizes both to, where it does. `dataset` and `of_class` as for `score`.
    """
    size, note = FEATURES[metrics_cfg.features][2], ""
    if size is not None:
        note = f", both resized to {size} pixels (bilinear, as TensorFlow 1)"
    elif dataset is not None and dataset.resolution > MAX_SIZE:
        note = f", both shrunk to {MAX_SIZE} pixels (area)"
    if metrics_cfg.reference is not None:
        return f"against the statistics in {metrics_cfg.reference}{note}"
    own = dataset if of_class is None else OfClass(dataset, of_class)
    which = dataset.path or getattr(dataset.source, "path", None) or dataset.name
    if of_class is not None:
        which = f"{class_name(of_class, dataset.classes)} in {which}"
    size = f"{dataset.resolution} pixels" + (f" ({dataset.resize})" if dataset.resize else "")
    return f"against the {len(own):,} images of {which}, {size}{note}"


def better(new: dict[str, float], old: dict[str, float]) -> bool:
    """Whether the first figure of `new` beats that of `old`: distances are better lower, the others higher."""
    name = next(iter(new))
    if not math.isfinite(old[name]):
        return math.isfinite(new[name])
    return new[name] < old[name] if name in ("fid", "kid", "w2") else new[name] > old[name]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two sets of uint8 images (N, C, H, W), the mean over images.

    10 log10(255^2 / MSE); an image's MSE counts as at least 1/12, that of rounding, so that equal ones stay finite.
    """
    errors = torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)])
    return float((10 * (255**2 / errors.clamp(min=1 / 12)).log10()).mean())


def score(
    samples: Images,
    dataset: ImageSet | None,  # the training set; None is enough where metrics.reference is set
    metrics_cfg: config.Metrics,
    cache_dir: str | Path,
    device: str | torch.device,
    batch_size: int = 64,
    log: Log = print,
    of_class: int | None = None,  # against the training images of this class alone
) -> dict[str, float]:
    """Scores samples against the training set, or against `metrics.reference` where that is set (fid alone).

    Samples are read once, batch by batch, in order, so that they can be drawn or decoded on the way.
    Returns `fid` (2206.00364's measure; lower is better), `kid` (mean), `isc` (mean; higher is better), `precision` and
    `recall`, as `metrics.scores` asks. cache_dir keeps the classifier and the reference statistics. The global random
    state is left as it was. Raises ScoreError.
    """
    device = torch.device(device)
    check_samples(samples, dataset)
    own = reference_images(dataset, metrics_cfg, of_class)
    features, reference = metrics_cfg.features, metrics_cfg.reference
    if reference is not None and (features != "inception" or list(metrics_cfg.scores) != ["fid"]):
        raise ScoreError(
            "metrics.reference holds only the statistics of Inception features: "
            "set metrics.features=inception and metrics.scores=[fid], or metrics.reference=null"
        )
    cache, rgb = Path(cache_dir), features != "classifier"
    statistics = None if reference is None else read_reference(reference)  # what is wrong is said before the sampling
    with quiet(device):
        key = file_name(dataset) if reference is None else None
        if features == "classifier":
            weights, identity = classifier_weights(dataset, key, cache, device, log)
        else:
            weights, identity = published_weights(features, metrics_cfg.weights, log)
        options: dict[str, Any] = {
            "input1": FidelityImages(samples, rgb, "scoring"),
            "feature_extractor": FEATURES[features][0],
            "feature_extractor_weights_path": None if weights is None else str(weights),
            "batch_size": batch_size,
            "cuda": device.type == "cuda",
            "save_cpu_ram": True,  # no worker processes, distances by blocks
            "prc_batch_size": 2000,
            "verbose": False,
        }
        if statistics is not None:
            own_statistics = inception_statistics(options)
            return {"fid": fid_statistics_to_metric(own_statistics, statistics, verbose=False)[KEYS["fid"]["fid"]]}
        name = f"{key}-{identity}" if of_class is None else f"{key}-class{of_class}-{identity}"
        remove_damaged(cache / "fidelity", name, log)
        result = torch_fidelity.calculate_metrics(
            **options,
            **{name: True for name in metrics_cfg.scores},
            input2=FidelityImages(own, rgb, "reference statistics"),
            input2_cache_name=name,
            cache_root=str(cache / "fidelity"),
            kid_subset_size=min(1000, len(samples), len(own)),
        )
    return {ours: float(result[theirs]) for name in metrics_cfg.scores for ours, theirs in KEYS[name].items()}


class OfClass:
    """The images of one class in a labelled ImageSet."""

    def __init__(self, dataset: ImageSet, of_class: int) -> None:
        self.dataset = dataset
        self.rows = (torch.as_tensor(dataset.labels).cpu() == of_class).nonzero().flatten()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) for int64 (B,) indices."""
        return fetch(self.dataset, self.rows[indices.cpu()])


def reference_images(dataset: ImageSet | None, metrics_cfg: config.Metrics, of_class: int | None) -> Images:
    """What samples are compared with: the dataset, or its images of a class. Raises ScoreError where it has none."""
    if of_class is None:
        return dataset
    whole, name = "leave out --class, or --calc_fid", class_name(of_class, dataset and dataset.classes)
    if metrics_cfg.reference is not None:
        why = f"{metrics_cfg.reference} holds the statistics of all classes together"
        raise ScoreError(f"{name} alone has no reference: {why}; set metrics.reference=null, or {whole}")
    if dataset.labels is None:
        raise ScoreError(f"{name} alone has no reference: the training set {dataset.name} has no labels; {whole}")
    own = OfClass(dataset, of_class)
    if len(own) < 10:
        raise ScoreError(f"{len(own)} training images of {name} are too few to score against: {whole}")
    return own


def check_samples(samples: Images, dataset: ImageSet | None) -> None:
    """Raises ScoreError for samples that cannot be compared with the dataset."""
    if len(samples) < 10:
        raise ScoreError(f"{len(samples)} samples are too few to score: make at least 10 (papers use 50,000)")
    first = fetch(samples, torch.tensor([0]))[0]
    shape = tuple(first.shape)
    if dataset is None:
        if first.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3):
            raise ScoreError(f"samples are {first.dtype} of shape {shape}: they must be torch.uint8 (1 or 3, H, W)")
        return
    if len(dataset) < 10:
        raise ScoreError(f"{len(dataset)} training images are too few to score against: at least 10 are needed")
    wanted = (dataset.channels, dataset.resolution, dataset.resolution)
    if shape != wanted or first.dtype != torch.uint8:
        raise ScoreError(
            f"samples are {first.dtype} of shape {shape} (channels, height, width), "
            f"but the training set {dataset.name} is torch.uint8 of shape {wanted}: both must be alike"
        )


def remove_damaged(cache: Path, name: str, log: Log) -> None:
    """Delete cached statistics that are not whole, or hold more than arrays: torch-fidelity would unpickle anything."""
    make_array = np.zeros(1).__reduce__()[0]  # its module's name changes with numpy's version
    arrays = [make_array, np.ndarray, np.dtype, type(np.dtype(np.float32)), type(np.dtype(np.float64))]
    for path in cache.glob(f"{name}-*.pt"):
        try:
            with zipfile.ZipFile(path) as archive, torch.serialization.safe_globals(arrays):
                damaged = archive.testzip()
                torch.load(path, map_location="cpu", weights_only=True)
            if damaged is None:
                continue
            reason = f"the checksum of {damaged} is wrong"
        except Exception as error:  # whatever is wrong with a cached file, a new one mends it
            reason = one_line(error)
        log(f"cached statistics {path} cannot be read ({reason}): computing them again")
        path.unlink()


def read_reference(path: str | Path) -> dict[str, np.ndarray]:
    """Reference statistics as EDM publishes them: an npz with `mu` (2048,) and `sigma` (2048, 2048); float64.

    Raises ScoreError for another file, and for numbers that are no mean and covariance.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            mu, sigma = (file[name].astype(np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ScoreError(f"metrics.reference={path} is no npz with mu and sigma: {one_line(error)}") from None
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise ScoreError(f"metrics.reference={path}: mu must be (2048,) and sigma (2048, 2048)")
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    if not (finite and np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6) and (np.diag(sigma) >= 0).all()):
        raise ScoreError(f"metrics.reference={path}: mu and sigma are no mean and covariance; get the file again")
    return {"mu": mu, "sigma": sigma}


def inception_statistics(options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mean `mu` (2048,) and covariance `sigma` (2048, 2048), of n - 1, of input1's Inception features; float64 sums."""
    extractor = create_feature_extractor(options["feature_extractor"], ["2048"], **options)
    features = extract_featuresdict_from_input_id_cached(1, extractor, **options)["2048"]
    return fid_features_to_statistics(features.double())


class FidelityImages(Dataset[torch.Tensor]):
    """Images as the Dataset that torch-fidelity reads, by whole batches, from first to last; a bar says how far."""

    def __init__(self, images: Images, rgb: bool, what: str) -> None:
        self.images, self.rgb, self.what = images, rgb, what
        self.bar: tqdm | None = None  # while they are read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if self.bar is None:
            self.bar = progress(self.what, len(self))
        images = fetch(self.images, torch.tensor(indices))
        self.bar.update(len(images))
        if self.bar.n >= len(self):
            self.bar.close()
            self.bar = None
        return list(images.expand(-1, 3, -1, -1) if self.rgb else images)


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """No warnings of torch-fidelity's; the global random state restored; the right GPU; gradients as training needs."""
    cuda = device.type == "cuda"
    gpu = torch.cuda.device(device) if cuda else contextlib.nullcontext()
    with gpu, torch.random.fork_rng([torch.cuda.current_device()] if cuda else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.inference_mode(False), torch.enable_grad():
            yield


def file_name(dataset: ImageSet) -> str:
    """A name for cached files: the dataset's name and a hash of what is in it.

    Hashed: number and shape of images, all labels, and the bytes of up to 2048 images spread evenly over the set.
    """
    digest = hashlib.sha256(repr((len(dataset), dataset.channels, dataset.resolution)).encode())
    if dataset.labels is not None:
        digest.update(torch.as_tensor(dataset.labels, dtype=torch.int64).cpu().numpy().tobytes())
    for indices in spread(len(dataset), 2048).split(256):
        digest.update(fetch(dataset, indices).contiguous().numpy().tobytes())
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in dataset.name)
    return f"{name}-{digest.hexdigest()[:16]}"
