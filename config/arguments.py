"""The command lines: what is wrong with one is one line."""

import argparse
import sys
from typing import NoReturn

from config.errors import printable


class Arguments(argparse.ArgumentParser):
    """A command line whose errors are one line too, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and exit with code 2."""
        print(f"{self.prog}: {printable(message)}; --help shows what there is", file=sys.stderr)
        sys.exit(2)
