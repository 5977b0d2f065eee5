"""Which noise levels or times sample best, and what more steps bring: generate.py's --search-sigmas and --sweep."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sampler
from checkpoints.disk import write_atomically
from config import Config, ConfigError
from metrics import pictures, scores
from metrics.common import progress
from sampling import plan

if TYPE_CHECKING:
    from sampling.drawing import Drawing
    from sources.images import ImageSet


def search(
    drawing: Drawing, steps: int, cfg: Config, dataset: ImageSet | None, device: torch.device, path: Path, step: int
) -> None:
    """Find the levels of 2 to `steps` evaluations with the lowest score, print every trial, and store the best.

    The drawing's seed and number of samples are those of every trial, so that trials compare. path: the store that
    `found` reads. step: the checkpoint's.
    """
    clock = plan.clock(cfg)
    levels = plan.LEVELS[clock]
    if drawing.solver == "heun":
        raise ConfigError(f"--search-{levels}: {_not_by_heun(clock)}")
    name = next((name for name in ("fid", "kid") if name in cfg.metrics.scores), None)
    if name is None:
        raise ConfigError(f"metrics.scores: {cfg.metrics.scores} holds neither fid nor kid, which the search lowers")
    settings = cfg.metrics.model_copy(update={"scores": [name]})

    def score(tried: list[float]) -> float:
        images = replace(drawing, levels=tried).stream()
        value = scores.score(images, dataset, settings, cfg.data.dir, device, of_class=drawing.of_class)[name]
        bar.update()
        say(f"  {value:10.4g}   {_short(tried)}")
        return value

    def say(line: str) -> None:
        bar.write(line)  # above the bar
        sys.stdout.flush()

    how = f"{scores.features_name(settings)}, {scores.reference(settings, dataset, drawing.of_class)}"
    print(f"{drawing.num:,} samples a trial, seed {drawing.seed}{drawing.asked()}; {how}")
    print(f"  {name:>10}   levels")
    top, low = plan.highest_level(cfg), plan.lowest_level(cfg)
    with progress("search", 1 + (steps - 1) * _trials(low, top, clock), "trial") as bar:
        score([top])
        for found, value in sampler.search_levels(score, steps, top, low, clock=clock):
            entry = {levels: found, name: value, "features": scores.features_name(settings), "samples": drawing.num}
            entry |= {"seed": drawing.seed, "step": step} | ({"solver": drawing.solver} if clock == "time" else {})
            remember(path, len(found), entry)
            bar.total = bar.n + (steps - len(found)) * _trials(low, found[-1], clock)
            say(f"--steps {len(found)}: {_short(found)}: {name} {value:.4g}, kept in {path}")


def sweep(
    drawing: Drawing, plans: dict[int, Any], cfg: Config, dataset: ImageSet | None, device: torch.device, path: Path
) -> None:
    """Score with each number of steps; a table, and a plot of the first score, the picture `path`.

    plans: steps -> (levels, solver).
    """
    if drawing.solver == "heun":
        raise ConfigError(f"--sweep: {_not_by_heun(plan.clock(cfg))}")
    rows: dict[int, dict[str, float]] = {}
    how = f"{scores.features_name(cfg.metrics)}, {scores.reference(cfg.metrics, dataset, drawing.of_class)}"
    print(f"{drawing.num:,} samples, seed {drawing.seed}{drawing.asked()}; {how}")
    with progress("sweep", sum(plans), "evaluation") as bar:
        for steps, (levels, solver) in plans.items():
            trial = replace(drawing, levels=levels, solver=solver)
            rows[steps] = scores.score(
                trial.stream(), dataset, cfg.metrics, cfg.data.dir, device, of_class=drawing.of_class
            )
            if len(rows) == 1:
                bar.write("steps" + "".join(f"{name:>11}" for name in rows[steps]) + "   levels")
            values = "".join(f"{value:11.4g}" for value in rows[steps].values())
            bar.write(f"{steps:5}{values}   {_short(levels)}  ({trial.speed()})")
            sys.stdout.flush()
            bar.update(steps)
    name = next(iter(rows[steps]))
    title = f"{name} ({scores.features_name(cfg.metrics)}, {drawing.num:,} samples{drawing.asked()})"
    values = [row[name] for row in rows.values()]
    pictures.write_png(pictures.plot(list(rows), values, "evaluations of the network for a sample", title), path)
    print(f"written: {path}")


def _trials(low: float, high: float, clock: str) -> int:
    """About how many levels between two a golden-section search tries: each narrows what is left to 0.618 of it."""
    width = math.log(high / low) if clock == "sigma" else high - low
    return 2 + max(0, math.ceil(math.log(width / sampler.TOLERANCE[clock]) / math.log(1.618)))


def _not_by_heun(clock: str) -> str:
    solver = {"sigma": "multistep", "time": "jumps"}[clock]
    return f"this config samples by Heun's method; set sample.solver={solver}"


# sigmas.json in the run folder: {"2": {"sigmas": [80.0, 0.83], "fid": ..., "step": ...}, ...}; of a flow map times.json


def store(ckpt: str, clock: str = "sigma") -> Path:
    """sigmas.json (clock "time": times.json) of the run that a checkpoint belongs to."""
    folder = Path(ckpt).parent
    return (folder.parent if folder.name == "checkpoints" else folder) / f"{plan.LEVELS[clock]}.json"


def found(path: Path, steps: int, top: float, solver: str = "multistep") -> dict[str, Any] | None:
    """What a search found for `steps` evaluations by `solver`, or None. ConfigError for a store that makes no sense."""
    entry = _read(path).get(str(steps))
    if entry is None or (isinstance(entry, dict) and entry.get("solver", solver) != solver):
        return None
    levels = entry.get(path.stem) if isinstance(entry, dict) else None
    numbers = isinstance(levels, list) and all(type(s) in (int, float) for s in levels) and len(levels) == steps
    if not numbers or levels != sorted(set(levels), reverse=True) or not 0 < levels[-1] <= levels[0] <= top:
        raise ConfigError(f"{path}: the levels for {steps} steps make no sense here; search again or delete the file")
    return entry


def remember(path: Path, steps: int, entry: dict[str, Any]) -> None:
    """Put a result in the store, beside those for other numbers of steps."""
    entries = {**_read(path), str(steps): entry}
    lines = ",\n".join(f' "{key}": {json.dumps(entries[key])}' for key in sorted(entries, key=int))
    write_atomically(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))


def describe(entry: dict[str, Any]) -> str:
    """How levels were found: 'fid 1.2 on classifier features, 5000 samples, seed 0, step 3000'."""
    name = "fid" if "fid" in entry else "kid"
    value, features, samples = entry.get(name, float("nan")), entry.get("features"), entry.get("samples")
    return f"{name} {value:.4g} on {features}, {samples} samples, seed {entry.get('seed')}, step {entry.get('step')}"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        entries = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(entries, dict) and all(key.isdecimal() for key in entries):
            return entries
    raise ConfigError(f"{path}: is no list of levels; delete it, and search again")


def _short(levels: list[float]) -> str:
    return ", ".join(f"{level:.4g}" for level in levels)
