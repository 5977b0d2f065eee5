"""What each published figure costs to reach, in images, arithmetic and GPU-hours: python benchmarks/plan.py

Hours are images x FLOPs / (40% of the GPU's dense bf16 peak), the share that this project aims at; no run was timed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import networks  # noqa: E402
from sources.augment import AUGMENT_DIM  # noqa: E402

# Forward passes that a step costs per image; a backward pass counts as two, a forward-mode derivative as one more.
PASSES = {
    "edm": 3,
    "trigflow": 3,
    "ct": 4,
    "ict": 4,
    "ect": 4,
    "tcm": 4,
    "cmt": 4,
    "sct": 5,
    "pd": 5,
    "cd": 6,
    "scd": 6,
    "meanflow": 5,
    "soflow": 4,
}
PEAK = {"H200": 790e12, "A100": 312e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s
SHARE = 0.4
DATASETS = {"cifar10": (32, 10)}  # pixels, classes
PUBLISHED = {  # FID in 1 / 2 steps (diffusion: NFE) in the method's paper
    "cifar10_edm": "1.97 (35 NFE)",
    "cifar10_ct": "8.70 / 5.83",
    "cifar10_cd": "3.55 / 2.93",
    "cifar10_ict": "2.83 / 2.46",
    "cifar10_ect": "3.60 / 2.11",
    "cifar10_sct": "2.85 / 2.06",
    "cifar10_scd": "3.66 / 2.52",
    "cifar10_tcm": "2.46 / 2.05",
    "cifar10_cmt": "2.74 / 1.97, after ECT",
    "cifar10_meanflow": "2.92 (its code: 2.80)",
    "cifar10_soflow": "2.86 / 2.28",
}


def main() -> None:
    gpus = " | ".join(f"{gpu}, hours" for gpu in PEAK)
    print(f"| config | images | GFLOP an image | {gpus} | FID to expect, 1 / 2 steps |")
    print("| --- " * (len(PEAK) + 4) + "|")
    for name in PUBLISHED:
        cfg = config.load(ROOT / "configs" / f"{name}.yml")
        resolution, classes = DATASETS[name.split("_")[0]]
        flops = forward_flops(cfg, cfg.data.resolution or resolution, classes) * PASSES[cfg.objective.name]
        images = cfg.train.steps * cfg.train.batch_size
        hours = " | ".join(f"{images * flops / (peak * SHARE) / 3600:,.0f}" for peak in PEAK.values())
        print(f"| {name} | {images / 1e6:,.0f} M | {flops / 1e9:,.0f} | {hours} | {PUBLISHED[name]} |")


def forward_flops(cfg: config.Config, resolution: int, classes: int) -> int:
    """FLOPs of the network on one image, counted without computing anything."""
    labels, augment = classes * cfg.data.conditional, AUGMENT_DIM if cfg.data.augment else 0
    with FakeTensorMode(), torch.no_grad():
        model = networks.build(
            cfg.network.model_dump(), resolution=resolution, channels=3, label_dim=labels, augment_dim=augment
        )
        with FlopCounterMode(display=False) as counter:
            times = [torch.ones(1)] * (2 if model.clock == "time" else 1)
            model(torch.zeros(1, 3, resolution, resolution), *times)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
