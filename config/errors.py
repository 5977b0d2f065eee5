"""What the commands say: the next command, and how one ends badly (a wrong command line, bad input, a full disk)."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent  # where the commands lie


def command(script: str, *words: object) -> str:
    """The line that runs one of our commands when it is pasted into a shell in the current folder."""
    beside = os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable)
    python = "python" if beside else sys.executable or "python3"
    return shlex.join(str(word) for word in (python, ours(script), *words))


def ours(name: str) -> str:
    """The path of a file of this repository, from the current folder where that is in it or above it."""
    path = os.path.relpath(ROOT / name)
    return str(ROOT / name) if path.startswith(os.pardir) else path


def printable(text: str) -> str:
    """Text with every invisible character written out, so that a name with a line break or colour code stays tame."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(ValueError):
    """Bad input from the user: its message is one line, and the commands exit with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunFailed(RuntimeError):
    """The machine or the numbers failed, not the user: its message is one line, and the commands exit with code 1."""


class Arguments(argparse.ArgumentParser):
    """A command line whose errors are one line too, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and exit with code 2."""
        self.exit(2, f"{self.prog}: {printable(message)}; --help shows what there is\n")


def machine_failure(error: OSError | MemoryError) -> str:
    """One line for what the machine refused."""
    if isinstance(error, MemoryError):
        return "the memory of this machine is full"
    return printable(f"{error.filename or 'a file'}: {error.strerror or error}")


def exit_code(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command; its exit code, 0 for None. Bad input is said in one line: 2; a failure: 1; Ctrl-C: 130."""
    try:
        return command() or 0
    except ConfigError as error:
        line, code = str(error), 2
    except RunFailed as error:
        line, code = str(error), 1
    except (OSError, MemoryError) as error:
        line, code = machine_failure(error), 1
    except KeyboardInterrupt as error:
        line, code = str(error) or stopped, 130
    with contextlib.suppress(OSError):  # nobody can be told where the output goes to a full disk
        print(line, file=sys.stderr, flush=True)
    return code
