"""What the benchmarks share: the machine and its measured peak, a clock for its device, random images, and results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from checkpoints.disk import write_atomically  # noqa: E402
from sources.images import ImageSet  # noqa: E402
from training.speed import flops, matmul_peak, peak_memory, seconds, wait  # noqa: E402, F401


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and date: what every result stands beside. COMMIT names it where there is no git."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": (git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", ""))
        + ("+" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def without_places(text: str) -> str:
    """Text with PATH/x for every /absolute/path/to/x, and for ~/x; paths inside the repository from there on."""
    text = text.replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w.:/<])(~|/[\w.+-]+)(/[\w.+-]+)*/([\w.+-]+)", r"PATH/\3", text)


def save(result: Any, path: Path) -> None:
    """Write a result as JSON, whole or not at all; of paths on this machine it tells the last name alone."""
    text = (without_places(json.dumps(result, indent=1)) + "\n").encode()
    write_atomically(path, lambda file: file.write(text))
    print(f"written: {path}")


@contextmanager
def checkout(path: Path) -> Iterator[None]:
    """Imports find the code in `path`, also where a package of it is called as one of ours is (training, metrics)."""

    def taken() -> list[str]:
        tops = {entry.stem for entry in path.iterdir() if entry.is_dir() or entry.suffix == ".py"}
        return [name for name in sys.modules if name.split(".")[0] in tops]

    if not path.is_dir():
        raise config.ConfigError(f"{path}: there is no such checkout")
    ours = {name: sys.modules.pop(name) for name in taken()}
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(ours)


def random_images(shape: str, count: int = 4096, classes: int = 10) -> ImageSet:
    """A dataset of noise, so that nothing need be downloaded; shape is CxR, as 3x32."""
    channels, resolution = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, resolution, resolution), generator=generator, dtype=torch.uint8)
    return ImageSet("noise", classes, torch.arange(count) % classes, images)


class Split:
    """Time by section: every moment belongs to the innermost section that is open then."""

    def __init__(self, device: torch.device):
        self.device, self.open, self.marks = device, ["rest"], []

    def mark(self) -> None:
        """Now, by the host's clock, or in the GPU's queue of work."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((self.open[-1], now))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.open.append(name)
        self.mark()
        yield
        self.open.pop()
        self.mark()

    def wrap(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        """Every call of owner.method belongs to the section `name`."""
        real = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name if isinstance(name, str) else name()):
                return real(*args, **kwargs)

        setattr(owner, method, timed)

    def start(self) -> None:
        wait(self.device)
        self.marks.clear()
        self.mark()

    def totals(self) -> dict[str, float]:
        """Seconds of each section from `start` to now."""
        self.mark()
        wait(self.device)
        total: dict[str, float] = defaultdict(float)
        for (name, a), (_, b) in zip(self.marks, self.marks[1:], strict=False):
            total[name] += a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a
        return dict(total)
