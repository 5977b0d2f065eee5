"""How a step's cost grows with batch size, resolution and width: time and peak memory, one process for each point.

    python benchmarks/scaling.py --cfg benchmarks/cpu.yml --out benchmarks/results/scaling_cpu.json [--plot FILE.png]

Every point is benchmarks/step.py on images of noise; what is not varied is the config's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, save

import config

AXES = {"batch": "images a step", "resolution": "pixels a side", "width": "model_channels"}


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--resolution", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--width", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--at", default=32, type=int, metavar="R", help="resolution where it is not varied")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps before; 5 where the network is compiled")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    args = parser.parse_args()
    points = [("batch", n, args.at, [f"train.batch_size={n}"]) for n in args.batch]
    points += [("resolution", n, n, [f"network.attn_resolutions=[{n // 2}]"]) for n in args.resolution]
    points += [("width", n, args.at, [f"network.model_channels={n}"]) for n in args.width]
    rows = []
    for axis, value, resolution, overrides in points:
        row = {"axis": axis, "value": value, **point(args, resolution, [*args.set, *overrides])}
        print(f"{axis:10} {value:5}  {row['seconds']:8.3f} s  {row['peak_memory'] / 2**30:6.2f} GiB", flush=True)
        rows.append(row)
    save({"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "rows": rows}, args.out)
    if args.plot:
        plot(rows, args.plot)
    return 0


def point(args: argparse.Namespace, resolution: int, overrides: list[str]) -> dict[str, Any]:
    """step.py in a process of its own, whose memory is this point's alone."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, ROOT / "benchmarks" / "step.py", "--cfg", args.cfg, "--random", f"3x{resolution}"]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--brief", "--out", out]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run([*map(str, command), *overrides], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return json.loads(out.read_text())


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), sharex="col")
    for column, (axis, label) in zip(axes.T, AXES.items(), strict=True):
        own = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in own]
        column[0].plot(values, [row["seconds"] for row in own], "o-")
        column[1].plot(values, [row["peak_memory"] / 2**30 for row in own], "o-")
        column[1].set(xlabel=label)
        for cell in column:
            cell.set_xscale("log", base=2)
            cell.set_yscale("log")
            cell.yaxis.set_major_formatter("{x:g}")
            cell.yaxis.set_minor_formatter("{x:g}")
            cell.set_xticks(values, [str(v) for v in values])
    axes[0, 0].set(ylabel="seconds a step")
    axes[1, 0].set(ylabel="peak memory, GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
