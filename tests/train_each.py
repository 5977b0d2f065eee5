"""Run by torchrun in test_ranks.py: trains the configs of a folder one after another, as main.py would each.

In the config named abort.yml rank 1, and only rank 1, is told to stop in its fourth step.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import main
from training.step import TrainingStep

torch.set_num_threads(1)
step = TrainingStep.__call__


def told_to_stop(run, *batch):
    if run.step == 3 and run.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    step(run, *batch)


for path in sorted(Path(sys.argv[1]).glob("*.yml")):
    TrainingStep.__call__ = told_to_stop if path.stem == "abort" else step
    code = main.main(["--cfg", str(path)])
    if code:
        sys.exit(code)
torch.distributed.destroy_process_group()
