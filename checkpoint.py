"""The old name of convert.py: commands and scripts written down before still work."""

import sys

from checkpoints import CheckpointError, load, load_model  # noqa: F401 (what scripts import from here)

if __name__ == "__main__":
    import convert
    from config import command

    print(f"checkpoint.py is now called convert.py: {command('convert.py', *sys.argv[1:])}", file=sys.stderr)
    sys.exit(convert.main())
