"""Tar shards in WebDataset's layout: what is called alike up to the first dot is a record (000123.jpg, 000123.cls)."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError
from sources.files import SUFFIXES, reason, show
from sources.finding import hidden
from sources.shards import Index, as_array

ENDING = ".tar"
LABELS = ("cls", "json", "txt")  # what a label is read from: the first of these that a record has one in
MAX_LABEL = 2**20  # bytes of a member that is read for a label


class Cut(Exception):
    """The archive ends in the middle, or is no archive from some place on; the message says why."""


def store(part: str, cache: Path) -> str:
    """Images are read where they are, in the shard itself."""
    return part


def name_in(part: str, number: int, start: int) -> str:
    """The member's name, from the header before its first byte (of a very long name, the first 100 letters)."""
    try:
        with open(part, "rb") as file:
            file.seek(start - tarfile.BLOCKSIZE)
            return tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
    except (OSError, tarfile.TarError):
        return f"record {number + 1}"


def index(part: str, cfg: Any, cache: Path) -> Index:
    """Where the images of a shard are, and their labels. Headers are read once, one after another; nothing is unpacked.

    A record's label is the number or text in its .cls, else "label" in its .json, else the number in its .txt. Raises
    ConfigError for a compressed archive (there is no reading at a place in it) and for two images in one record.
    """
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, dict[str, Any]] = {}
    left_out, cut, key = Counter[str](), "", ""
    with open(part, "rb") as file:
        if file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            raise ConfigError(f"data.path: {show(part)} is compressed; unpack it (gunzip) to a plain .tar")
        size = file.seek(0, 2)
        try:
            for member in _members(part):
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = base.partition(".")
                if any(map(hidden, [*folder.split("/"), base])):
                    continue
                key, kind = f"{folder}/{stem}", ending.lower().rpartition(".")[2]
                if kind in SUFFIXES and key in images:
                    raise ConfigError(
                        f"data.path: record {show(key.lstrip('/'))} in {show(part)} has two images, "
                        f"{show(images[key][2])} and {show(base)}; a record's name ends at the first dot"
                    )
                if member.offset_data + member.size > size:
                    raise Cut("the file ends within it")
                label = None
                if kind in SUFFIXES:
                    images[key] = (member.offset_data, member.size, base)
                elif kind in LABELS and member.size <= MAX_LABEL:
                    file.seek(member.offset_data)
                    label = _label(kind, file.read(member.size))
                if label is not None:
                    labels.setdefault(key, {})[kind] = label
                elif kind not in SUFFIXES:
                    left_out[f".{kind}" if kind else "without a suffix"] += 1
        except Cut as error:
            images.pop(key, None)  # its label may be in what is gone
            last = f"record {len(images) + 1}" + (f" ({show(key.lstrip('/'))})" if key else "")
            cut = f"is damaged or cut short at {last}: {error}"
    places = np.array([place[:2] for place in images.values()], np.int64).reshape(-1, 2)
    of_each = (labels.get(key, {}) for key in images)
    array, unusable = as_array([next((found[kind] for kind in LABELS if kind in found), None) for found in of_each])
    if without := len(labels.keys() - images.keys()):
        left_out["record without an image"] += without
    return Index(places, array, left_out=left_out, unusable=unusable, cut=cut)


def _members(part: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive, in order. Raises Cut where it ends before its end mark."""
    try:
        with tarfile.open(part, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # it would keep them all
                if member.isreg() and not member.issparse():
                    yield member
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or any(block):
                raise Cut("there is no end mark" if not block else "no header follows it")
    except tarfile.TarError as error:
        raise Cut(reason(error)) from error


def _label(kind: str, text: bytes) -> Any:
    """The label in a .cls, .json or .txt; None where there is none."""
    try:
        if kind == "json":
            found = json.loads(text)
            return found.get("label") if isinstance(found, dict) else None
        word = text.decode().strip()
    except (ValueError, RecursionError):
        return None
    if word.removeprefix("-").isdecimal():
        return int(word)
    return word if kind == "cls" and word else None
