"""What lies in a folder or a zip of images: which files are images, what their classes are, what is left out."""

import contextlib
import os
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from config import ConfigError
from sources import files, labels
from sources.files import FORMATS, SUFFIXES, Files, reason, show

MAX_JSON = 512 * 2**20  # bytes of dataset.json: about ten million labels
SPLIT = re.compile(  # train, val2017, test_images, trainA, seg_train: (prefix, which split)
    r"(?:(.*)[_\- ])?(train|val|dev|eval|test|holdout)(?:ing|id|idation)?"
    r"[_\- ]?(?:set|split|data|images|imgs|[ab]|\d+)?",
    re.I,
)

Labelled = tuple[np.ndarray | None, list[str]]  # int64 (N,) and the classes' names; (None, []): no labels


def suffix(name: str) -> str:
    """png of a.PNG; "" where the name has none, as img.001 has not."""
    found = re.search(r"\.([A-Za-z]\w*)$", name)
    return found[1].lower() if found else ""


def _sniffed(file: BinaryIO) -> bool:
    """Whether a file without a suffix is an image, by its header."""
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # a hostile file can raise anything from a decoder
        return False


def is_split(name: str) -> tuple[str, str] | None:
    """(what stands before it, train, val, test, ...) of a folder's name that is a split's; else None."""
    found = SPLIT.fullmatch(name)
    return (found[1] or "", found[2].lower()) if found else None


def refuse_splits(path: str, names: list[str], settable: bool) -> None:
    """Raise ConfigError where images lie in train/ and val/ side by side: both would be trained on, as classes.

    settable: whether data.path can be set to one of them, as to a folder.
    """
    children = defaultdict(set)
    for name in names:
        folders = name.split("/")[:-1]
        for depth, folder in enumerate(folders):
            children["/".join(folders[:depth])].add(folder)
    for parent, inside in sorted(children.items()):
        parts = sorted((*split, folder) for folder in inside if (split := is_split(folder)))
        for prefix in {part[0] for part in parts}:
            split_of = {folder: kind for before, kind, folder in parts if before == prefix}
            if len(set(split_of.values())) > 1:
                first = min(split_of, key=lambda folder: (split_of[folder] != "train", folder))
                where = os.path.join(path, parent) if parent else path
                advice = f"set data.path to {show(os.path.join(where, first))}"
                if not settable or parent:
                    advice = f"keep the images of {show(first)} alone"
                held = " and ".join(map(show, sorted(split_of)))
                raise ConfigError(f"data.path: {show(where)} holds {held}: parts of a split, not classes; {advice}")


# A folder -------------------------------------------------------------------------------------------------------------


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is passed over in silence."""
    return name.startswith(".") or name == "__MACOSX"


def entries(root: str, below: str = "") -> list[os.DirEntry[str]]:
    """What lies in root/below and is not hidden, sorted by name. Raises ConfigError."""
    try:
        found = [entry for entry in os.scandir(os.path.join(root, below)) if not hidden(entry.name)]
    except OSError as error:
        raise ConfigError(f"data.path: {root}: {show(below or '.')} cannot be listed ({error.strerror})") from error
    return sorted(found, key=lambda entry: entry.name)


class Walk:
    """The images under a folder: links are followed, but never in a circle; what is no image is counted."""

    def __init__(self, root: str):
        self.root = root
        self.left_out: Counter[str] = Counter()
        self.seen: dict[str, str] = {}  # where each folder really is -> its name here

    def names(self, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
        """Names of images relative to the root, sorted. Raises ConfigError for a folder that is there twice."""
        here = os.path.realpath(os.path.join(self.root, below))
        if here in above or any(inside.startswith(os.path.join(here, "")) for inside in above):
            self.left_out["link to a folder above it"] += 1
            return
        if here in self.seen:
            both = f"{show(self.seen[here])} and {show(below)}"
            raise ConfigError(f"data.path: {both} in {self.root} are the same folder, by a link; remove one of them")
        self.seen[here] = below
        found = entries(self.root, below)
        if not found:
            self.left_out["empty folder"] += 1
        for entry in found:
            name = f"{below}/{entry.name}" if below else entry.name
            if _is(entry, "dir"):
                yield from self.names(name, (*above, here))
            else:
                yield from self.image(entry, name)

    def image(self, entry: os.DirEntry[str], name: str) -> Iterator[str]:
        """The file's name if it is an image; else it is counted."""
        ending = suffix(entry.name)
        if not _is(entry, "file"):  # a pipe or a device could be read for ever
            self.left_out["link to no file" if entry.is_symlink() else "no file"] += 1
        elif ending in SUFFIXES or (not ending and _opens(entry.path)):
            yield name
        else:
            self.left_out[f".{ending}" if ending else "without a suffix"] += 1


def _is(entry: os.DirEntry[str], what: str) -> bool:
    with contextlib.suppress(OSError):  # links in a circle
        return entry.is_dir() if what == "dir" else entry.is_file()
    return False


def _opens(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _sniffed(file)
    return False


def in_folder(path: str, on_broken: str, conditional: bool) -> tuple[Files, Labelled]:
    """The images in a folder, sorted by name, and their classes: as a dataset.json there says, else its subfolders.

    A folder that holds all images in subfolders of one subfolder is left for that one. Raises ConfigError.
    """
    walk = Walk(path)
    names = list(walk.names())
    while not (told := _told(path, walk.left_out)) and (top := _wrapping(names)):
        path, names = os.path.join(path, top), [name[len(top) + 1 :] for name in names]
    found = Files(path, names, zipped=False, on_broken=on_broken, left_out=walk.left_out)
    if told:
        return found, from_json(f"data.path: dataset.json in {path}", told, found, conditional)
    refuse_splits(path, names, settable=True)
    tops = [name.split("/")[0] for name in names if "/" in name]
    if len(tops) < len(names) or not names:
        if tops and conditional:
            loose = next(name for name in names if "/" not in name)
            raise ConfigError(
                f"data.path: {show(loose)} lies beside the class folders in {path}, and so has no label; move or "
                "remove such images, or set data.conditional: false"
            )
        return found, (None, [])
    classes = sorted(set(tops))
    number = {top: i for i, top in enumerate(classes)}
    return found, (np.array([number[top] for top in tops], np.int64), [show(top) for top in classes])


def _wrapping(names: list[str]) -> str | None:
    """The one folder that all images lie in, if they lie in subfolders of it."""
    tops = {name.split("/")[0] for name in names}
    return tops.pop() if len(tops) == 1 and all(name.count("/") > 1 for name in names) else None


def _told(path: str, left_out: Counter[str]) -> bytes | None:
    """EDM's dataset.json in an unpacked zip; None where there is no file of that name that has labels."""
    try:
        with open(os.path.join(path, "dataset.json"), "rb") as file:
            text = file.read(MAX_JSON)
    except OSError:
        return None
    if b'"labels"' not in text:
        return None
    left_out[".json"] -= 1
    return text


def from_json(where: str, text: bytes, found: Files, conditional: bool) -> Labelled:
    """labels.in_json; but labels that nobody uses (not conditional) may be anything, and are then left out."""
    try:
        return labels.in_json(where, text, found.names)
    except ConfigError as error:
        if conditional:
            raise
        found.left_out[labels.unused(error)] += 1
        return None, []


# A zip ----------------------------------------------------------------------------------------------------------------


def in_zip(path: str, on_broken: str, conditional: bool) -> tuple[Files, Labelled]:
    """The images in an archive, sorted by name, and their labels where it holds a dataset.json. Raises ConfigError."""
    try:
        info = os.stat(path)
        found = Files(path, [], zipped=True, on_broken=on_broken, stamp=(info.st_mtime_ns, info.st_size))
        archive = found.archive()
        every_name = archive.namelist()
    except Exception as error:
        raise ConfigError(f"data.path: {path} cannot be read as a zip archive ({reason(error)})") from error
    for name in every_name:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or re.match(r"[A-Za-z]:[/\\]", name):
            raise ConfigError(f"data.path: {path} is refused: its member {show(name)!r} points outside the archive")
    found.names = sorted({name for name in every_name if _is_image(archive, name, found.left_out)})
    if "dataset.json" not in every_name:
        refuse_splits(path, found.names, settable=False)
        return found, (None, [])
    where = f"data.path: dataset.json in {path}"
    try:
        text = files.read_member(archive, archive.getinfo("dataset.json"), MAX_JSON)
    except Exception as error:
        raise ConfigError(f"{where} cannot be read ({reason(error)})") from error
    return found, from_json(where, text, found, conditional)


def _is_image(archive: zipfile.ZipFile, name: str, left_out: Counter[str]) -> bool:
    parts = PurePosixPath(name).parts
    if name.endswith("/") or name == "dataset.json" or any(map(hidden, parts)):
        return False
    ending = suffix(parts[-1])
    if ending in SUFFIXES:
        return True
    if not ending and _opens_in(archive, name):
        return True
    left_out[f".{ending}" if ending else "without a suffix"] += 1
    return False


def _opens_in(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with files.open_member(archive, archive.getinfo(name), files.MAX_FILE) as member:
            return _sniffed(member)
    except Exception:  # a damaged archive can raise anything
        return False
