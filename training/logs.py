"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, a bar on a terminal and plain lines elsewhere."""

import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

from checkpoints.disk import append, write_atomically
from training.weights_and_biases import WandbRun

PLAIN_SECONDS = 10.0  # between progress lines where stderr is no terminal
tqdm.monitor_interval = 0  # no thread of tqdm's that redraws bars which are updated too seldom


class RunLog:
    """The curves and messages of one run; a rank other than 0 gets `shown=False` and writes nothing.

    A full disk or a lost folder costs the entries of that time, never the run.
    """

    def __init__(self, folder: Path, step: int, steps: int, batch_size: int, shown: bool = True):
        self.folder, self.steps, self.batch_size, self.shown = folder, steps, batch_size, shown
        self.step, self.read_at, self.told_at = step, time.perf_counter(), -math.inf
        self.failing: set[str] = set()  # files that could not be written the last time
        self.wandb: WandbRun | None = None
        self.scored: str | None = None  # what was said of the last score
        if not shown:
            return
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.events = folder / name  # TensorBoard shows the files of a folder as one run
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        try:
            _drop_later(folder / "metrics.jsonl", step)
        except OSError as error:
            self.warn("metrics.jsonl", error)
        if step:  # hides what a killed run drew after the checkpoint
            self.draw(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def say(self, message: str) -> None:
        """A line for the user, above the bar; nothing where nobody can be told (a closed pipe, a full disk)."""
        if self.shown:
            with suppress(OSError, ValueError):
                self.bar.write(message)
                sys.stdout.flush()

    def warn(self, name: str, error: OSError) -> None:
        """Say that a file cannot be written, once until it can again."""
        if name not in self.failing:
            self.failing.add(name)
            reason = error.strerror or error
            self.say(f"warning: {self.folder / name} cannot be written ({reason}): its entries from here on are lost")

    def add(self, path: Path, content: bytes) -> None:
        """Append to a file of the run folder; where that fails, say so."""
        try:
            append(path, content)
            self.failing.discard(path.name)
        except OSError as error:
            self.warn(path.name, error)

    def curves(self, step: int, values: dict[str, float]) -> None:
        """Append {"step": step, name: value, ...} to metrics.jsonl and each value to its TensorBoard curve."""
        if not self.shown:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.add(self.folder / "metrics.jsonl", (json.dumps({"step": step, **finite}) + "\n").encode())
        self.draw(*(Event(step=step, summary=summary.scalar(name, value)) for name, value in values.items()))
        if self.wandb:
            self.wandb.curves(step, values)

    def score(self, step: int, scores: dict[str, float], said: str) -> None:
        """Figures into the curves, and what is said of them."""
        self.curves(step, scores)
        self.scored = said
        self.say(said)

    def data(self, step: int, facts: dict[str, Any]) -> None:
        """Append {"step": step, "data": facts} to metrics.jsonl, unless the last such entry says the same."""
        path = self.folder / "metrics.jsonl"
        if not self.shown:
            return
        with suppress(OSError):
            known = [line for line in path.read_text(encoding="utf-8").splitlines() if '"data": ' in line]
            if known and json.loads(known[-1]).get("data") == facts:
                return
        self.add(path, (json.dumps({"step": step, "data": facts}) + "\n").encode())

    def picture(self, step: int, image: torch.Tensor, caption: str = "") -> None:
        """A uint8 image (3, H, W) into TensorBoard and Weights & Biases, and what is said of it there."""
        if self.shown:
            entry = summary.image("samples", image, dataformats="CHW")
            entry.value[0].metadata.summary_description = caption
            self.draw(Event(step=step, summary=entry))
            if self.wandb:
                self.wandb.picture(step, image, caption)

    def draw(self, *events: Event) -> None:
        """Append events to TensorBoard's file; SummaryWriter's thread ends for good at the first write that fails."""
        if not self.events.exists():
            events = (Event(file_version="brain.Event:2"), *events)
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self.add(self.events, records.getvalue())

    def progress(self, step: int, values: dict[str, float], bound: float | None = None, memory: float = 0) -> None:
        """Log the means over the steps since the last call, with images/s; show loss, speed and time left.

        bound: images/s at the devices' measured peak, of which MFU is the share; memory: peak in bytes, 0: not known.
        """
        now = time.perf_counter()
        speed = (step - self.step) * self.batch_size / max(now - self.read_at, 1e-9)
        figures, told = {"images_per_second": speed}, f"{speed:,.0f} images/s"
        if bound:
            figures["mfu"] = speed / bound
            told += f", MFU {speed / bound:.0%}" if speed >= 0.1 * bound else f", MFU {speed / bound:.1%}"
        if memory:
            figures["peak_memory_gb"] = memory / 1e9
            told += f", {memory / 1e9:.1f} GB"
        self.curves(step, {**values, "images": step * self.batch_size, **figures})
        if self.shown:
            self.bar.set_postfix_str(f"loss {values['loss']:.4g}, {told}")
            self.bar.update(step - self.bar.n)
            if self.bar.disable and (now - self.told_at >= PLAIN_SECONDS or step == self.steps):
                left = tqdm.format_interval((self.steps - step) * self.batch_size / max(speed, 1e-9))
                self.say(f"step {step:,}/{self.steps:,}  loss {values['loss']:.4g}  {told}  {left} left")
                self.told_at = now
        self.step, self.read_at = step, now

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside (sampling, scoring) is no training: it does not count in images/s."""
        started = time.perf_counter()
        yield
        self.read_at += time.perf_counter() - started

    def close(self) -> None:
        """End the progress bar."""
        if self.shown:
            self.bar.close()


def _drop_later(path: Path, step: int) -> None:
    """Remove the lines that a killed run wrote after the checkpoint at `step`, from which this one goes on."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        text = "".join(f"{line}\n" for line in lines if _step(line) <= step).encode()
        write_atomically(path, lambda file: file.write(text))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a line that a crash cut short
        return math.inf
