"""Train a consistency model: python main.py --cfg config.yml [section.key=value ...] [--resume]"""

from __future__ import annotations

import argparse
import os
import sys

import config


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when training ended or was stopped, 2 for bad input, 1 for a failure of the machine."""
    parser = config.Arguments(description="Train a consistency model.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", type=config.path_text, required=True, metavar="FILE", help="settings of the run, as config.yml")
    add("--resume", action="store_true", help="continue the run in run.dir from its last checkpoint")
    add("--other-data", action="store_true", help="with --resume: though the data are not those it was trained on")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args(argv)
    return config.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Train as the command asks."""
    if args.other_data and not args.resume:
        raise config.ConfigError("--other-data: is for a run that goes on; add --resume")
    cfg = config.load(args.cfg, args.overrides)
    # Threads that wait for work spin for a moment only: for long, they take the cores from each other where another
    # program is busy (libgomp's default); never, and a quiet machine loses nearly half its speed.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from training import devices, trainer  # torch only for a config that is right: a typo is answered at once

    devices.start_ranks()
    trainer.train(cfg, args.resume, args.other_data)


if __name__ == "__main__":
    sys.exit(main())
