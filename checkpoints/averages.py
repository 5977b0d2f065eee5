"""Snapshots of power-function averages, kept while a run goes on, and the averages of other lengths made of them.

python ema.py rebuild RUN --std 0.05 [--step K] [--out FILE]
"""

import re
from pathlib import Path
from typing import Any

import torch

from checkpoints.state import CheckpointError, config_of, load, model_from, write_state
from config import Arguments, ConfigError, command, exit_code, path_text
from ema import rebuild_weights


def main(argv: list[str] | None = None) -> int:
    """Rebuild as `argv` says. Exit code: 0 when done, 2 for bad input."""
    parser = Arguments(description="Averages of a run's weights, of another length.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("rebuild", help="make another average of the snapshots that a run with ema.std kept")
    add.add_argument("run", type=path_text, metavar="RUN", help="the folder of the run")
    add.add_argument("--std", type=float, required=True, metavar="S", help="its width as a share of the run, as 0.05")
    add.add_argument("--step", type=int, metavar="K", help="up to which step, one with a snapshot [the last]")
    out = "the checkpoint to write, a new file [RUN/checkpoints/std-S.ckpt]"
    add.add_argument("--out", type=path_text, metavar="FILE", help=out)
    args = parser.parse_args(argv)
    return exit_code(lambda: print("\n".join(rebuild(args.run, args.std, args.step, args.out))))


def save_snapshot(state: dict[str, Any], folder: Path) -> Path:
    """Write the averages of ema.std in a state as a checkpoint of their own, `folder`/step-<step>.ckpt."""
    count = len(state["config"]["ema"]["std"])
    path = folder / f"step-{state['step']:08d}.ckpt"
    kept = {name: state[name] for name in ("step", "config", "data")}
    write_state(path, {**kept, "model": {}, "ema": state["ema"][-count:], "objective": {}, "optimizer": {}})
    return path


def rebuild(run: str | Path, std: float, step: int | None = None, out: str | Path | None = None) -> list[str]:
    """Write the average of width `std` at `step`, of the snapshots in `run`/snapshots up to there, as a checkpoint.

    Returns lines for the user. Raises ConfigError.
    """
    run = Path(run)
    out = run / "checkpoints" / f"std-{std:g}.ckpt" if out is None else Path(out)
    if out.exists():
        raise ConfigError(f"{out}: is there already, and nothing is written over; name another file with --out")
    paths = snapshots(run / "snapshots")
    if not paths:
        raise ConfigError(f"{run}: has no snapshots; a run keeps them with ema.std and ema.snapshot_every")
    step = max(paths) if step is None else step
    if step not in paths:
        raise ConfigError(f"--step: {step} has no snapshot; {run} has those of {', '.join(map(str, paths))}")
    steps = sorted(k for k in paths if k <= step)
    last = load(paths[step])
    stds = config_of(last, paths[step]).ema.std
    # One batch size a run: steps tell the same as images.
    places = [(k, width) for k in steps for width in stds]
    try:
        coefficients, distance = rebuild_weights(*zip(*places, strict=True), step, std)
    except ValueError as error:
        raise ConfigError(f"--std: {error}") from None
    weights = _sum([paths[k] for k in steps], coefficients.view(len(steps), len(stds)))
    state = {**last, "model": weights, "ema": [weights]}
    model_from(state, paths[step])  # complete, and of the right shapes
    write_state(out, state)
    lines = [f"made of {len(places)} averages; its weights over the past are {distance:.1%} from those of {std:g}"]
    if distance > 0.1:
        lines.append("which is far: more snapshots (ema.snapshot_every), or two widths (ema.std), make it exact")
    sampling = command("generate.py", "--cfg", run / "config.yml", "--ckpt", out)
    return [*lines, f"written: {out}; sample it with", f"  {sampling}"]


def snapshots(folder: Path) -> dict[int, Path]:
    """Step -> the snapshot of that step, in order."""
    found = [(re.fullmatch(r"step-(\d+)\.ckpt", path.name), path) for path in sorted(folder.glob("step-*.ckpt"))]
    return {int(match[1]): path for match, path in found if match}


def _sum(paths: list[Path], coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sum of snapshots by coefficients (files, averages in each), added in float64, in the weights' dtype."""
    total: dict[str, torch.Tensor] = {}
    for path, row in zip(paths, coefficients.tolist(), strict=True):
        averages = load(path)["ema"]
        if len(averages) != len(row):
            raise CheckpointError(f"{path}: has {len(averages)} averages, and the last snapshot {len(row)}")
        for average, coefficient in zip(averages, row, strict=True):
            if total and total.keys() != average.keys():
                raise CheckpointError(f"{path}: is of another network than the last snapshot")
            for name, value in average.items():
                total[name] = total.get(name, 0) + coefficient * value.double()
    return {name: total[name].to(value.dtype) for name, value in averages[-1].items()}
