"""Score runs on small labelled images by two classifiers: python benchmarks/second_score.py RUN [RUN ...]

The first is the one that `metrics.features: classifier` trains; the second has another seed, shape and width. A recipe
that was chosen by the first may please it alone. RUN is a run's folder; its last checkpoint's average is sampled
in one and two steps: with the run's own seed, the first score is the one that the run said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from common import ROOT  # noqa: F401  puts the repository on the path
from torch_fidelity.metric_fid import KEY_METRIC_FID as FID
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_fid import fid_statistics_to_metric as frechet

import checkpoints
import config
import data
from metrics.classifier import Classifier, train_classifier
from metrics.common import fetch
from sampling.drawing import Drawing
from sampling.plan import plan
from sources.images import ImageSet, draw_labels

SECOND = {"seed": 7, "width": 48, "features": 96}  # with 48 channels the body has one convolution fewer, too


@torch.no_grad()
def statistics(classifier: Classifier, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean and covariance, in float64, of the features of uint8 images (N, C, H, W)."""
    return fid_features_to_statistics(torch.cat([classifier(part)[0] for part in images.split(500)]))


def judges(dataset: ImageSet) -> list[Classifier]:
    """The run's own classifier and the second."""
    cpu = torch.device("cpu")
    return [train_classifier(dataset, cpu, print, **how)[0] for how in ({}, SECOND)]


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs on one dataset")
    parser.add_argument("--seed", type=int, default=12345, help="seed of the noise [12345]")
    parser.add_argument("--ema", type=int, default=0, help="which of several averages [0]")
    args = parser.parse_args()
    dataset, found = data.load(config.load(args.runs[0] / "config.yml").data), []
    everything = fetch(dataset, torch.arange(len(dataset)))
    for judge in judges(dataset):
        found.append((judge, statistics(judge, everything)))
    for run in args.runs:
        cfg = config.load(run / "config.yml")
        model = checkpoints.load_model(run / "checkpoints" / "last.ckpt", average=args.ema)
        asked, counts = range(cfg.metrics.num), model.codec.class_counts
        labels = draw_labels(args.seed, asked, counts) if cfg.data.conditional else None
        for steps in (1, 2):
            drawing = Drawing(model, args.seed, cfg.metrics.num, *plan(cfg, steps), labels, 250)
            images = drawing.draw(0, drawing.num)
            scores = [frechet(statistics(judge, images), of_data, verbose=False)[FID] for judge, of_data in found]
            print(
                f"{run}  {steps} step{'s' * (steps > 1)}  " + "  ".join(format(score, ".4f") for score in scores),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
