"""Run by torchrun in test_ranks.py: trains the configs of a folder one after another, as main.py would each.

In the config named abort.yml rank 1, and only rank 1, is told to stop in its fourth step; in those that end in "while
drawing" it is told to stop, or fails, in its share of the samples of step 4.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import main
from sampling.drawing import Drawing
from training.step import TrainingStep

torch.set_num_threads(1)
step, draw = TrainingStep.__call__, Drawing.draw


def told_to_stop(run, *batch):
    if run.step == 3 and run.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    step(run, *batch)


def stopped(drawing, start, stop):
    if start == 16:  # the first batch of rank 1
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(drawing, start, stop)


def fails(drawing, start, stop):
    if start == 16 and fails.times.pop():
        raise MemoryError("no room")
    return draw(drawing, start, stop)


fails.times = [False, True]  # by the calls from the last

for path in sorted(Path(sys.argv[1]).glob("*.yml")):
    TrainingStep.__call__ = told_to_stop if path.stem == "abort" else step
    Drawing.draw = {"stopped while drawing": stopped, "fails while drawing": fails}.get(path.stem, draw)
    code = main.main(["--cfg", str(path)])
    if code:
        sys.exit(code)
torch.distributed.destroy_process_group()
