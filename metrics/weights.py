"""The published networks whose features are compared: their files found, fetched, and seen to be theirs."""

import contextlib
import hashlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_FILES
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from metrics.common import Log, ScoreError, one_line

SILENCE = 10.0  # seconds without a byte after which a download is given up
DINOV2, CLIP = "dinov2-vit-b-14", "clip-vit-b-32"  # as torch-fidelity names them


def published_weights(features: str, path: str | Path | None, log: Log) -> tuple[Path | None, str]:
    """The weights file of `metrics.features`, none of ours, for torch-fidelity; None: it finds DINOv2's own.

    And a name for what features are of: part of the key of cached reference statistics, which hold for these alone.
    path: `metrics.weights`; None: torch's download folder, fetched where it is missing. Raises ScoreError.
    """
    if features == "inception":
        return _inception(path, log)
    return {"clip": _clip, "dinov2": _dinov2}[features](path, log), "rgb"


def _inception(path: str | Path | None, log: Log) -> tuple[Path, str]:
    """torch-fidelity's Inception weights, or others of that network, whose distance is said to be no FID."""
    found, advice = find_weights("Inception", URL_INCEPTION_V3, URL_INCEPTION_V3.rsplit("/", 1)[1], path, log)
    try:  # torch-fidelity unpickles the file freely: refuse here one that holds more than tensors
        state = torch.load(found, map_location="cpu", weights_only=True)
        shape = state["fc.weight"].shape
    except Exception as error:
        raise ScoreError(f"{found} is no file of Inception weights ({one_line(error)}): {advice}") from None
    if tuple(shape) != (1008, 2048) or "Mixed_7c.branch_pool.bn.running_var" not in state:
        raise ScoreError(f"{found} holds another network than FID's Inception: {advice}")
    published, digest = URL_INCEPTION_V3.rpartition("-")[2][:8], hashlib.sha256(found.read_bytes()).hexdigest()
    if digest.startswith(published):
        return found, "rgb"
    log(f"{found} is not torch-fidelity's Inception (its SHA-256 is another): the distance is no FID; {advice}")
    return found, f"rgb-{digest[:16]}"


def _clip(path: str | Path | None, log: Log) -> Path:
    """OpenAI's file of CLIP ViT-B/32. It is TorchScript, which is code: only theirs is run."""
    digest = CLIP_FILES[CLIP]["hash"]
    found, advice = find_weights("CLIP", CLIP_URLS[CLIP], f"{CLIP}-{digest}.pt", path, log)
    if hashlib.sha256(found.read_bytes()).hexdigest() != digest:
        raise ScoreError(f"{found} is not OpenAI's file of CLIP ViT-B/32 (its SHA-256 is another): {advice}")
    return found


def _dinov2(path: str | Path | None, log: Log) -> None:
    """See that torch.hub has, or can fetch, DINOv2's code and weights. torch-fidelity takes no local file for it."""
    if path is not None:
        raise ScoreError("metrics.weights is for inception and clip: DINOv2 comes from torch.hub; set it to null")
    log(f"DINOv2 comes from torch.hub (kept in {torch.hub.get_dir()})")
    advice = f"fetch it on another machine and copy its {torch.hub.get_dir()} here"
    with mendable(f"DINOv2 could not be fetched (%s): {advice}"):
        create_feature_extractor(DINOV2, ["dinov2"], cuda=False, verbose=False)


def find_weights(network: str, url: str, name: str, path: str | Path | None, log: Log) -> tuple[Path, str]:
    """The file `path`, or torch's download `name`, fetched where it is missing; and advice for messages about it."""
    found = Path(torch.hub.get_dir()) / "checkpoints" / name if path is None else Path(path)
    advice = f"give a file got from {url} as metrics.weights=PATH"
    if path is None and not found.exists():
        download(network, url, found, log)
    if not found.is_file():
        raise ScoreError(f"no file {found}: {advice}")
    return found, advice


def download(network: str, url: str, path: Path, log: Log) -> None:
    """Fetches a network's weights; the file, whose name ends in its hash, is whole or absent."""
    log(f"fetching {network}'s weights from {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    advice = f"get {url} on another machine and give it as metrics.weights=PATH"
    hash_prefix = path.stem.rsplit("-", 1)[1]
    with mendable(f"{network}'s weights could not be fetched (%s): {advice}"):
        torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=sys.stderr.isatty())


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
