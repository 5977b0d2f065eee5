"""What the benchmarks share: the machine and its measured peak, a clock for its device, random images, and results."""

from __future__ import annotations

import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import data  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and date: what every result stands beside."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(result: Any, path: Path) -> None:
    checkpoints.write_atomically(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    print(f"written: {path}")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, its device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took since reset_peak_memory_stats, on a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of one large square matrix product in this precision: the median of a second's worth, at least three."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
    for _ in range(2):
        a @ b
    times, count = [], 10 if device.type == "cuda" else 1
    while len(times) < 3 or sum(times) < 1:
        times.append(seconds(lambda: [a @ b for _ in range(count)], device))
    return 2 * n**3 * count / statistics.median(times)


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's convolutions, matrix products and attention (a multiplication counts 2)."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        call()
    return counter.get_total_flops()


def random_images(shape: str, count: int = 4096, classes: int = 10) -> data.Dataset:
    """A dataset of noise, so that nothing need be downloaded; shape is CxR, as 3x32."""
    channels, resolution = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, resolution, resolution), generator=generator, dtype=torch.uint8)
    return data.Dataset("noise", classes, torch.arange(count) % classes, images)


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
