"""What was read, as facts for a log and a checkpoint, and as the line that a run begins with."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from sources.files import BrokenImage, Files, show

HASHED = 2**30  # bytes of a dataset in memory that are hashed: of a larger one, samples spread over it
FILES_HASHED, HEAD = 1024, 2**18  # files whose first bytes are hashed, and how many bytes of each
LISTED = 10  # classes in the line


def of_tensors(*tensors: torch.Tensor | None) -> str:
    """A fingerprint of data in memory: 16 hex digits, the same on every machine and rank."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            step = max(1, math.ceil(tensor.numel() * tensor.element_size() / HASHED))
            for part in tensor[::step].split(4096):
                digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def of_files(files: Files, labels: torch.Tensor | None) -> str:
    """A fingerprint of files: the sizes of all, in order, and the first bytes of up to 1024 spread evenly over them;
    in a zip the check sums of all. Not their names or times, nor where they lie.
    """
    digest = hashlib.sha256(b"" if labels is None else labels.numpy().tobytes())
    if files.zipped:
        members = map(files.archive().getinfo, files.names)
        digest.update(repr([(info.file_size, info.CRC) for info in members]).encode())
        return digest.hexdigest()[:16]
    looked_at = set(range(0, len(files.names), max(1, math.ceil(len(files.names) / FILES_HASHED))))
    for index in range(len(files.names)):
        digest.update(b"%d " % files.size(index))
        if index in looked_at:
            try:
                with files.stream(index) as file:
                    digest.update(file.read(HEAD))
            except OSError:  # said when it is decoded
                digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def identity(facts: dict[str, Any]) -> dict[str, Any]:
    """Of facts, what a resumed run must find again: for its checkpoint."""
    classes = facts["classes"]
    return {
        "count": facts["count"],
        "size": facts["size"],
        "channels": facts["channels"],
        "classes": None if classes is None else list(classes),
        "counts": None if classes is None else list(classes.values()),
        "fingerprint": facts["fingerprint"],
    }


def told(facts: dict[str, Any], kind: str) -> str:
    """`data: 12,345 images of 32x32 RGB from photos (resized from 640x480), 2 classes: cat 4, ...; left out: ...`"""
    size = "x".join(map(str, facts["size"]))
    colours = {1: " grey", 3: " RGB", None: ""}[facts["channels"]]
    line = f"data: {facts['count']:,} {kind} of {size}{colours} from {show(facts['from'])}"
    if facts["resize"]:
        line += f" ({facts['resize']})"
    line += "" if facts["given"] is None else f", {facts['given']}"
    if facts["classes"]:
        classes = facts["classes"]
        line += f", {len(classes):,} class{'es' if len(classes) > 1 else ''}: {_listed(_counted(classes))}"
        if empty := [name for name, count in classes.items() if not count]:
            line += f"; class{'es' if len(empty) > 1 else ''} {_listed(empty)} ha{'ve' if len(empty) > 1 else 's'} "
            line += "no images"
    if facts["left_out"]:
        line += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in facts["left_out"].items())
    return line


def _counted(classes: dict[str, int]) -> list[str]:
    return [f"{name} {count:,}" for name, count in classes.items()]


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def sizes(found: Iterable[tuple[int, int]], resolution: int) -> str | None:
    """`resized from 640x480 and others`, of some images' (width, height); None where they need not be."""
    others = [size for size in dict.fromkeys(found) if size != (resolution, resolution)]
    if not others:
        return None
    return f"resized from {others[0][0]}x{others[0][1]}{' and others' if len(others) > 1 else ''}"


def range_warning(dataset: Any) -> str | None:
    """What to say of images that use little of the range 0 to 255, as 12-bit data in 16-bit files do; else None."""
    rows = range(0, len(dataset), max(1, math.ceil(len(dataset) / (64 if dataset.images is None else 4096))))
    low, high = 255, 0
    for row in rows:
        try:
            image = dataset.files.decode(row) if dataset.images is None else dataset.images[row]
        except BrokenImage:
            continue
        low, high = min(low, int(image.min())), max(high, int(image.max()))
    if high - low > 128 or low > high:
        return None
    within = f"no image exceeds {high / 255:.0%}"
    if high > 128:
        within = f"the images lie within {low / 255:.0%} to {high / 255:.0%}"
    source = dataset.source
    if source is None or not source.deep or source.white:
        return f"warning: data.path: {within} of the range 0 to 255; scale them to it"
    bits = math.ceil(math.log2(max(high - 0.5, 0.5) * 257 + 1))
    advice = f"where white is lower than 65535 in them, set it: data.white_level={2**bits - 1}"
    return f"warning: data.path: {within} of the 16-bit range; {advice}"
