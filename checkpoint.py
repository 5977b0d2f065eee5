"""The old name of convert.py: commands and scripts written down before still work."""

import sys

from checkpoints import CheckpointError, load, load_model  # noqa: F401 (what scripts import from here)

if __name__ == "__main__":
    import convert

    print("checkpoint.py is now called convert.py: python convert.py import|export ...", file=sys.stderr)
    sys.exit(convert.main())
