"""Train methods side by side and score them in one and two steps: python benchmarks/quality.py LIST.yml --out DIR

LIST.yml names the rows: a config, overrides, and for a distilled method the row that is its teacher. A row that is
already measured is not run again. Writes results.json, table.md and curves.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
import sampler  # noqa: E402
import trainer  # noqa: E402


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", help="YAML: a list of rows {name, cfg, set: [section.key=value], teacher: name}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--threads", type=int, help="CPU threads; figures repeat bit for bit with the same number")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = yaml.safe_load(Path(args.list).read_text())
    results = args.out / "results.json"
    for seed in args.seeds:
        for row in rows:
            if args.only and row["name"] not in args.only:
                continue
            done = json.loads(results.read_text()) if results.exists() else []
            if not any((r["name"], r["seed"]) == (row["name"], seed) for r in done):
                measured = measure(row, seed, args.out)
                done = json.loads(results.read_text()) if results.exists() else []
                text = json.dumps([*done, measured], indent=1).encode()
                checkpoint.write_atomically(results, lambda file, text=text: file.write(text))
                print(json.dumps(measured), flush=True)
    write_table(json.loads(results.read_text()), args.out / "table.md")
    write_curves(json.loads(results.read_text()), args.out)
    return 0


def measure(row: dict, seed: int, out: Path) -> dict:
    """Train one row and score its EMA; what was run, where and how long stands beside the figures."""
    folder = out / f"{row['name']}-seed{seed}"
    overrides = [*row.get("set", []), f"run.dir={folder}", f"run.seed={seed}", "metrics.at_end=false"]
    if "teacher" in row:
        overrides.append(f"objective.teacher={out}/{row['teacher']}-seed{seed}/checkpoints/last.ckpt")
    if "init_from" in row:
        overrides.append(f"train.init_from={out}/{row['init_from']}-seed{seed}/checkpoints/last.ckpt")
    cfg = config.load(ROOT / row["cfg"], overrides)
    started = time.perf_counter()
    trainer.train(cfg, resume=(folder / "config.yml").exists())
    minutes = (time.perf_counter() - started) / 60
    model = checkpoint.load_model(folder / "checkpoints" / "last.ckpt", trainer.pick_device(cfg.run.device))
    dataset = data.load(cfg.data)
    scores = {}
    for steps in (1, 2):
        sigmas, solver = sampler.plan(cfg, steps)
        name = f"heun-{len(sigmas)}" if solver == "heun" else f"{steps}-step"
        if name not in scores:
            scores[name] = score(model, dataset, cfg, sigmas, solver)
    return {
        "name": row["name"],
        "seed": seed,
        "fid": scores,
        "features": metrics.features_name(cfg.metrics),
        "samples": cfg.metrics.num,
        "images": cfg.train.steps * cfg.train.batch_size,
        "minutes": round(minutes, 2),
        "command": f"python main.py --cfg {row['cfg']} {' '.join(overrides)}",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def score(model: torch.nn.Module, dataset: data.Dataset, cfg: config.Config, sigmas: list[float], solver: str) -> float:
    num = range(cfg.metrics.num)
    labels = sampler.draw_labels(cfg.run.seed, num, model.class_counts) if model.label_dim else None
    batches = sampler.generate(model, cfg.run.seed, num, sigmas, solver, labels, guidance=cfg.sample.guidance)
    images = torch.cat([data.to_uint8(x).cpu() for x in batches])
    return round(metrics.score(images, dataset, cfg.metrics, cfg.data.dir, images.device)["fid"], 4)


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def write_table(results: list[dict], path: Path) -> None:
    """A line a row, the seeds' figures side by side."""
    lines = ["| method | images | minutes | figure: by seed |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["name"] for r in results):
        own = [r for r in results if r["name"] == name]
        figures = "; ".join(
            f"{kind}: " + ", ".join(format(r["fid"][kind], ".3g") for r in own) for kind in own[0]["fid"]
        )
        lines.append(f"| {name} | {own[0]['images']:,} | {own[0]['minutes']:.1f} | {figures} |")
    path.write_text("\n".join(lines) + "\n")


def write_curves(results: list[dict], out: Path) -> None:
    """Score against images, where a row's config scored on the way (metrics.every)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for r in results:
        entries = map(json.loads, (out / f"{r['name']}-seed{r['seed']}" / "metrics.jsonl").read_text().splitlines())
        points = [(e["step"], e["fid"]) for e in entries if "fid" in e]
        if points and r["seed"] == results[0]["seed"]:
            batch = config.load(out / f"{r['name']}-seed{r['seed']}" / "config.yml").train.batch_size
            axes.plot([step * batch / 1000 for step, _ in points], [fid for _, fid in points], label=r["name"])
    if axes.lines:
        axes.set(xlabel="thousands of images seen", ylabel="Fréchet distance, one step", yscale="log")
        axes.legend(frameon=False)
        figure.savefig(out / "curves.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
