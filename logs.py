"""What a run tells: metrics.jsonl, TensorBoard, a progress bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import write_atomically


class RunLog:
    """The curves and messages of one run; a rank other than 0 gets `shown=False` and writes nothing."""

    PLAIN_SECONDS = 10.0  # between progress lines where stderr is no terminal

    def __init__(self, folder: Path, step: int, steps: int, batch_size: int, shown: bool = True):
        self.folder, self.steps, self.batch_size, self.shown = folder, steps, batch_size, shown
        self.step, self.read_at, self.told_at = step, time.perf_counter(), -math.inf
        if not shown:
            return
        _drop_later(folder / "metrics.jsonl", step)
        self.writer = SummaryWriter(folder, purge_step=step or None)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, message: str) -> None:
        """A line for the user, above the bar."""
        if self.shown:
            self.bar.write(message)
            sys.stdout.flush()

    def curves(self, step: int, values: dict[str, float]) -> None:
        """Append {"step": step, name: value, ...} to metrics.jsonl and each value to its TensorBoard curve."""
        if not self.shown:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, image: torch.Tensor) -> None:
        """A uint8 image (3, H, W) into TensorBoard."""
        if self.shown:
            self.writer.add_image("samples", image, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Log the means over the steps since the last call, with images/s; show loss, speed and time left."""
        now = time.perf_counter()
        speed = (step - self.step) * self.batch_size / max(now - self.read_at, 1e-9)
        self.curves(step, {**values, "images": step * self.batch_size, "images_per_second": speed})
        if self.shown:
            self.bar.set_postfix_str(f"loss {values['loss']:.4g}, {speed:,.0f} images/s")
            self.bar.update(step - self.bar.n)
            if self.bar.disable and (now - self.told_at >= self.PLAIN_SECONDS or step == self.steps):
                left = (self.steps - step) * self.batch_size / max(speed, 1e-9)
                self.say(
                    f"step {step:,}/{self.steps:,}  loss {values['loss']:.4g}  {speed:,.0f} images/s  "
                    f"{tqdm.format_interval(left)} left"
                )
                self.told_at = now
        self.step, self.read_at = step, now

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside (sampling, scoring) is no training: it does not count in images/s."""
        started = time.perf_counter()
        yield
        self.read_at += time.perf_counter() - started

    def close(self) -> None:
        """End the progress bar and the TensorBoard file."""
        if self.shown:
            self.bar.close()
            self.writer.close()


def _drop_later(path: Path, step: int) -> None:
    """Remove the lines that a killed run wrote after the checkpoint at `step`, from which this one goes on."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    text = "".join(line + "\n" for line in kept).encode()
    write_atomically(path, lambda file: file.write(text))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a crash cut short
        return math.inf
