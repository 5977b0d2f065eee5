"""Files whole or not at all, and no way out of a run's folder."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from config.errors import ConfigError


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "x+b") as file:  # x: a new file, never what a link of this name points to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, all of `content` or nothing. Raises OSError, also where `path` is a symbolic link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) < len(content):  # the disk was full halfway
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def refuse_links(folder: Path) -> None:
    """Raise ConfigError for a run folder that leads out of itself: what a run writes and removes lies in it alone."""
    names = ("config.yml", "metrics.jsonl", "sigmas.json", "checkpoints", "snapshots", "samples", "generated")
    for path in (*(folder / name for name in names), *(folder / "checkpoints").glob("*.ckpt")):
        kind = "symbolic link" if path.is_symlink() else "pipe or device"
        if path.is_symlink() or (path.exists() and not (path.is_dir() or path.is_file())):
            raise ConfigError(f"run.dir: {path} is a {kind}: refused; move what it stands for there, or name another")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for part in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        if not part.is_dir():
            part.unlink(missing_ok=True)
