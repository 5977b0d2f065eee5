"""Our losses beside the original code's: one network, data, loop and scorer; only loss and sampling code differ.

    python benchmarks/versus.py FOLDER --out runs/versus.json [--only ct-openai ...] [--lr 0.004 0.001] [--seeds 0 1]

FOLDER holds checkouts that you made yourself; none of their code is here, and none of it is changed:
    git clone https://github.com/openai/consistency_models FOLDER/openai      # CT
    git clone https://github.com/Kinyugo/consistency_models FOLDER/kinyugo    # CT, iCT
    git clone https://github.com/locuslab/ect FOLDER/ect                      # ECT
    git clone https://github.com/xandergos/sCM-mnist FOLDER/scm-mnist         # sCT
    git clone https://github.com/Gsunshine/py-meanflow FOLDER/py-meanflow     # MeanFlow
    git clone https://github.com/zlab-princeton/SoFlow FOLDER/soflow          # SoFlow
    git clone https://github.com/haidog-yaqub/MeanFlow FOLDER/haidog          # iMF
    git clone https://github.com/NVlabs/TCM FOLDER/tcm                        # TCM, its second stage
    git clone https://github.com/sony/cmt FOLDER/cmt                          # CMT, the mid-training
Each pair trains without labels, from the same weights, in the same order of images: on digits, or on another config's
data with its network (--cfg benchmarks/mnist16_base.yml --set network.model_channels=16). Every learning rate is tried
for both sides, and each side's best counts. --speed times the two sides in turn, in one process, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from common import ROOT, save
from versus_flow import PAIRS as FLOW
from versus_sides import Case, Method, step_by_step, trained
from versus_sigma import PAIRS as SIGMA
from versus_stages import PAIRS as STAGES

import config
import data
from metrics import scores
from objectives.draws import key, sample_noise

PAIRS = {**SIGMA, **FLOW, **STAGES}  # name -> (ours, theirs), each Case -> Method
SIDES = ("ours", "theirs")
DIGITS = "benchmarks/digits_base.yml"


def distance(method: Method, average: torch.nn.Module, case: Case, seed: int) -> float:
    """The one-step distance of a method's average."""
    cfg, dataset = case.cfg, case.dataset
    shape = (dataset.channels, dataset.resolution, dataset.resolution)
    with torch.no_grad():
        parts = torch.arange(cfg.metrics.num).split(500)
        noise = (sample_noise(key(seed, "samples"), part.tolist(), shape) for part in parts)
        images = torch.cat([data.to_uint8(method.sample(average, z)) for z in noise])
    return scores.score(images, dataset, cfg.metrics, cfg.data.dir, "cpu")["fid"]


def speeds(pair: str, case: Case, rounds: int = 12, steps: int = 5) -> list[float]:
    """[ours, theirs]: images a second, the median of rounds in turn; the first round is left out."""
    runs = [step_by_step(build(case), case, 1e-3, 0) for build in PAIRS[pair]]
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for run, kept in zip(runs, times, strict=True):
            started = time.perf_counter()
            for _ in range(steps):
                next(run)
            kept.append((time.perf_counter() - started) / steps)
    return [case.batch / statistics.median(kept[1:]) for kept in times]


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkouts")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; done rows are not run again")
    parser.add_argument("--only", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.004, 0.001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--cfg", default=DIGITS, help="whose data and network are taken")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="changes of that config")
    parser.add_argument("--speed", action="store_true", help="time the two sides in turn instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = config.load(ROOT / args.cfg, [*args.set, "data.conditional=false"])
    case = Case(args.folder, args.steps, args.batch, cfg, data.load(cfg.data), args.out.with_suffix(""))
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    about = {"cfg": " ".join([args.cfg, *args.set]), "batch": args.batch}

    def add(row: dict) -> None:
        rows.append({**row, "torch": torch.__version__})
        save(rows, args.out)
        print(json.dumps(rows[-1]), flush=True)

    if args.speed:
        for pair in args.only:
            ours, theirs = (round(speed, 1) for speed in speeds(pair, case))
            add({"pair": pair, **about, "images_per_second": [ours, theirs], "ratio": round(ours / theirs, 3)})
        return 0
    runs = [(p, s, lr, seed) for p in args.only for seed in args.seeds for lr in args.lr for s in args.sides]
    for pair, side, lr, seed in runs:
        row = {"pair": pair, "side": side, "lr": lr, "seed": seed, "images": args.steps * args.batch, **about}
        if any(same(row, done) for done in rows):
            continue
        method = PAIRS[pair][SIDES.index(side)](case)
        average, seconds = trained(method, case, lr, seed)
        fid = distance(method, average, case, seed)
        add({**row, "fid": round(fid, 4), "seconds": round(seconds, 1)})
    if len(args.sides) == 2:
        table([done for done in rows if same({"images": args.steps * args.batch, **about}, done)], args)
    return 0


def same(wanted: dict, row: dict) -> bool:
    return wanted.items() <= {"cfg": DIGITS, "batch": 64, **row}.items()  # older rows do not say these two


def table(rows: list[dict], args: argparse.Namespace) -> None:
    print("| pair | ours: by seed | theirs: by seed | ratio of means |\n| --- | --- | --- | --- |")
    for pair in args.only:
        best = [[best_of(rows, pair, side, seed) for seed in args.seeds] for side in SIDES]
        cells = [", ".join(format(value, ".3g") for value in side) for side in best]
        print(f"| {pair} | {cells[0]} | {cells[1]} | {sum(best[0]) / sum(best[1]):.2f} |")


def best_of(rows: list[dict], pair: str, side: str, seed: int) -> float:
    """The lowest distance over the learning rates."""
    return min(r["fid"] for r in rows if (r["pair"], r["side"], r["seed"]) == (pair, side, seed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except config.ConfigError as error:
        sys.exit(str(error))
