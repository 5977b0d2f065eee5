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
Each pair trains on digits without labels, from the same weights, in the same order of images. Every learning rate is
tried for both sides, and each side's best counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from common import ROOT, save
from versus_flow import PAIRS as FLOW
from versus_sides import SHAPE, Method
from versus_sigma import PAIRS as SIGMA

import config
import data
from ema import EMA
from metrics import scores
from objectives.draws import key, sample_noise
from training.step import learning_rate

BATCH = 64
PAIRS = {**SIGMA, **FLOW}  # name -> (ours, theirs), each (folder of the checkouts, steps of the run) -> Method


def run(method: Method, lr: float, steps: int, seed: int, cfg: config.Config) -> tuple[float, float]:
    """(one-step distance, seconds of training) of a method after `steps` steps of RAdam."""
    dataset = data.load(cfg.data)
    optimizer = torch.optim.RAdam(method.net.parameters(), lr=lr)
    average = EMA(method.net, 0.999, 0.05)
    cfg.train.lr, cfg.train.steps, cfg.train.lr_warmup, cfg.train.lr_decay = lr, steps, steps // 20, "cosine"
    batches = data.batches(dataset, seed, BATCH)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.train)
        torch.manual_seed(key(seed, "versus", step))
        optimizer.zero_grad()
        method.loss(data.to_float(next(batches)[0]), step).backward()
        optimizer.step()
        method.after(step)
        average.update(method.net, step + 1)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        parts = torch.arange(cfg.metrics.num).split(500)
        noise = (
            sample_noise(
                key(seed, "samples"), part.tolist(), (SHAPE["channels"], SHAPE["resolution"], SHAPE["resolution"])
            )
            for part in parts
        )
        images = torch.cat([data.to_uint8(method.sample(average.module, z)) for z in noise])
    return scores.score(images, dataset, cfg.metrics, cfg.data.dir, "cpu")["fid"], seconds


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkouts")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; done rows are not run again")
    parser.add_argument("--only", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.004, 0.001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    cases = [(p, s, lr, seed) for p in args.only for seed in args.seeds for lr in args.lr for s in (0, 1)]
    for pair, side, lr, seed in cases:
        row = {"pair": pair, "side": ("ours", "theirs")[side], "lr": lr, "seed": seed, "images": args.steps * BATCH}
        if any(row.items() <= done.items() for done in rows):
            continue
        cfg = config.load(ROOT / "config.yml", ["data.conditional=false"])
        fid, seconds = run(PAIRS[pair][side](args.folder, args.steps), lr, args.steps, seed, cfg)
        rows.append({**row, "fid": round(fid, 4), "seconds": round(seconds, 1), "torch": torch.__version__})
        save(rows, args.out)
        print(json.dumps(rows[-1]), flush=True)
    print("| pair | ours: by seed | theirs: by seed | ratio of means |\n| --- | --- | --- | --- |")
    for pair in args.only:
        best = [[best_of(rows, pair, side, seed) for seed in args.seeds] for side in ("ours", "theirs")]
        cells = [", ".join(format(value, ".3g") for value in side) for side in best]
        print(f"| {pair} | {cells[0]} | {cells[1]} | {sum(best[0]) / sum(best[1]):.2f} |")
    return 0


def best_of(rows: list[dict], pair: str, side: str, seed: int) -> float:
    """The lowest distance over the learning rates."""
    return min(r["fid"] for r in rows if (r["pair"], r["side"], r["seed"]) == (pair, side, seed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except config.ConfigError as error:
        sys.exit(str(error))
