"""Scores of generated images against the training set, and its nearest training images.

torch-fidelity computes the figures; this file gives it the images, the features and a cache. Features are those of
published networks (`inception`: the FID of papers; `dinov2`, `clip`) or of a small classifier of the training set's own
labels (`classifier`: for digits and other images on which Inception says little). Figures on different features do not
compare, nor do the figures of two classifiers: print `features_name` beside every one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import socket
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_FILES
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_input_id_to_statistics, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

import config
import data
from checkpoints.state import write_atomically
from metrics.classifier_network import Classifier

SILENCE = 10.0  # seconds without a byte after which a download is given up
CLASSIFIER_VERSION = 1  # raise it when the classifier or its training changes: cached ones are then left alone
CLASSIFIER_SEED = 20230303  # never the run's: every run on a dataset is scored by the same classifier
FEATURES = {  # metrics.features -> torch-fidelity's extractor, and its name for people
    "classifier": ("classifier", "classifier features"),
    "inception": ("inception-v3-compat", "Inception features"),
    "dinov2": ("dinov2-vit-b-14", "DINOv2 ViT-B/14 features"),
    "clip": ("clip-vit-b-32", "CLIP ViT-B/32 features"),
}
KEYS = {  # ours -> torch-fidelity's, by the metric that gives them
    "fid": {"fid": "frechet_inception_distance"},
    "kid": {"kid": "kernel_inception_distance_mean"},
    "isc": {"isc": "inception_score_mean"},
    "prc": {"precision": "precision", "recall": "recall"},
}
Images = Any  # uint8 (N, C, H, W), or anything with a length and batch(int64 indices (B,)) -> uint8 (B, C, H, W)


class ScoreError(RuntimeError):
    """A score that cannot be had for a reason the user can mend; the message is one line and says how."""


def features_name(metrics_cfg: config.Metrics) -> str:
    """Which features the figures are on, as 'classifier features'."""
    return FEATURES[metrics_cfg.features][1]


def describe(scores: dict[str, float], metrics_cfg: config.Metrics, count: int) -> str:
    """One line for people: 'fid 1.23, precision 0.71, recall 0.64 (classifier features, 5,000 samples)'."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return f"{figures} ({features_name(metrics_cfg)}, {count:,} samples)"


def better(new: dict[str, float], old: dict[str, float]) -> bool:
    """Whether the first figure of `new` beats that of `old`: distances are better lower, the others higher."""
    name = next(iter(new))
    if not math.isfinite(old[name]):
        return math.isfinite(new[name])
    return new[name] < old[name] if name in ("fid", "kid", "w2") else new[name] > old[name]


def score(
    samples: Images,
    dataset: data.Dataset | None,  # the training set; None is enough where metrics.reference is set
    metrics_cfg: config.Metrics,
    cache_dir: str | os.PathLike[str],
    device: str | torch.device,
    batch_size: int = 64,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Scores samples against the training set, or against `metrics.reference` where that is set (fid alone).

    Samples are read once, batch by batch, in order, so that they can be drawn or decoded on the way.
    Returns `fid` (2206.00364's measure; lower is better), `kid` (mean), `isc` (mean; higher is better), `precision` and
    `recall`, as `metrics.scores` asks. cache_dir keeps the classifier and the reference statistics. The global random
    state is left as it was. Raises ScoreError.
    """
    device = torch.device(device)
    check_samples(samples, dataset)
    features, reference = metrics_cfg.features, metrics_cfg.reference
    if reference is not None and (features != "inception" or list(metrics_cfg.scores) != ["fid"]):
        raise ScoreError(
            "metrics.reference holds only the statistics of Inception features: "
            "set metrics.features=inception and metrics.scores=[fid], or metrics.reference=null"
        )
    rgb = features != "classifier"
    with quiet(device):
        options: dict[str, Any] = {
            "input1": FidelityImages(samples, rgb),
            "feature_extractor": FEATURES[features][0],
            "batch_size": batch_size,
            "cuda": device.type == "cuda",
            "save_cpu_ram": True,  # no worker processes, distances by blocks
            "prc_batch_size": 2000,
            "verbose": False,
        }
        if reference is not None:
            weights = inception_weights(metrics_cfg.weights, log)
            return {"fid": fid_to_statistics({**options, "feature_extractor_weights_path": str(weights)}, reference)}
        key = file_name(dataset)
        weights, identity = feature_weights(metrics_cfg, dataset, key, cache_dir, device, log)
        cache = Path(cache_dir) / "fidelity"
        remove_damaged(cache, f"{key}-{identity}", log)
        result = torch_fidelity.calculate_metrics(
            **options,
            **{name: True for name in metrics_cfg.scores},
            feature_extractor_weights_path=None if weights is None else str(weights),
            input2=FidelityImages(dataset, rgb),
            input2_cache_name=f"{key}-{identity}",
            cache_root=str(cache),
            kid_subset_size=min(1000, len(samples), len(dataset)),
        )
    return {ours: float(result[theirs]) for name in metrics_cfg.scores for ours, theirs in KEYS[name].items()}


def feature_weights(
    metrics_cfg: config.Metrics,
    dataset: data.Dataset,
    key: str,
    cache_dir: str | os.PathLike[str],
    device: torch.device,
    log: Callable[[str], None],
) -> tuple[Path | None, str]:
    """The weights file for torch-fidelity (None: it finds its own), and what names the network in caches."""
    if metrics_cfg.features == "classifier":
        return classifier_weights(dataset, key, cache_dir, device, log)
    if metrics_cfg.features == "dinov2":
        return check_dinov2(metrics_cfg.weights, log), "rgb"
    find = inception_weights if metrics_cfg.features == "inception" else clip_weights
    return find(metrics_cfg.weights, log), "rgb"


def check_samples(samples: Images, dataset: data.Dataset | None) -> None:
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


def remove_damaged(cache: Path, name: str, log: Callable[[str], None]) -> None:
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


def fid_to_statistics(options: dict[str, Any], path: str | os.PathLike[str]) -> float:
    """FID to reference statistics: an npz with `mu` (2048,) and `sigma` (2048, 2048), as EDM publishes them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = {"mu": file["mu"].astype(np.float64), "sigma": file["sigma"].astype(np.float64)}
    except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ScoreError(f"metrics.reference={path} is no npz with mu and sigma: {one_line(error)}") from None
    if reference["mu"].shape != (2048,) or reference["sigma"].shape != (2048, 2048):
        raise ScoreError(f"metrics.reference={path}: mu must be (2048,) and sigma (2048, 2048)")
    extractor = create_feature_extractor(options["feature_extractor"], ["2048"], **options)
    statistics = fid_input_id_to_statistics(1, extractor, "2048", **options)
    statistics = {name: value.astype(np.float64) for name, value in statistics.items()}
    return float(fid_statistics_to_metric(statistics, reference, verbose=False)["frechet_inception_distance"])


class FidelityImages(Dataset[torch.Tensor]):
    """Images as the Dataset that torch-fidelity reads, by whole batches."""

    def __init__(self, images: Images, rgb: bool) -> None:
        self.images, self.rgb = images, rgb

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        images = fetch(self.images, torch.tensor(indices))
        if self.rgb and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return list(images)


def fetch(images: Images, indices: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, C, H, W) on the CPU."""
    if isinstance(images, torch.Tensor):
        return images[indices.to(images.device)].cpu()
    return images.batch(indices).cpu()


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """No warnings of torch-fidelity's; the global random state restored; the right GPU; gradients as training needs."""
    cuda = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if cuda else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def file_name(dataset: data.Dataset) -> str:
    """A name for cached files: the dataset's name and a hash of what is in it.

    Hashed: number and shape of images, all labels, and the bytes of up to 2048 images spread evenly over the set.
    """
    digest = hashlib.sha256(repr((len(dataset), dataset.channels, dataset.resolution)).encode())
    if dataset.labels is not None:
        digest.update(torch.as_tensor(dataset.labels, dtype=torch.int64).cpu().numpy().tobytes())
    spread = torch.linspace(0, len(dataset) - 1, min(len(dataset), 2048), dtype=torch.float64).round().long()
    for indices in spread.split(256):
        digest.update(fetch(dataset, indices).contiguous().numpy().tobytes())
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in dataset.name)
    return f"{name}-{digest.hexdigest()[:16]}"


# Published networks ---------------------------------------------------------------------------------------------------


def inception_weights(path: str | os.PathLike[str] | None, log: Callable[[str], None]) -> Path:
    """The path of torch-fidelity's Inception weights: `metrics.weights`, or torch's download folder (fetched once)."""
    found, advice = find_weights("Inception", URL_INCEPTION_V3, URL_INCEPTION_V3.rsplit("/", 1)[1], path, log)
    try:  # torch-fidelity unpickles the file freely: refuse here one that holds more than tensors
        state = torch.load(found, map_location="cpu", weights_only=True)
        shape = state["fc.weight"].shape
    except Exception as error:
        raise ScoreError(f"{found} is no file of Inception weights ({one_line(error)}): {advice}") from None
    if tuple(shape) != (1008, 2048) or "Mixed_7c.branch_pool.bn.running_var" not in state:
        raise ScoreError(f"{found} holds another network than FID's Inception: {advice}")
    return found


def clip_weights(path: str | os.PathLike[str] | None, log: Callable[[str], None]) -> Path:
    """The path of OpenAI's file of CLIP ViT-B/32. It is TorchScript, which is code: only theirs is run."""
    name = FEATURES["clip"][0]
    digest = CLIP_FILES[name]["hash"]
    found, advice = find_weights("CLIP", CLIP_URLS[name], f"{name}-{digest}.pt", path, log)
    if hashlib.sha256(found.read_bytes()).hexdigest() != digest:
        raise ScoreError(f"{found} is not OpenAI's file of CLIP ViT-B/32 (its SHA-256 is another): {advice}")
    return found


def check_dinov2(path: str | os.PathLike[str] | None, log: Callable[[str], None]) -> None:
    """See that torch.hub has, or can fetch, DINOv2's code and weights. torch-fidelity takes no local file for it."""
    if path is not None:
        raise ScoreError("metrics.weights is for inception and clip: DINOv2 comes from torch.hub; set it to null")
    log(f"DINOv2 comes from torch.hub (kept in {torch.hub.get_dir()})")
    name = FEATURES["dinov2"][0]
    with mendable(
        f"DINOv2 could not be fetched (%s): fetch it on another machine and copy its {torch.hub.get_dir()} here"
    ):
        create_feature_extractor(name, ["dinov2"], cuda=False, verbose=False)


def find_weights(
    network: str, url: str, name: str, path: str | os.PathLike[str] | None, log: Callable[[str], None]
) -> tuple[Path, str]:
    """The file `path`, or torch's download `name`, fetched where it is missing; and advice for messages about it."""
    found = Path(torch.hub.get_dir()) / "checkpoints" / name if path is None else Path(path)
    advice = f"give a file got from {url} as metrics.weights=PATH"
    if path is None and not found.exists():
        download(network, url, found, log)
    if not found.is_file():
        raise ScoreError(f"no file {found}: {advice}")
    return found, advice


def download(network: str, url: str, path: Path, log: Callable[[str], None]) -> None:
    """Fetches a network's weights; the file, whose name ends in its hash, is whole or absent."""
    log(f"fetching {network}'s weights from {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    advice = f"get {url} on another machine and give it as metrics.weights=PATH"
    with mendable(f"{network}'s weights could not be fetched (%s): {advice}"):
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=False)


@contextlib.contextmanager
def mendable(message: str) -> Iterator[None]:
    """A failed download becomes a ScoreError of `message` with the reason; so do SILENCE seconds without a byte."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ScoreError(f"{message % one_line(error)}, or take metrics.features=classifier") from None
    finally:
        socket.setdefaulttimeout(before)


# The classifier -------------------------------------------------------------------------------------------------------


class ClassifierFeatures(torch_fidelity.FeatureExtractorBase):
    """The classifier's penultimate features (64) and logits, as torch-fidelity wants an extractor."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(Path(feature_extractor_weights_path))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = self.classifier(images)
        return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """What `forward` can give."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Which of them a metric reads."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """torch-fidelity asks."""
        return False


if "classifier" not in FEATURE_EXTRACTORS_REGISTRY:  # the registry outlives a reload of this module
    torch_fidelity.register_feature_extractor("classifier", ClassifierFeatures)


def classifier_weights(
    dataset: data.Dataset, key: str, cache_dir: str | os.PathLike[str], device: torch.device, log: Callable[[str], None]
) -> tuple[Path, str]:
    """The path of the dataset's classifier, trained where the cache has none, and a hash of its weights.

    The hash is part of the key of cached reference statistics: they hold for these weights alone.
    """
    if dataset.labels is None:
        raise ScoreError(
            f"metrics.features=classifier needs labels, and the training set {dataset.name} has none: "
            "take metrics.features=inception"
        )
    path = Path(cache_dir) / f"classifier-v{CLASSIFIER_VERSION}-{key}.pt"
    classifier = None
    if path.exists():
        try:
            classifier = load_classifier(path)
        except Exception as error:  # whatever is wrong with a cached file, a new one mends it
            log(f"the scoring classifier {path} cannot be read ({one_line(error)}): training it again")
    if classifier is None:
        classifier, accuracy = train_classifier(dataset, device, log)
        save_classifier(path, classifier, dataset, accuracy)
    digest = hashlib.sha256()
    for value in classifier.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return path, digest.hexdigest()[:16]


def save_classifier(path: Path, classifier: Classifier, dataset: data.Dataset, accuracy: float) -> None:
    """Writes the classifier whole or not at all."""
    state = {name: value.cpu() for name, value in classifier.state_dict().items()}
    shape = {"channels": dataset.channels, "resolution": dataset.resolution, "classes": dataset.num_classes}
    write_atomically(path, lambda file: torch.save({"state": state, "shape": shape, "accuracy": accuracy}, file))


def load_classifier(path: Path) -> Classifier:
    """Reads a classifier that `save_classifier` wrote; in evaluation mode, on the CPU."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    classifier = Classifier(**file["shape"])
    classifier.load_state_dict(file["state"])
    return classifier.eval()


def train_classifier(
    dataset: data.Dataset, device: torch.device, log: Callable[[str], None]
) -> tuple[Classifier, float]:
    """Trains the classifier on nine tenths of the labelled training set; returns it and its accuracy on the rest.

    The number of images seen is bounded, so that a large set costs no more than CIFAR-10. The same CPU gives the same
    weights, bit for bit, whatever the number of threads; the global random state is left as it was.
    """
    size, colours = len(dataset), dataset.channels
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64).cpu()
    generator = torch.Generator().manual_seed(CLASSIFIER_SEED)
    held_out, rest = torch.randperm(size, generator=generator).split([size // 10, size - size // 10])
    batch = min(128, len(rest))
    steps = min(25 * len(rest), 100_000 * colours) // batch
    log(f"training the classifier that scores {dataset.name} ({steps * batch:,} images; once, then cached)")
    start = time.perf_counter()
    with torch.random.fork_rng([]):
        torch.manual_seed(CLASSIFIER_SEED)
        classifier = Classifier(colours, dataset.resolution, dataset.num_classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1)
    order = rest[:0]
    with one_thread():
        for _ in range(steps):
            if len(order) < batch:
                order = rest[torch.randperm(len(rest), generator=generator)]
            indices, order = order[:batch], order[batch:]
            images = shift(fetch(dataset, indices), generator).to(device)
            loss = F.cross_entropy(classifier(images)[1], labels[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    with torch.no_grad():
        right = [
            (classifier(fetch(dataset, indices).to(device))[1].argmax(1).cpu() == labels[indices]).sum()
            for indices in held_out.split(512)
        ]
    accuracy = float(sum(right)) / max(len(held_out), 1)
    seconds = time.perf_counter() - start
    log(f"the classifier gets {accuracy:.2%} of {len(held_out):,} held-out images right ({seconds:.0f} s)")
    return classifier, accuracy


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """CPU work on one thread: sums in one order, and on layers this small little is lost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves each image (B, C, H, W) by up to a twelfth of its size, at least a pixel; edges are repeated."""
    count, _, height, width = images.shape
    reach = max(1, height // 12)
    moves = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    picked = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2)


# Copies ---------------------------------------------------------------------------------------------------------------


def nearest(
    samples: Images, dataset: data.Dataset, k: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest training images of each sample: distances float32 (N, k), ascending, and indices int64 (N, k).

    The distance is the root mean square difference of pixels in [0, 1], the normalised l2 of 2301.13188, section 4:
    0 is a copy; for what else counts as one see `copies`. By blocks, brute force, results on the CPU.
    """
    k = min(k, len(dataset))
    blocks = torch.arange(len(samples)).split(1024)
    distances, indices = zip(*(nearest_block(fetch(samples, rows), dataset, k, device) for rows in blocks), strict=True)
    return torch.cat(distances), torch.cat(indices)


def nearest_block(
    samples: torch.Tensor, dataset: data.Dataset, k: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest` for a block of samples: a matrix product finds candidates, plain differences measure and order them."""
    x = samples.to(device).flatten(1).float() - 128  # centred: smaller squares, less rounding
    best = torch.empty(len(x), 0, device=x.device)
    found = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for rows in torch.arange(len(dataset)).split(2048):
        y = fetch(dataset, rows).to(device).flatten(1).float() - 128
        squared = (x**2).sum(1, keepdim=True) + (y**2).sum(1) - 2 * (x @ y.T)
        best, found = torch.cat([best, squared], 1), torch.cat([found, rows.to(device).expand(len(x), -1)], 1)
        best, keep = best.topk(min(k + 8, best.shape[1]), largest=False)  # 8 to spare for ties broken by rounding
        found = found.gather(1, keep)
    exact = torch.empty(found.shape, device=x.device)
    for column in range(found.shape[1]):
        y = fetch(dataset, found[:, column].cpu()).to(device).flatten(1).float() - 128
        exact[:, column] = ((x - y) ** 2).mean(1).sqrt() / 255
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k].cpu(), found.gather(1, order)[:, :k].cpu()


def copy_threshold(dataset: data.Dataset, device: str | torch.device, share: float = 0.01) -> float:
    """The distance to a training image up to which a sample counts as a copy of it (`nearest` gives distances).

    As near as that lie only `share` of the training images to another training image, so about `share` of new images
    of the same kind would count by chance, and more copies than that are memory. Measured on up to 2,000 training
    images spread evenly over the set, each against all. Mirrored copies are not looked for.
    """
    spread = torch.linspace(0, len(dataset) - 1, min(len(dataset), 2000), dtype=torch.float64).round().long()
    distances, _ = nearest(fetch(dataset, spread), dataset, 2, device)  # the first is the image itself
    return float(distances[:, -1].quantile(share, interpolation="lower"))
