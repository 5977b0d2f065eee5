"""The old name of convert.py, so that commands written down before still work."""

import sys

import convert

if __name__ == "__main__":
    print("checkpoint.py is now called convert.py: python convert.py import|export ...", file=sys.stderr)
    sys.exit(convert.main())
