"""A small classifier of a training set's own labels, whose features score digits and the like: trained once, cached."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import nn
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from checkpoints.disk import write_atomically
from metrics.common import ImageSet, Log, ScoreError, fetch, one_line, progress

VERSION = 1  # raise it when the classifier or its training changes: cached ones are then left alone
SEED = 20230303  # never the run's: every run on a dataset is scored by the same classifier
FEATURES = 64  # the width of the penultimate layer: a Frechet distance on it needs only a few hundred samples
MAX_SIZE = 32  # larger images are shrunk to this by area, so that the cost does not grow with the resolution


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """uint8 images (B, channels, resolution, resolution) -> features (B, `features`) and logits (B, classes), float32.

    Convolutions down to 4x4, a linear layer to the features (normalised, ReLU; the penultimate layer), then classes.
    width: channels of the first convolution.
    """

    def __init__(self, channels: int, resolution: int, classes: int, width: int = 32, features: int = FEATURES) -> None:
        super().__init__()
        size = min(resolution, MAX_SIZE)
        stride = 2 if size > 16 else 1  # at 32x32 the first layer would cost more than all others
        layers = [conv(channels, width, stride)]
        size = -(-size // stride)
        while size > 4:
            outputs = min(2 * width, 128)
            layers += [conv(width, outputs, stride=2)]
            width, size = outputs, -(-size // 2)
            layers += [conv(width, width)] if width == 64 else []
        self.resolution = resolution
        last = nn.Linear(width * size * size, features, bias=False)
        norm = nn.BatchNorm1d(features, affine=False)  # fixes the features' scale, hence the distance's
        self.body = nn.Sequential(*layers, nn.Flatten(), last, norm, nn.ReLU())
        self.head = nn.Linear(features, classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float() / 127.5 - 1
        if self.resolution > MAX_SIZE:
            x = nn.functional.interpolate(x, size=(MAX_SIZE, MAX_SIZE), mode="area")
        features = self.body(x)
        return features, self.head(features)


class ClassifierFeatures(torch_fidelity.FeatureExtractorBase):
    """The classifier's penultimate features (64) and logits, as torch-fidelity wants an extractor."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(Path(feature_extractor_weights_path))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = self.classifier(images)
        return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    # What torch-fidelity asks: what forward can give, which of it a metric reads, and torch.compile's leave.
    get_provided_features_list = staticmethod(lambda: ("features", "logits"))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "logits" if metric == "isc" else "features")
    can_be_compiled = staticmethod(lambda: False)


if "classifier" not in FEATURE_EXTRACTORS_REGISTRY:  # the registry outlives a reload of this module
    torch_fidelity.register_feature_extractor("classifier", ClassifierFeatures)


def classifier_weights(dataset: ImageSet, key: str, cache: Path, device: torch.device, log: Log) -> tuple[Path, str]:
    """The path of the dataset's classifier, trained where the cache has none, and a hash of its weights.

    The hash is part of the key of cached reference statistics: they hold for these weights alone.
    """
    if dataset.labels is None:
        raise ScoreError(
            f"metrics.features=classifier needs labels, and the training set {dataset.name} has none: "
            "take metrics.features=inception"
        )
    path = cache / f"classifier-v{VERSION}-{key}.pt"
    classifier = None
    try:
        classifier = load_classifier(path) if path.exists() else None
    except Exception as error:  # whatever is wrong with a cached file, a new one mends it
        log(f"the scoring classifier {path} cannot be read ({one_line(error)}): training it again")
    if classifier is None:
        classifier, accuracy = train_classifier(dataset, device, log)
        state = {name: value.cpu() for name, value in classifier.state_dict().items()}
        shape = {"channels": dataset.channels, "resolution": dataset.resolution, "classes": dataset.num_classes}
        write_atomically(path, lambda file: torch.save({"state": state, "shape": shape, "accuracy": accuracy}, file))
    content = b"".join(value.cpu().numpy().tobytes() for value in classifier.state_dict().values())
    return path, hashlib.sha256(content).hexdigest()[:16]


def load_classifier(path: Path) -> Classifier:
    """Reads a classifier that `classifier_weights` wrote; in evaluation mode, on the CPU."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    classifier = Classifier(**file["shape"])
    classifier.load_state_dict(file["state"])
    return classifier.eval()


def train_classifier(
    dataset: ImageSet, device: torch.device, log: Log, seed: int = SEED, **shape: int
) -> tuple[Classifier, float]:
    """Trains the classifier on nine tenths of the labelled training set; returns it and its accuracy on the rest.

    seed: of its weights, order and shifts; shape: Classifier's `width` and `features`. Scores of runs take neither.
    The number of images seen is bounded, so that a large set costs no more than CIFAR-10. The same CPU gives the same
    weights, bit for bit, whatever the number of threads; the global random state is left as it was.
    """
    size, colours = len(dataset), dataset.channels
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64).cpu()
    generator = torch.Generator().manual_seed(seed)
    held_out, rest = torch.randperm(size, generator=generator).split([size // 10, size - size // 10])
    batch = min(128, len(rest))
    steps = min(25 * len(rest), 100_000 * colours) // batch
    log(f"training the classifier that scores {dataset.name} ({steps * batch:,} images; once, then cached)")
    start = time.perf_counter()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        classifier = Classifier(colours, dataset.resolution, dataset.num_classes, **shape).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1)
    order = rest[:0]
    with one_thread(), progress("training the classifier", steps * batch) as bar:
        for _ in range(steps):
            if len(order) < batch:
                order = rest[torch.randperm(len(rest), generator=generator)]
            indices, order = order[:batch], order[batch:]
            images = shift(fetch(dataset, indices), generator).to(device)
            loss = nn.functional.cross_entropy(classifier(images)[1], labels[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(batch)
    classifier.eval()
    with torch.no_grad():
        guesses = [classifier(fetch(dataset, rows).to(device))[1].argmax(1).cpu() for rows in held_out.split(512)]
    accuracy = float((torch.cat(guesses) == labels[held_out]).sum()) / max(len(held_out), 1)
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
