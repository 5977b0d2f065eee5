"""Train a consistency model: python main.py --cfg config.yml [section.key=value ...] [--resume]"""

from __future__ import annotations

import sys

import config


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when training ended or was stopped, 2 for bad input, 1 for a failure of the machine."""
    parser = config.Arguments(description="Train a consistency model.", allow_abbrev=False)
    parser.add_argument(
        "--cfg", type=config.path_text, required=True, metavar="FILE", help="settings of the run, as config.yml"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in run.dir from its last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = config.load(args.cfg, args.overrides)
        from training import (
            devices,  # torch is imported only for a config that is right: a typo is answered at once
            trainer,
        )

        devices.start_ranks()
        trainer.train(cfg, args.resume)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except config.RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, MemoryError) as error:
        print(config.machine_failure(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
