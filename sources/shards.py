"""Shards: many images in a few large files, each read alone, from its place there, in any order."""

import glob
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from config import ConfigError
from sources.files import MAX_FILE, BrokenImage, Files, keep, reason, show
from sources.finding import Labelled, hidden, is_split
from sources.labels import class_numbers, unused

log = logging.getLogger(__name__)

LONGEST = 200  # letters of a label that is text: longer ones are captions


@dataclass
class Index:
    """What one shard holds, and where."""

    places: np.ndarray  # int64 (N, 2): the first byte of each image, and how many bytes it has
    labels: np.ndarray  # int64 or text (N,); (0,): there are none
    classes: list[str] = field(default_factory=list)  # names of the labels, where the shard says them
    left_out: Counter[str] = field(default_factory=Counter)  # what is no image and no label, counted
    unusable: str = ""  # why the labels that there are cannot be used
    cut: str = ""  # why what follows cannot be read, where the file is damaged


@dataclass
class Shards(Files):
    """Images in tar or parquet shards; `names` are made when they are asked for, and nothing grows with use."""

    stores: list[str] = field(default_factory=list)  # the files that hold the images, one a shard
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))  # (N, 3): shard, first byte, bytes
    indexed: list[str] = field(default_factory=list)  # what each shard's index is kept as: see _cache_path

    def stream(self, index: int) -> IO[bytes]:
        """The image's bytes. The shard is opened for each: nothing is shared with forked processes or threads."""
        shard, start, size = self.places[index].tolist()
        if size > MAX_FILE:
            raise BrokenImage(f"it is larger than {MAX_FILE >> 20} MiB")
        with open(self.stores[shard], "rb", buffering=0) as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return int(self.places[index, 2])

    def states(self) -> Iterator[bytes]:
        """The shards' paths, sizes and times, and the column that is read."""
        yield repr(self.indexed).encode()


@dataclass
class Names(Sequence[str]):
    """What a message calls each image, looked up when it is asked for: `train-0003.tar: 000123.jpg`."""

    parts: list[str]
    places: np.ndarray
    name_in: Callable[[str, int, int], str]  # (shard, number of the image there, its first byte)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        shard, start, _ = self.places[index].tolist()
        number = int(index - np.searchsorted(self.places[:, 0], shard))
        return f"{os.path.basename(self.parts[shard])}: {self.name_in(self.parts[shard], number, start)}"


def opened(cfg: Any, kind: Any) -> tuple[Shards, Labelled]:
    """The images in the shards that data.path leads to, in the shards' order, and their labels.

    cfg: the config's `data` section. kind: the module of the format, with ENDING; index(part, cfg, cache), which reads
    where things are; store(part, cache), the file that holds the images; name_in, as Names asks. Each shard's index is
    kept under data.dir, by the shard's path, size and time. Raises ConfigError.
    """
    parts = find(cfg.path, kind.ENDING)
    indexes, stores, indexed = [], [], []
    for part in tqdm(parts, desc="indexing", unit="shard", disable=None, delay=2):
        cache = _cache_path(cfg, part, kind.ENDING)
        index = _kept(cache, kind.store(part, cache)) or _indexed(part, cfg, cache, kind)
        if index.cut and cfg.on_broken == "fail":
            raise ConfigError(f"data.path: {show(part)} {index.cut}; copy it again, or set data.on_broken: skip")
        if index.cut:
            log.warning("data.path: %s %s; the rest of it is left out", show(part), index.cut)
            index.left_out["damaged shard" if len(index.places) == 0 else "shard cut short"] += 1
        indexes.append(index)
        stores.append(kind.store(part, cache))
        indexed.append(cache.name)
    numbers = np.repeat(np.arange(len(parts)), [len(index.places) for index in indexes])
    places = np.column_stack([numbers, np.concatenate([index.places for index in indexes])]).astype(np.int64)
    left_out = sum((index.left_out for index in indexes), Counter[str]())
    names = Names(parts, places, kind.name_in)
    how = {"on_broken": cfg.on_broken, "left_out": left_out, "stores": stores, "places": places, "indexed": indexed}
    shards = Shards(os.fspath(cfg.path), names, zipped=False, **how)
    try:
        return shards, _labels(parts, indexes, names)
    except ConfigError as error:
        if cfg.conditional:
            raise
        shards.left_out[unused(error)] += 1
        return shards, (None, [])


def _labels(parts: list[str], indexes: list[Index], names: Sequence[str]) -> Labelled:
    """Class numbers int64 (N,) and the classes' names; text is numbered in sorted order. Raises ConfigError."""
    used = [(part, index) for part, index in zip(parts, indexes, strict=True) if len(index.places)]
    for part, index in used:
        if index.unusable:
            raise ConfigError(f"data.path: {show(part)} {index.unusable}")
    labelled = [part for part, index in used if len(index.labels)]
    if not labelled:
        return None, []
    without = next((part for part, index in used if not len(index.labels)), None)
    if without:
        raise ConfigError(
            f"data.path: {show(without)} has no labels, and {show(labelled[0])} has; give both or neither"
        )
    where = f"data.path: {show(labelled[0])}" + (" and others" if len(labelled) > 1 else "")
    if len({index.labels.dtype.kind for _, index in used}) > 1:
        raise ConfigError(f"{where} give numbers as labels in some shards and text in others; use one of them")
    labels = np.concatenate([index.labels for _, index in used])
    if labels.dtype.kind == "U":
        classes, labels = np.unique(labels, return_inverse=True)
        return class_numbers(where, labels)[0], [show(str(name)) for name in classes]
    labels, count = class_numbers(where, labels, lambda row: show(names[row]))
    called = used[0][1].classes
    other = next((part for part, index in used if index.classes != called), None)
    if other:
        raise ConfigError(
            f"data.path: {show(other)} and {show(used[0][0])} call their classes differently; read one set"
        )
    return labels, called if len(called) >= count else [str(i) for i in range(count)]


def as_array(labels: list[Any]) -> tuple[np.ndarray, str]:
    """A shard's labels as Index.labels, and why they cannot be used, or ""; None stands for no label."""
    none = np.empty(0, np.int64)
    if all(label is None for label in labels):
        return none, ""
    if all(type(label) is int and abs(label) < 2**62 for label in labels):
        return np.array(labels, np.int64), ""
    if all(type(label) is str and len(label) <= LONGEST for label in labels):
        return np.array(labels, np.str_), ""
    if None in labels:
        return none, f"gives no label to its record {labels.index(None) + 1}, and has labels; give all or none one"
    odd = next((label for label in labels if type(label) is not type(labels[0])), labels[0])
    return none, f"has labels that are not all whole numbers, or all short text, as {repr(odd)[:50]}"


# Which files ----------------------------------------------------------------------------------------------------------


def find(path: Any, ending: str) -> list[str]:
    """The shards of a path: one file, a folder's (subfolders too), or a pattern's ({000..049}, *), sorted but for {}.

    Raises ConfigError where there are none, where one of {} is missing, and for parts of a split side by side.
    """
    wanted = f"a folder of {ending} files, one of them, or a pattern (a-{{000..049}}{ending}, a-*{ending})"
    if not path:
        raise ConfigError(f"data.path: data.name: {ending[1:]} reads {wanted}; set data.path to it")
    path = os.fspath(path)
    if os.path.isdir(path):
        below = (os.path.join(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        parts = sorted(part for part in below if part.lower().endswith(ending) and not _is_hidden(path, part))
        if not parts:
            raise ConfigError(f"data.path: {path} holds no {ending} files; set it to {wanted}")
        _refuse_splits(path, parts, ending)
        return parts
    parts = [path] if os.path.isfile(path) else list(_expanded(path))
    for part in parts:
        if not os.path.isfile(part):
            raise ConfigError(f"data.path: {show(part)} does not exist, or is no file; set it to {wanted}")
        if not part.lower().endswith(ending):
            raise ConfigError(f"data.path: {show(part)} is not a {ending} file; data.name: {ending[1:]} reads {wanted}")
    return parts


def _is_hidden(root: str, part: str) -> bool:
    return any(map(hidden, os.path.relpath(part, root).split(os.sep)))


def _expanded(pattern: str) -> Iterator[str]:
    """a-{08..10}.tar as bash expands it, and * as it does; ends after the first file that is not there."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        yield from sorted(glob.glob(pattern)) or [pattern]
        return
    first, last = braces.groups()
    for number in range(int(first), int(last) + 1):
        one = f"{pattern[: braces.start()]}{number:0{len(first)}}{pattern[braces.end() :]}"
        for name in _expanded(one):
            yield name
            if not os.path.isfile(name):
                return


def _refuse_splits(path: str, parts: list[str], ending: str) -> None:
    """Raise ConfigError for train-... beside test-..., as the Hub has them: both would be trained on."""
    where = {}  # split -> what data.path could be
    for part in parts:
        folder, name = os.path.split(part)
        stem = re.sub(r"[-_.]?\d+([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$", "", name[: -len(ending)])
        inside = is_split(os.path.basename(folder)) if os.path.normpath(folder) != os.path.normpath(path) else None
        if split := is_split(stem):
            where.setdefault(split[1], os.path.join(folder, f"{stem}*{ending}"))
        elif inside:
            where.setdefault(inside[1], folder)
    if len(where) > 1:
        first = where.get("train") or min(where.values())
        held = " and ".join(sorted(where))
        raise ConfigError(f"data.path: {path} holds {held}: parts of a split; set data.path to {show(first)}")


# An index, kept -------------------------------------------------------------------------------------------------------


def _cache_path(cfg: Any, part: str, ending: str) -> Path:
    """Named by the shard's path, size and time, and by the columns that are read."""
    try:
        info = os.stat(part)
    except OSError as error:
        raise ConfigError(f"data.path: {show(part)} cannot be read ({error.strerror})") from error
    read = (cfg.image_column, cfg.label_column)
    made = repr((1, os.path.abspath(part), info.st_size, info.st_mtime_ns, *read)).encode()
    return Path(cfg.dir) / "cache" / f"{ending[1:]}-{hashlib.blake2b(made, digest_size=12).hexdigest()}.npz"


def _indexed(part: str, cfg: Any, cache: Path, kind: Any) -> Index:
    try:
        index = kind.index(part, cfg, cache)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"data.path: {show(part)} cannot be read ({reason(error)})") from error
    told = {name: getattr(index, name) for name in ("classes", "left_out", "unusable", "cut")}
    keep(
        cache, f"where the images of {show(part)} are", places=index.places, labels=index.labels, told=json.dumps(told)
    )
    return index


def _kept(cache: Path, store: str) -> Index | None:
    """The index as it was kept; None where it was not, or is damaged, or lacks its images."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            told = json.loads(str(arrays["told"]))
            index = Index(arrays["places"], arrays["labels"], **{**told, "left_out": Counter(told["left_out"])})
        whole = not len(index.places) or os.path.getsize(store) >= index.places.sum(1).max()
    except Exception:
        return None
    return index if whole else None
