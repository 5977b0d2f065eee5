"""Train methods side by side and score them in one and two steps: python benchmarks/quality.py LIST.yml --out DIR

LIST.yml names the rows: a config, overrides, and for a distilled method the row that is its teacher. A row that is
already measured is not run again. With --original PATH, a checkout of github.com/locuslab/ect, the rows named by
--only, of ECT, are trained by that code instead and called NAME-original. Writes results.json, table.md, curves.png and
samples.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from common import ROOT, machine, save
from original_ect import OriginalECT

import checkpoints
import config
import data
from metrics import scores
from sampling import plan
from sampling.drawing import Drawing
from sources.images import ImageSet
from training import devices, trainer

# Settings that are lengths: a longer or shorter run scales them all by one factor, but for shares of the run.
LENGTHS = ("train.steps", "train.lr_warmup", "objective.stage", "objective.warmup", "metrics.every")
LENGTHS += ("objective.double_kimg",)  # in thousands of images; of the others a fraction is a share of the run
PROBE = 12  # steps that are timed to find how many fit in --minutes, after as many that are not


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", help="YAML: a list of rows {name, cfg, set: [section.key=value], teacher: name}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of every row")
    parser.add_argument("--original", type=Path, metavar="PATH", help="train the rows by the original ECT code there")
    parser.add_argument("--threads", type=int, help="CPU threads; figures repeat bit for bit with the same number")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--images", type=int, help="images each row trains on; schedules are scaled to them")
    budget.add_argument("--minutes", type=float, help="minutes each row trains, at the speed of its first steps")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # a run then keeps to it
        torch.set_num_threads(args.threads)
    rows = [row for row in yaml.safe_load(Path(args.list).read_text()) if not args.only or row["name"] in args.only]
    rows = [{**row, "set": [*row.get("set", []), *args.set]} for row in rows]
    if args.original:
        rows = [{**row, "name": f"{row['name']}-original"} for row in rows]
        trainer.TrainingStep = partial(OriginalECT, args.original)
    results = args.out / "results.json"
    for seed in args.seeds:
        for row in rows:
            done = json.loads(results.read_text()) if results.exists() else []
            features = scores.features_name(config.load(ROOT / row["cfg"], settings(row, seed, args.out)).metrics)
            if not any((r["name"], r["seed"], r["features"]) == (row["name"], seed, features) for r in done):
                measured = measure(row, seed, args.out, args.images, args.minutes)
                done = json.loads(results.read_text()) if results.exists() else []
                save([*done, measured], results)
                print(json.dumps(measured), flush=True)
    done = json.loads(results.read_text())
    write_table(done, args.out / "table.md")
    write_curves(done, args.out)
    write_samples(done, args.out)
    return 0


def measure(row: dict, seed: int, out: Path, images: int | None = None, minutes: float | None = None) -> dict:
    """Train one row and score its EMA; what was run, where and how long stands beside the figures."""
    folder, overrides = out / f"{row['name']}-seed{seed}", settings(row, seed, out)
    if not checkpoints.saved(folder / "checkpoints"):  # killed before there was anything to go on from
        (folder / "config.yml").unlink(missing_ok=True)
    overrides += budget(row["cfg"], overrides, folder, images, minutes)
    cfg = config.load(ROOT / row["cfg"], overrides)
    trainer.train(cfg, resume=(folder / "config.yml").exists())
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    if state["step"] < cfg.train.steps:
        sys.exit("stopped; the same command goes on")
    model = checkpoints.model_from(state, folder).to(devices.pick_device(cfg.run.device))
    dataset = data.load(cfg.data)
    found = {}
    for steps in (1, 2):
        sigmas, solver = plan.plan(cfg, steps)
        name = f"heun-{len(sigmas)}" if solver == "heun" else f"{steps}-step"
        if name not in found:
            kinds = cfg.metrics.scores if found else ["fid", "prc"]  # precision and recall take minutes: once a row
            found[name] = score(model, dataset, cfg, sigmas, solver, kinds)
    return {
        "name": row["name"],
        "seed": seed,
        "starts_from": row.get("teacher") or row.get("init_from"),
        "scores": found,
        "features": scores.features_name(cfg.metrics),
        "samples": cfg.metrics.num,
        "images": cfg.train.steps * cfg.train.batch_size,
        "minutes": round(curve(folder)[-1][1], 2),
        "command": f"python main.py --cfg {row['cfg']} {' '.join(overrides)}",
        **machine(next(model.parameters()).device),
    }


def settings(row: dict, seed: int, out: Path) -> list[str]:
    """A row's overrides."""
    overrides = [*row.get("set", []), f"run.dir={out}/{row['name']}-seed{seed}", f"run.seed={seed}"]
    if "teacher" in row:
        overrides.append(f"objective.teacher={out}/{row['teacher']}-seed{seed}/checkpoints/last.ckpt")
    if "init_from" in row:
        overrides.append(f"train.init_from={out}/{row['init_from']}-seed{seed}/checkpoints/last.ckpt")
    return [*overrides, "metrics.at_end=false"]


def budget(file: str, overrides: list[str], folder: Path, images: int | None, minutes: float | None) -> list[str]:
    """Overrides that scale a row's schedules to a number of images, or to minutes at the speed measured now."""
    if (folder / "config.yml").exists():  # a run that was stopped keeps its length
        kept = config.load(folder / "config.yml")
    else:
        kept = config.load(ROOT / file, overrides)
        if minutes:
            images = round(speed(kept) * minutes * 60)
        if not images:
            return []
        factor = images / (kept.train.steps * kept.train.batch_size)
        for section, key in (name.split(".") for name in LENGTHS):
            part = getattr(kept, section)
            value = getattr(part, key, None)
            if value and (isinstance(value, int) or key == "double_kimg"):
                setattr(part, key, type(value)(max(round(value * factor, 3), 1 if isinstance(value, int) else 0.001)))
    pairs = [(name, getattr(getattr(kept, name.split(".")[0]), name.split(".")[1], None)) for name in LENGTHS]
    return [f"{name}={value}" for name, value in pairs if value]


def speed(cfg: config.Config) -> float:
    """Images a second of this row's training steps, here and now."""
    run = trainer.Trainer(cfg)
    batches = data.batches(run.dataset.to(run.device), cfg.run.seed, cfg.train.batch_size)
    for step in range(2 * PROBE):
        if step == PROBE:
            float(run.train_step.skipped)  # waits for the device
            started = time.perf_counter()
        run.train_step(*next(batches))
    float(run.train_step.skipped)
    return PROBE * cfg.train.batch_size / (time.perf_counter() - started)


def score(
    model: torch.nn.Module,
    dataset: ImageSet,
    cfg: config.Config,
    sigmas: list[float],
    solver: str,
    kinds: list[str],
) -> dict:
    seed, num = cfg.run.seed, cfg.metrics.num
    given = dataset.draw_given(seed, range(num))
    images = Drawing(model, seed, num, sigmas, solver, given, guidance=cfg.sample.guidance).draw(0, num)
    wanted = cfg.metrics.model_copy(update={"scores": kinds})
    found = scores.score(images, dataset, wanted, cfg.data.dir, next(model.parameters()).device)
    return {name: round(value, 4) for name, value in found.items()}


def write_table(results: list[dict], path: Path) -> None:
    """A line a row, the seeds' figures side by side."""
    lines = ["| method | starts from | images | minutes | figures: by seed |", "| --- | --- | --- | --- | --- |"]
    for name, features in dict.fromkeys((r["name"], r["features"]) for r in results):
        own = [r for r in results if (r["name"], r["features"]) == (name, features)]
        figures = "; ".join(
            f"{kind} {figure}: " + ", ".join(format(r["scores"][kind][figure], ".3g") for r in own)
            for kind in own[0]["scores"]
            for figure in own[0]["scores"][kind]
        )
        start = own[0]["starts_from"] or "noise"
        name += "" if features == results[0]["features"] else f", {features}"
        lines.append(f"| {name} | {start} | {own[0]['images']:,} | {own[0]['minutes']:.1f} | {figures} |")
    path.write_text("\n".join(lines) + "\n")


def write_curves(results: list[dict], out: Path) -> None:
    """One-step score against images and against minutes, where a row's config scored on the way (metrics.every)."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for r in results:
        folder = out / f"{r['name']}-seed{r['seed']}"
        points = [point for point in curve(folder) if point[2] is not None]
        if not points or r["seed"] != results[0]["seed"]:
            continue
        batch = config.load(folder / "config.yml").train.batch_size
        distances = [fid for _, _, fid in points]
        panels[0].plot([step * batch / 1000 for step, _, _ in points], distances, marker=".", label=r["name"])
        panels[1].plot([minutes for _, minutes, _ in points], distances, marker=".")
    if panels[0].lines:
        panels[0].set(xlabel="thousands of images seen", ylabel="Fréchet distance, one step", yscale="log")
        panels[1].set(xlabel="minutes of training")
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_formatter("{x:g}")
        panels[0].legend(frameon=False)
        figure.savefig(out / "curves.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def curve(folder: Path) -> list[tuple[int, float, float | None]]:
    """(step, minutes of training so far, distance or None) of every entry in a run's log; scoring takes no minutes."""
    points, minutes, images = [], 0.0, 0
    for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "images_per_second" in entry:
            minutes += (entry["images"] - images) / entry["images_per_second"] / 60
            images = entry["images"]
        points.append((entry["step"], minutes, entry.get("fid")))
    return points


def write_samples(results: list[dict], out: Path) -> None:
    """The last grid of samples of each row, side by side."""
    plt = pyplot()
    grids = {}
    for r in results:
        drawn = sorted((out / f"{r['name']}-seed{r['seed']}" / "samples").glob("*.png"))
        if drawn and r["seed"] == results[0]["seed"]:
            kind, scores = next(iter(r["scores"].items()))
            grids[f"{r['name']} ({kind}): {scores['fid']:.3g}"] = plt.imread(drawn[-1])
    height = -(-len(grids) // 3)
    figure, panels = plt.subplots(height, 3, figsize=(12, 2.9 * height), squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.axis("off")
    for panel, (title, grid) in zip(panels.flat, grids.items(), strict=False):
        panel.imshow(grid, cmap="gray", interpolation="nearest")
        panel.set_title(title, fontsize=10)
    figure.savefig(out / "samples.png", dpi=90)
    plt.close(figure)


def pyplot():
    """matplotlib without a screen; imported late, since only the figures need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except config.ConfigError as error:
        sys.exit(str(error))
