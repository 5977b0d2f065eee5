"""Samples on disk: shards of SHARD in a folder with a manifest, so that a stopped command goes on where it was."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from checkpoints.disk import write_atomically
from config import Config, ConfigError
from sampling.choices import new_folder
from sampling.drawing import Drawing

SHARD = 1000  # samples written at a time: a folder of PNG files or an npz


def begin(args: argparse.Namespace, cfg: Config, drawing: Drawing, format: str) -> tuple[Path, list[int]]:
    """The folder for these samples, --out's if it has a part of them, and the first index of every shard it lacks."""
    if format == "grid":
        return new_folder(args, cfg), []
    manifest, out = drawing.manifest(format), Path(args.out or "")
    if args.out and (out / "manifest.json").exists():
        there = read_manifest(out)
        for name, value in manifest.items():
            if there.get(name) != value:
                what = f"{name} is {there.get(name)!r} there and {value!r} here"
                raise ConfigError(f"--out: {out} holds samples of another command: {what}; name another folder")
    else:
        out = new_folder(args, cfg)
        write_atomically(out / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    return out, missing(out, manifest)


def path(out: Path, start: int, format: str) -> Path:
    """Where the samples from `start` on are kept."""
    return out / "samples" / (f"{start:06d}.npz" if format == "npz" else f"{start:06d}")


def missing(out: Path, manifest: dict[str, Any]) -> list[int]:
    """The first index of every shard that is not there."""
    starts = range(0, manifest["num"], SHARD)
    return [start for start in starts if not path(out, start, manifest["format"]).exists()]


def read_manifest(out: Path) -> dict[str, Any]:
    """What tells the samples in `out` from others. Raises ConfigError."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        missing(out, manifest)
        return manifest
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{out / 'manifest.json'}: cannot be read; name another folder") from None


def finished(out: Path) -> Path:
    """Where the samples of a folder lie: `out` itself where it has no manifest. ConfigError where some are missing."""
    if not (out / "manifest.json").exists():
        return out
    manifest = read_manifest(out)
    if lacking := missing(out, manifest):
        lack = f"{len(lacking) * SHARD:,} of its {manifest['num']:,} samples"
        again = shlex.quote(str(out))
        raise ConfigError(f"{out}: lacks up to {lack}: finish it first, by the same command with --out {again}")
    return out / "samples"
