"""Faults, many times over: crashes, full disks, damaged and hostile files, dead ranks. Rows of docs/reliability.md.

    python tests/reliability.py [--quick] [NAME ...]      (no name: all)

Each fault is a function of the number of times it is tried; it returns what it saw, and raises where anything is lost.
Training runs are forked from this process, which has torch loaded, so that fifty of them are cheap. As root, disks are
filled and made read-only on a small tmpfs; otherwise by RLIMIT_FSIZE and permissions, and the row says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import yaml  # noqa: E402
from conftest import TINY, tiny  # noqa: E402
from PIL import Image  # noqa: E402

import checkpoints  # noqa: E402
import config  # noqa: E402
import main  # noqa: E402
from checkpoints.disk import write_atomically  # noqa: E402
from checkpoints.state import PARTS  # noqa: E402
from metrics import scores  # noqa: E402
from training import trainer  # noqa: E402
from training.step import TrainingStep  # noqa: E402

STEPS = 40
TRAIN = {"steps": STEPS, "save_every": 2, "log_every": 3, "batch_size": 8}

# Runs in processes that can be killed ---------------------------------------------------------------------------------


class Lost(AssertionError):
    """Something was lost or let in."""


def check(good: bool, what: object) -> None:
    if not good:
        raise Lost(what)


class Run:
    """`python main.py --cfg ... [--resume]` in a forked process; `before` is called in it first."""

    def __init__(self, cfg: config.Config, *arguments: str, before: Callable[[], None] | None = None, env=None):
        folder = cfg.run.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        given = folder.with_name(f"{folder.name}.yml")
        text = config.dump(cfg).encode()
        write_atomically(given, lambda file: file.write(text))  # another rank may be reading it
        self.log = folder.with_name(f"{folder.name}.log")
        self.mark = mmap.mmap(-1, 2)  # shared: 1 while a checkpoint is written; 1 once the loop has begun
        sys.stdout.flush()
        self.pid, self.started = os.fork(), time.monotonic()
        if self.pid == 0:
            self._child(["--cfg", str(given), *arguments], before, env or {})

    def _child(self, argv: list[str], before: Callable[[], None] | None, env: dict[str, str]) -> None:
        code = 70
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ.update(env)
            torch.set_num_threads(1)
            save, loop = checkpoints.save, trainer.Trainer.loop

            def marked_save(*a, **k):
                self.mark[0] = 1
                save(*a, **k)
                self.mark[0] = 0

            def marked_loop(run):
                self.mark[1] = 1
                loop(run)

            checkpoints.save, trainer.Trainer.loop = marked_save, marked_loop
            if before:
                before()
            code = main.main(argv)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    def wait(self, limit: float = 120) -> int:
        """The exit code; minus the signal that ended it."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise Lost(f"still there after {limit:.0f} s: {self.said()}")

    def until(self, place: int) -> None:
        """Wait until the loop has begun (1) or a checkpoint is being written (0)."""
        deadline = time.monotonic() + 60
        while not self.mark[place] and time.monotonic() < deadline and Path(f"/proc/{self.pid}/stat").exists():
            if Path(f"/proc/{self.pid}/stat").read_text().split()[2] == "Z":
                return
            time.sleep(0.0005)

    def said(self) -> str:
        return self.log.read_text()


def at_step(step: int, action: Callable[[TrainingStep], None]) -> None:
    """Call action(its TrainingStep) before step `step` of every run of this process."""
    real = TrainingStep.__call__

    def observed(self, *batch):
        if self.step == step:
            action(self)
        real(self, *batch)

    TrainingStep.__call__ = observed


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint by its place."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, place: str) -> None:
        if torch.is_tensor(value):
            found[place] = value
        elif isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in pairs:
                walk(part, f"{place}/{key}")

    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    walk(state, "")
    return {**found, "step": torch.tensor(state["step"])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def inspect(folder: Path) -> int:
    """Read every file of a run; the number of checkpoints. Raises where one cannot be read."""
    paths = sorted((folder / "checkpoints").glob("*.ckpt"))
    for path in paths:
        checkpoints.load(path)
    for path in folder.glob("samples/*.png"):
        Image.open(path).load()
    if (folder / "config.yml").exists():
        config.load(folder / "config.yml")
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
    return len(paths)


def reference(folder: Path, **changes: dict) -> dict[str, torch.Tensor]:
    """The state of an unbroken run."""
    run = Run(tiny(folder, train=TRAIN, sample={"grid": 4, "every": 5}, **changes))
    check(run.wait() == 0, run.said())
    return state_of(folder)


# Crashes and signals --------------------------------------------------------------------------------------------------


def crash(times: int, folder: Path) -> str:
    """kill -9 at random moments, every third one while a checkpoint is being written."""
    rng = random.Random(times)
    whole = reference(folder / "unbroken")
    began = time.monotonic()
    check(Run(tiny(folder / "timed", train=TRAIN, sample={"grid": 4, "every": 5})).wait() == 0, "no run")
    length = time.monotonic() - began
    kills = saving = checked = finished = 0
    while kills < times or not finished:
        cfg = tiny(folder / f"run{finished}", train=TRAIN, sample={"grid": 4, "every": 5})
        newest = -1
        while True:
            run = Run(cfg, *resuming(cfg.run.folder))
            if kills >= times:
                code = run.wait()
            elif kills % 3 == 0:
                run.until(1)
                for _ in range(rng.randrange(4)):  # let some checkpoints pass
                    run.until(0)
                    time.sleep(0.02)
                run.until(0)
                time.sleep(rng.random() * 0.006)
                code = end(run)
            else:
                time.sleep(rng.random() * length)
                code = end(run)
            if code == 0:
                check(same(state_of(cfg.run.folder), whole), f"other weights: {cfg.run.folder}")
                finished += 1
                break
            check(code == -signal.SIGKILL, f"exit code {code}: {run.said()}")
            kills, saving = kills + 1, saving + run.mark[0]
            checked += inspect(cfg.run.folder)
            if (cfg.run.folder / "checkpoints" / "last.ckpt").exists():
                step = checkpoints.load(cfg.run.folder / "checkpoints" / "last.ckpt")["step"]
                check(step >= newest, "a checkpoint was lost")
                newest = step
    litter = [path for i in range(finished) for path in (folder / f"run{i}").rglob(".*.part")]
    check(not litter, litter)
    return (
        f"{kills} kills, {saving} of them while a checkpoint was being written; {checked} checkpoints read after them; "
        f"{finished} runs finished by --resume, final state equal bit for bit"
    )


def resuming(folder: Path) -> list[str]:
    """What goes on with a run: --resume, or, as it is told, a new start without what was left of one never saved."""
    if checkpoints.saved(folder / "checkpoints"):
        return ["--resume"]
    shutil.rmtree(folder, ignore_errors=True)
    return []


def end(run: Run) -> int:
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGKILL)
    return run.wait()


def signals(times: int, folder: Path) -> str:
    """SIGTERM, SIGINT, both twice, to the process or its group with loading processes, and while scoring."""
    rng = random.Random(times)
    whole, lazy = reference(folder / "unbroken"), image_folder(folder / "images")
    data = {"name": "folder", "path": str(lazy), "resolution": 8, "channels": 1, "memory_gb": 0.0, "workers": 2}
    whole_lazy = reference(folder / "unbroken_lazy", data=data)
    tried = 0
    for i in range(times):
        for kind in ("SIGTERM", "SIGINT", "group", "group SIGINT", "twice", "scoring"):
            lazily = kind.startswith("group")
            settings = {"sample": {"grid": 4, "every": 5}, **({"data": data} if lazily else {})}
            if kind == "scoring":
                settings["metrics"] = {"features": "classifier", "num": 100, "at_end": False, "every": 7}
            cfg = tiny(folder / f"{kind.replace(' ', '-')}{i}", train=TRAIN, **settings)

            slow_now = folder / f"slow{i}"

            def slow(kind: str = kind, slow_now: Path = slow_now) -> None:
                if kind == "twice":
                    at_step(9, lambda _: (slow_now.touch(), time.sleep(60)))
                elif kind == "scoring":
                    scores.score = lambda *a, **k: time.sleep(60)
                at_step(11, lambda _: time.sleep(0.5))  # so that no run is over before its signal

            run = Run(cfg, before=slow)
            run.until(1)
            number = signal.SIGTERM if kind in ("SIGTERM", "group", "scoring") else signal.SIGINT
            if kind == "scoring":
                wait_for(cfg.run.folder / "samples" / "step-00000005.png")
                time.sleep(0.5)
            elif kind == "twice":
                wait_for(slow_now)
            else:
                time.sleep(rng.random() * 0.3)
            (os.killpg if lazily else os.kill)(run.pid, number)
            if kind == "twice":
                time.sleep(0.2)
                os.kill(run.pid, signal.SIGINT)
            began = time.monotonic()
            code, said = run.wait(), run.said()
            took = time.monotonic() - began
            check(code == (130 if kind == "twice" else 0) and took < 30, f"{kind}: {code} after {took:.1f} s: {said}")
            if kind != "twice":
                check(f"--cfg {cfg.run.folder}/config.yml --resume" in said, f"{kind}: {said}")
            check("Traceback" not in said, said)
            inspect(cfg.run.folder)
            again = Run(tiny(cfg.run.folder, train=TRAIN, **{**settings, "metrics": {"at_end": False}}), "--resume")
            check(again.wait() == 0, again.said())
            check(same(state_of(cfg.run.folder), whole_lazy if lazily else whole), f"{kind}: other weights")
            tried += 1
    return f"{tried} signals of 6 kinds; each run went on by --resume to the unbroken run's state bit for bit"


def ends(times: int, folder: Path) -> str:
    """A run ended by bad data, a decoding process's death, its method or a full memory: saved first, one line."""
    rng, images = random.Random(times), image_folder(folder / "images")
    victim, kept = images / "07.png", (images / "07.png").read_bytes()
    data = {"name": "folder", "path": str(images), "resolution": None, "channels": 1, "memory_gb": 0.0}
    train = {**TRAIN, "steps": 24, "save_every": 8}  # what was trained since would be lost
    unbroken = Run(tiny(folder / "unbroken", train=train, data={**data, "workers": 0}))
    check(unbroken.wait() == 0, unbroken.said())
    whole = state_of(folder / "unbroken")

    def fail(error: BaseException) -> None:
        raise error

    def kill() -> None:
        for child in torch.multiprocessing.active_children():
            child.kill()

    kinds: dict[str, tuple[Callable[[], object], int]] = {  # what happens -> the exit code
        "cut short": (lambda: victim.write_bytes(kept[:-30]), 2),
        "another size": (lambda: Image.new("L", (9, 9)).save(victim), 2),
        "removed": (victim.unlink, 2),
        "killed": (kill, 1),
        "method": (lambda: fail(ZeroDivisionError("in the method")), 1),
        "no memory": (lambda: fail(MemoryError()), 1),
        "no GPU memory": (lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), 2),
        "no handles": (lambda: fail(OSError(24, "Too many open files", "/dev/shm/x")), 1),
    }
    tried = 0
    for i in range(times):
        for kind, (happens, expected) in kinds.items():
            for workers in (0, 2) if expected == 2 and kind != "no GPU memory" else (2,):
                name = f"{kind}{i}-{workers}".replace(" ", "-")
                cfg, step = tiny(folder / name, train=train, data={**data, "workers": workers}), rng.randrange(9, 13)
                run = Run(cfg, before=lambda step=step, happens=happens: at_step(step, lambda _: happens()))
                code, said = run.wait(), run.said()
                victim.write_bytes(kept)
                check(code == expected and "Traceback" not in said, f"{kind}: {code}: {said}")
                saved = inspect_newest(cfg.run.folder)
                check(step <= saved < 24, f"{kind} at step {step}: step {saved} is saved")
                last = said.rstrip().splitlines()[-1]
                check(f"step {saved} is saved; continue with: " in last and last.endswith("--resume"), said)
                again = Run(cfg, "--resume")
                check(again.wait() == 0, again.said())
                check(same(state_of(cfg.run.folder), whole), f"{kind}: other weights")
                tried += 1
    return f"{tried} ends of {len(kinds)} kinds; the last whole step saved, and --resume to the unbroken run's state"


def image_folder(folder: Path) -> Path:
    """20 small grey images."""
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("L", (8, 8), i * 12).save(folder / f"{i:02d}.png")
    return folder


def wait_for(path: Path, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not path.exists():
        check(time.monotonic() < deadline, f"no {path}")
        time.sleep(0.01)


# The disk -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 4) -> Iterator[bool]:
    """A tmpfs on `folder`, if this user may mount one; whether it could be done."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True
    ).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Write a file until the disk is full to the last byte."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(100_000))
    with open(folder / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0"):
            pass


def disk_full(times: int, folder: Path) -> str:
    """A disk that fills up while a run saves, and empties again or not; its output goes to the same disk."""
    tried, how = 0, "RLIMIT_FSIZE"
    for i in range(times):
        for kind in ("for a while", "to the end", "stop"):
            with small_disk(folder / "disk") as mounted:
                run_folder = folder / "disk" / "run" if mounted else folder / f"limited{i}{kind[:2]}"
                how = "a tmpfs of 4 MB" if mounted else how

                def filled(_, mounted=mounted):
                    if mounted:
                        fill(folder / "disk")
                    else:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

                def emptied(_, mounted=mounted):
                    if mounted:
                        (folder / "disk" / "filler").unlink()
                    else:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

                def before(kind=kind, i=i, filled=filled, emptied=emptied):
                    at_step(9 + i % 7, filled)
                    if kind == "for a while":
                        at_step(25, emptied)

                train = {**TRAIN, "on_save_error": "stop" if kind == "stop" else "continue"}
                run = Run(tiny(run_folder, train=train, sample={"grid": 4, "every": 5}), before=before)
                code = run.wait()
                newest = inspect_newest(run_folder)
                if kind == "for a while":
                    check(code == 0 and newest == STEPS, f"{kind}: {code}, step {newest}: {run.said()}")
                else:
                    check(code == 1 and newest == 8 + (i % 7 + 1) // 2 * 2, f"{kind}: {code}, {newest}: {run.said()}")
                if not mounted:
                    check(str(run_folder / "checkpoints") in run.said(), run.said())
                check("Traceback" not in run.said(), run.said())
                tried += 1
    return f"{tried} times ({how}); the checkpoint before it stayed whole; the run went on, or stopped with exit code 1"


def inspect_newest(folder: Path) -> int:
    """Read every file of a run; the step of the newest checkpoint."""
    inspect(folder)
    return checkpoints.newest_good(folder / "checkpoints")[1]["step"]


def disk_read_only(times: int, folder: Path) -> str:
    """A run folder that becomes read-only, from the start or while it trains."""
    tried, how = 0, "permissions"
    for _ in range(times):
        for kind in ("from the start", "while training"):
            with small_disk(folder / "disk") as mounted:
                if not mounted and os.geteuid() == 0:
                    return "not tried: root without the right to mount has no read-only folder"
                how = "tmpfs remounted ro" if mounted else how
                run_folder = folder / "disk" / "run"
                run_folder.mkdir(exist_ok=True)

                def lock(_run=None, mounted=mounted, path=run_folder):
                    if mounted:
                        subprocess.run(["mount", "-o", "remount,ro", path.parent], check=True)
                    else:
                        for part in (path, *path.glob("*/")):
                            part.chmod(0o500)

                cfg = tiny(run_folder, train=TRAIN, sample={"grid": 4, "every": 5})
                given = tiny(folder / "run", train=TRAIN)  # only for its place: config and log lie outside
                at = "while" in kind
                run = Run(given, f"run.dir={run_folder}", before=(lambda lock=lock: at_step(9, lock)) if at else lock)
                code, said = run.wait(), run.said()
                check("Traceback" not in said, said)
                if at:
                    check(code == 1 and inspect_newest(run_folder) == 8, f"{code}: {said}")
                    check(f"no checkpoint could be written in {run_folder}/checkpoints" in said, said)
                    check(("the one of step 8 is the newest" in said and "Read-only" in said) or not mounted, said)
                else:
                    check(code == 2 and f"run.dir: {run_folder} cannot be written" in said, f"{code}: {said}")
                run.log.unlink()
                if not mounted:
                    subprocess.run(["chmod", "-R", "u+w", run_folder], check=True)
                if mounted:
                    subprocess.run(["mount", "-o", "remount,rw", run_folder.parent], check=True)
                if at and mounted:
                    again = Run(cfg, "--resume")
                    check(again.wait() == 0 and inspect_newest(run_folder) == STEPS, again.said())
                shutil.rmtree(run_folder)
                tried += 1
    return f"{tried} times ({how}); the checkpoint before it stayed whole; exit code 1 at the end, 2 at the start"


def folder_removed(times: int, folder: Path) -> str:
    """checkpoints/, samples/ or the whole run folder removed, or made a link elsewhere, while a run trains."""
    tried = 0
    for i in range(times):
        for kind in ("checkpoints", "samples", "", "link"):
            outside = folder / f"outside{i}{kind}"
            outside.mkdir()
            (outside / "step-00000001.ckpt").write_text("not ours")

            run_folder = folder / f"run{i}-{kind}"

            def remove(_, kind=kind, outside=outside, run_folder=run_folder):
                shutil.rmtree(run_folder / kind.replace("link", "checkpoints"))
                if kind == "link":
                    (run_folder / "checkpoints").symlink_to(outside)

            cfg = tiny(run_folder, train=TRAIN, sample={"grid": 4, "every": 5})
            run = Run(cfg, before=lambda i=i, remove=remove: at_step(9 + i, remove))
            code, said = run.wait(), run.said()
            check("Traceback" not in said, said)
            check([p.name for p in outside.iterdir()] == ["step-00000001.ckpt"], "written outside")
            if kind == "link":
                check(code == 1 and "symbolic link" in said, f"{code}: {said}")
                again = Run(cfg, "--resume")
                check(again.wait() == 2 and "refused" in again.said(), again.said())
            else:
                check(code == 0 and inspect_newest(run_folder) == STEPS, f"{kind}: {code}: {said}")
                check((run_folder / "config.yml").exists(), "no config.yml: the run could not be resumed")
            tried += 1
    return f"{tried} times; the run made it anew and went on; a link in its place was refused, nothing outside changed"


def moved(times: int, folder: Path) -> str:
    """A run folder moved or copied, and resumed and sampled from by the config.yml in it, from any folder."""
    import generate

    whole, tried = reference(folder / "unbroken"), 0
    for i in range(times):
        for kind in ("moved", "copied", "from inside"):
            cfg = tiny(folder / f"old{i}-{kind[:4]}", train=TRAIN, sample={"grid": 4, "every": 5})
            run = Run(cfg, before=lambda: at_step(9, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
            check(run.wait() == 0, run.said())
            there = folder / f"new{i}" / kind / "run"
            there.parent.mkdir(parents=True)
            (shutil.copytree if kind == "copied" else shutil.move)(cfg.run.folder, there)
            before = sorted(folder.glob("old*/**/*"))
            with working_in(there if kind == "from inside" else folder):
                own = Path("config.yml") if kind == "from inside" else there.relative_to(folder) / "config.yml"
                code, said = in_process(main.main, ["--cfg", str(own), "--resume"])
                check(code == 0 and not said, f"{kind}: {code}: {said}")
                check(same(state_of(there), whole), f"{kind}: other weights")
                ckpt = str(there / "checkpoints" / "last.ckpt")
                code, said = in_process(generate.main, ["--cfg", str(own), "--ckpt", ckpt, "--num", "4"])
                check(code == 0 and (there / "generated" / "000").exists(), f"{kind}: {code}: {said}")
                code, said = in_process(main.main, ["--cfg", str(own), "--resume", f"run.dir={folder / 'nothing'}"])
                one_line(code, said, "no checkpoint is saved there")
            check(not (folder / "nothing").exists() and sorted(folder.glob("old*/**/*")) == before, "the old place")
            tried += 1
    return f"{tried} runs, gone on with where they lay; nothing made in the old place; an empty place refused"


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def other_data(times: int, folder: Path) -> str:
    """A run resumed on other data: classes renamed, images replaced, added, removed or moved between classes."""
    rng, tried = random.Random(times), 0

    def classes(root: Path) -> Path:
        for name in ("cat", "dog", "owl"):
            image_folder(root / name)
        return root

    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        "renamed": (lambda root: (root / "owl").rename(root / "bird"), "class 0 was 'cat', is 'bird'"),
        "replaced": (lambda root: Image.new("L", (8, 8), 7).save(root / "dog" / "03.png"), "fingerprint"),
        "added": (lambda root: Image.new("L", (8, 8), 7).save(root / "dog" / "99.png"), "61 images, were 60"),
        "removed": (lambda root: (root / "owl" / "11.png").unlink(), "59 images, were 60"),
        "moved": (lambda root: (root / "cat" / "05.png").rename(root / "owl" / "50.png"), r"'cat'\) has 19 images"),
    }
    for i in range(times):
        for kind, (change, words) in changes.items():
            images = classes(folder / f"{kind}{i}-images")
            data = {"name": "folder", "path": str(images), "conditional": True, "memory_gb": rng.choice([0.0, 1.0])}
            cfg = tiny(folder / f"{kind}{i}", train={"steps": 2}, data={**data, "workers": 0})
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train(cfg)
            before = {path: path.read_bytes() for path in cfg.run.folder.rglob("*") if path.is_file()}
            change(images)
            argv = ["--cfg", str(cfg.run.folder / "config.yml"), "--resume", "train.steps=4"]
            one_line(*in_process(main.main, argv), words)
            check(all(path.read_bytes() == content for path, content in before.items()), "the run was changed")
            code, said = in_process(main.main, [*argv, "--other-data"])
            check(code == 0 and re.search(words, said) and state_of(cfg.run.folder)["step"] == 4, said)
            tried += 1
    return f"{tried} changes of {len(changes)} kinds, each refused by name; --other-data went on with each"


# Damaged checkpoints --------------------------------------------------------------------------------------------------


def damage(times: int, folder: Path) -> str:
    """A checkpoint cut short, with bits turned over, empty, of another format, network or config."""
    rng = random.Random(times)
    run_folder = folder / "run"
    trainer.train(tiny(run_folder, train={"steps": 4}))
    older, newest = checkpoints.numbered(run_folder / "checkpoints")
    last = newest.with_name("last.ckpt")
    good, reference = newest.read_bytes(), checkpoints.load(newest)
    data = range(len(good))
    fell_back = 0

    def equal(a: object, b: object) -> bool:
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b

    def load(content: bytes) -> bool:
        """Whether it is refused, in one line with its name; what is read must be what was written."""
        bad = folder / "bad.ckpt"
        bad.write_bytes(content)
        try:
            state = checkpoints.load(bad)
        except checkpoints.CheckpointError as error:
            check("\n" not in str(error) and "bad.ckpt" in str(error), error)
            return True
        check(equal(state, reference), "a damaged file was read as something else")
        return False

    cuts = [0, 1, *(len(good) * i // 20 for i in range(1, 20)), len(good) - 1]
    check(all(load(good[:cut]) for cut in cuts), "a file cut short was read")
    ends = [*range(0, 4000), *range(len(good) - 12_000, len(good))]  # headers, and the list of contents at the end
    for i in range(times):
        place = rng.choice(ends) if i % 2 else rng.choice(data)
        turned = load(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
        check(turned, f"a turned bit at {place} was read")
    for i in range(max(times // 100, 4)):  # --resume takes the one before, and says so
        content = [b"", good[: rng.randrange(len(good))], bytes(len(good)), good[:5000] + b"\0" * 99 + good[5099:]][
            i % 4
        ]
        for path in (newest, last):
            path.unlink()
            path.write_bytes(content)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            run = trainer.Trainer(tiny(run_folder, train={"steps": 4}))
            run.resume()
        check(run.train_step.step == 2 and f"going on from {older}" in said.getvalue(), said.getvalue())
        fell_back += 1

    def refuses(words: str, state: dict | None = None, **changes: dict) -> None:
        for path in (older, newest):
            path.unlink(missing_ok=True)
        last.unlink(missing_ok=True)
        torch.save(state or reference, last)
        before = last.read_bytes()
        code, said = in_process(main.main, tiny_command(folder, run_folder, train={"steps": 4}, **changes))
        check(code == 2 and words in said and said.count("\n") == 1 and "last.ckpt" in said, f"{words}: {code}: {said}")
        check(last.read_bytes() == before, "the checkpoint was changed")

    others = 0
    for version in (0, 2, "1", None, torch.zeros(3)):
        refuses("is of format", {**reference, "format": version})
        others += 1
    for part in PARTS:
        for state in ({k: v for k, v in reference.items() if k != part}, {**reference, part: "x"}):
            refuses("not a whole checkpoint", state)
            others += 1
    refuses("another config: network.model_channels is 8 there and 12 here", network={"model_channels": 12})
    refuses("another config: objective.name", objective={"name": "edm"})
    refuses("another config: run.seed", run={"seed": 3, "dir": str(run_folder), "device": "cpu"})
    first = next(iter(reference["model"]))
    optimizer = {**reference["optimizer"], "exp_avg": [torch.zeros(()) for _ in reference["optimizer"]["exp_avg"]]}
    for wrong in (
        {"model": {**reference["model"], first: torch.zeros(1)}},
        {"ema": reference["ema"][:1]},
        {"ema": [{}, {}]},
        {"optimizer": optimizer},
        {"objective": {"x": torch.zeros(1)}},
    ):
        refuses("does not fit this run", {**reference, **wrong})
    return (
        f"{len(cuts)} cuts, {times} turned bits and "
        f"{others + 8} other files, each refused by name; --resume fell back {fell_back} times and said so"
    )


def tiny_command(folder: Path, run_folder: Path, **changes: dict) -> list[str]:
    (folder / "given.yml").write_text(config.dump(tiny(run_folder, **changes)))
    return ["--cfg", str(folder / "given.yml"), "--resume"]


def in_process(command: Callable[[list[str]], int], argv: list[str]) -> tuple[int, str]:
    """Exit code and what a command says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = command(argv)
        except SystemExit as error:
            code = error.code
    return code, said.getvalue()


# Fuzz -----------------------------------------------------------------------------------------------------------------

ODD = [
    None, True, False, 0, 1, 2, 3, 7, -1, 0.0, 0.5, -0.0, 1e-300, 1e300, 1e999, float("nan"), 10**12, 2**63,
    -(2**63), 10**400,
    "", " ", "a", "null", "auto", "\0", "a\0b", "\ud800", "..", "/", "/dev/null", "/dev/null/x", "/proc/self/mem",
    "x" * 5000,
    "a\nb", "\x1b[31m", "é", "1e-4", "[]", "~", "cuda:99", "mps", [], [0], [1, 2], [1.5], [[1]], ["a", None],
    [0.999] * 40,
    {}, {"a": 1}, {"name": "edm"}, {1: 2}, "edm", "ect", "scd", "zip", "npz", "folder", "lpips", "heun", "fp16", "bf16",
]  # fmt: skip
SIZES = ("model_channels", "batch_size", "channel_mult", "channel_mult_emb", "channel_mult_noise", "num_blocks", "grid",
         "microbatch", "channels_per_head", "norm_groups", "resample_filter", "resolution", "heun_steps", "num", "N",
         "s0",
         "s1", "attn_resolutions", "steps", "workers", "fourier_scale", "memory_gb")  # fmt: skip


def one_line(code: int, said: str, names: str) -> None:
    """A refusal is exit code 2 and one line that names what is wrong."""
    check(code == 2 and said.count("\n") == 1 and said.endswith("\n"), f"exit code {code}: {said}")
    check(re.search(names, said), f"names nothing: {said}")


@functools.cache
def likely(section: str, key: str) -> list:
    """Values that may well be right: those of our configs, the choices and neighbours of the default."""
    found = [
        yaml.safe_load(path.read_text()).get(section, {}).get(key)
        for path in [HERE.parent / "config.yml", *HERE.parent.glob("configs/*.yml")]
    ]
    for kind in config.kinds(section).values():
        if key in kind.model_fields:
            found += get_args(kind.model_fields[key].annotation)
            default = kind.model_fields[key].default
            found += [default, default + 1, default / 2] if type(default) in (int, float) else [default]
    plain = (str, int, float, bool, list, type(None))
    return [value for value in found if type(value) in plain]


def mutated_config(draw) -> tuple[dict, list]:
    """A small config with one to three settings changed, dropped, misspelt or moved."""
    from hypothesis import strategies as st

    raw = json.loads(json.dumps(TINY))
    raw["train"]["steps"] = 2
    raw["objective"] = {"name": draw(st.sampled_from(["ect", "edm", "ct", "ict", "trigflow", "sct"]))}
    if raw["objective"]["name"] in ("trigflow", "sct"):
        raw["network"]["precond"] = "trigflow"
    if draw(st.booleans()):
        raw["network"]["name"] = "dhariwal_unet"
    names = {section: sorted(type(value).model_fields) for section, value in config.parse(raw)}
    if draw(st.integers(0, 9)) == 0:  # settings of other networks and objectives too
        names = {s: sorted({key for kind in config.kinds(s).values() for key in kind.model_fields}) for s in names}
    odd = st.one_of(
        st.sampled_from(ODD), st.integers(0, 20), st.floats(-1, 3), st.text(max_size=6), st.lists(st.integers(0, 9))
    )
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(list(names)))
        key = draw(st.sampled_from(names[section]))
        how = draw(st.sampled_from(["set"] * 9 + ["typo", "section", "move", "drop"]))
        content = raw.get(section)
        if not isinstance(content, dict):
            content = raw[section] = {}
        if how == "set":
            content[key] = draw(odd if draw(st.integers(0, 4)) == 0 else st.sampled_from(likely(section, key)))
        elif how == "typo":
            content[key[:-1] + draw(st.sampled_from("xyz_ 1"))] = draw(odd)
        elif how == "section":
            raw[draw(st.sampled_from([section, section + "s", "Train", ""]))] = draw(odd)
        elif how == "move":
            raw.setdefault(draw(st.sampled_from(list(names))), {})
            raw = {s: ({**v, key: 1} if isinstance(v, dict) else v) for s, v in raw.items()}
        else:
            content.pop(key, None)
    return raw


def fuzz_configs(times: int, folder: Path) -> str:
    """Mutated configs, as settings and as text: one line with the key and exit code 2, or a run of two steps."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    counts = {"refused": 0, "run": 0, "accepted": 0}
    number = iter(range(10**9))

    @settings(
        max_examples=times, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def fuzz(source) -> None:
        raw = mutated_config(source.draw)
        text = yaml.safe_dump(raw, allow_unicode=False)
        if source.draw(st.integers(0, 3)) == 0:  # a quarter of them as text, with a few characters changed
            for _ in range(source.draw(st.integers(1, 3))):
                at = source.draw(st.integers(0, len(text)))
                text = text[:at] + source.draw(st.sampled_from(PIECES)) + text[at + source.draw(st.integers(0, 3)) :]
        path, run_folder = folder / "c.yml", folder / f"runs{next(number)}"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        where = [] if source.draw(st.booleans()) else [f"run.dir={run_folder}"]
        real, trained = trainer.train, []

        def small(cfg: config.Config, *how: bool) -> None:
            trained.append(cfg)
            check(config.parse(cfg.model_dump()) == cfg, "another config when it is read again")
            if cfg.run.folder == run_folder and affordable(cfg):
                counts["run"] += 1
                real(cfg, *how)

        trainer.train = small
        try:
            code, said = in_process(main.main, ["--cfg", str(path), *where])
        finally:
            trainer.train = real
        if code == 0:
            counts["accepted"] += 1
        else:
            counts["refused"] += 1
            one_line(code, said, rf"{path}|command line|\b({'|'.join(config.Config.model_fields)})\b")

    fuzz()
    total = counts["refused"] + counts["accepted"]
    return f"{total}: {counts['refused']} refused in one line, {counts['accepted']} accepted; {counts['run']} were run"


PIECES = ["", ":", "- ", "\n", "\t", "  ", "!!python/object/apply:os.system [true]", "&a ", "*a", "{", "]", "<<: ",
          "'", "\x00",
          "? ", "!!set", "!!binary x", "2001-99-99", "0x", "0b1", "1:60", "---\n", "%YAML 9", "\ufeff", "é", "#",
          "|", "@"]  # fmt: skip


def affordable(cfg: config.Config) -> bool:
    """Whether two steps of it take a moment: sizes are small, and nothing is to be downloaded."""

    def largest(value: object) -> float:
        if isinstance(value, list):
            return max(map(largest, value), default=0)
        return value if isinstance(value, int | float) else 0

    sizes = [largest(v) for part in cfg.model_dump().values() for k, v in part.items() if k in SIZES and k != "num"]
    free = (
        cfg.data.name in ("digits", "folder", "zip", "npz", "imagenet9")
        and getattr(cfg.objective, "metric", "") != "lpips"
    )
    scored = cfg.metrics.at_end or 0 < cfg.metrics.every <= 2
    return max(sizes) <= 40 and free and not scored and cfg.train.compile is not True and len(cfg.ema.decay or []) < 9


def fuzz_commands(times: int, folder: Path) -> str:
    """Mutated command lines of main.py, generate.py, edit.py and convert.py."""
    import convert
    import edit
    import generate

    rng = random.Random(times)
    trainer.train(tiny(folder / "run", train={"steps": 2}, data={"conditional": True}))
    Image.new("L", (8, 8), 99).save(folder / "photo.png")
    cfg, ckpt = str(folder / "run" / "config.yml"), str(folder / "run" / "checkpoints" / "last.ckpt")
    small = ["--num", "12", "--batch", "6", "--steps", "2", "--seed", "1", "--class", "3", "--ema", "1"]
    lines = {
        "main.py": (main.main, ["--cfg", cfg, "--resume", "train.steps=3", "train.lr=0.001", "sample.every=1"]),
        "generate.py": (generate.main, ["--cfg", cfg, "--ckpt", ckpt, *small, "--format", "png", "run.seed=1"]),
        "edit.py": (edit.main, [
            "inpaint", "--cfg", cfg, "--ckpt", ckpt, "--input", str(folder / "photo.png"), "--mask", "1,1,3,3",
            "--num", "2",
            "--steps", "2", "--class", "1",
        ]),
        "convert.py": (convert.main, ["export", ckpt, "target", "--to", "safetensors"]),
    }  # fmt: skip
    odd = ["", "-", "--", "-1", "0", "3", "1e9", "99999999999999999999", "nan", "inf", "1,2", "80,0.8", ",", "a=b",
           "train.lr=",
           "x" * 5000, "\udcff", "é", "٣", "--steps", "--sigmas", "--sweep", "--search-sigmas", "--nearest",
           "--calc_fid",
           "--samples", "--out", "--help", "--factor", "--sigma", "superres", "denoise", "stroke", "interpolate",
           "colorize",
           "import", "export", "--arch", "diffusers", "/", "/dev/null", "/proc/self/mem", cfg, ckpt,
           str(folder), "--num=2",
           "metrics.num=100", "network.sigma_max=1", "sample.sigmas=[80,90]", "sample.sigmas=&a [*a]",
           "run.name=../x"]  # fmt: skip
    extra = [["--nearest"], ["--calc_fid"], ["--calc_fid", "train.lr=1"], ["--steps", "3"], ["--sigmas", "80,2,0.5"],
             ["--num", "30"],
             ["--sweep", "1,2"], ["--search-sigmas", "2"], ["--ema", "7"], ["--class", "99"], ["--batch",
             "99999999999"],
             ["--sigma", "0.5"], ["--factor", "2"], ["--seed", str(2**63)], ["--out", "/dev/null/x"], ["--out", "\0"],
             ["sample.solver=heun"], ["sample.sigmas=[2]"], ["network.sigma_data=2"], ["run.dir=a"], ["--num",
             "1" + "0" * 30],
             ["--steps", "1" + "0" * 30], ["train.steps=3"], ["objective=3"], ["network={}"], ["a.b.c=1"],
             ["run.device=cuda"],
             ["train.keep=1"], ["sample.grid=1000"], ["run.dir=/dev/null/x"], ["run.dir=/proc/x"],
             ["run.dir=" + "x" * 300]]  # fmt: skip
    counts = dict.fromkeys(("done", "refused"), 0)
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)  # a command that takes a minute
    names = sorted(lines)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for i in range(times):
        name = names[i % len(names)]
        command, argv = lines[name][0], list(lines[name][1])
        if name in ("generate.py", "edit.py"):
            argv += ["--out", str(folder / f"out{i}")]
        if name == "convert.py":
            argv[2] = str(folder / f"out{i}")
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            options = [at for at, word in enumerate(argv[:-1]) if word.startswith("--") and word != "--resume"]
            at = rng.choice(options) + 1 if options and rng.randrange(2) else rng.randrange(len(argv))
            match rng.randrange(8):
                case 0 | 1:
                    argv[at] = rng.choice(odd)
                case 2:
                    argv.insert(at, rng.choice(odd))
                case 3 if len(argv) > 1:
                    del argv[at]
                case 4:
                    argv.insert(at, argv[rng.randrange(len(argv))])
                case 5 if argv[at]:
                    place = rng.randrange(len(argv[at]))
                    argv[at] = argv[at][:place] + rng.choice("-=.,0aé \n") + argv[at][place + 1 :]
                case 6 | 7:
                    argv += rng.choice(extra)
        try:
            signal.alarm(60)
            with small_scores(), contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
                code, said = in_process(command, argv)
            signal.alarm(0)
        except BaseException as error:
            traceback.print_exc()
            raise Lost(f"{type(error).__name__} of {name} {argv}") from None
        counts["done" if code in (0, 1) else "refused"] += 1
        if code in (0, 1, 130):
            check(code == 0 or said.count("\n") == 1, f"{name} {argv}: {code}: {said}")
        else:
            check(code == 2 and said.strip().count("\n") == 0 and said.strip(), f"{name} {argv}: {code}: {said}")
        if name == "main.py":  # the run has gone on: the next command finds it as it was
            shutil.rmtree(folder / "run")
            for path, content in before.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        check(
            all(path.read_bytes() == content for path, content in before.items()), f"{name} {argv}: wrote over a file"
        )
    return f"{times}: {counts['refused']} refused in one line, {counts['done']} carried out"


@contextlib.contextmanager
def small_scores() -> Iterator[None]:
    """Scores cost seconds and are none of a command line's business."""
    real, scores.score = scores.score, lambda samples, *a, **k: {"fid": float(len(samples))}
    try:
        yield
    finally:
        scores.score = real


def fuzz_data(times: int, folder: Path) -> str:
    """Mutated dataset folders, zips and npz files: a dataset, or one line that names data."""
    import logging

    import numpy as np

    import data

    logging.getLogger("sources").setLevel(logging.ERROR)
    rng = np.random.default_rng(times)
    source = folder / "source"
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (source / str(i % 2)).mkdir(parents=True, exist_ok=True)
        kind = ["png", "jpg", "bmp", "gif", "webp", "tiff"][i]
        Image.fromarray(image).save(source / str(i % 2) / f"{i}.{kind}")
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.*"))
    labels = json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]})
    refused = read = 0

    def flip(content: bytes) -> bytes:
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 12)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        cut = rng.integers(len(mutated)) if rng.integers(6) == 0 else len(mutated)
        return bytes(mutated[:cut])

    def hostile(root: Path) -> None:
        """One thing in the folder that should not be there."""
        path = root / str(rng.integers(2)) / f"z{rng.integers(9)}.png"
        match rng.integers(8):
            case 0:
                path.symlink_to("/dev/zero")
            case 1:
                path.symlink_to(root)
            case 2:
                os.mkfifo(path)
            case 3:
                path.symlink_to(path.with_name("nowhere"))
            case 4:
                path.mkdir()
            case 5:
                path.write_bytes(b"")
            case 6:
                (root / "0" / "a\nb\x1b.png").write_bytes(b"no")
            case 7:
                (root / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"no")

    for i in range(times):
        kind = ("folder", "zip", "npz")[i % 3]
        path = folder / f"set{i}"
        if kind == "folder":
            shutil.copytree(source, path)
            for name in rng.choice(names, rng.integers(1, 4)):
                (path / name).write_bytes(flip((path / name).read_bytes()))
            hostile(path)
        elif kind == "zip":
            path = path.with_suffix(".zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if rng.integers(2) else zipfile.ZIP_STORED) as archive:
                for name in names:
                    content = (source / name).read_bytes()
                    archive.writestr(name, flip(content) if rng.integers(3) == 0 else content)
                archive.writestr("dataset.json", labels if rng.integers(3) else flip(labels.encode()))
                if rng.integers(8) == 0:
                    archive.writestr(["../a.png", "/a.png", "..\\a.png", "c:a.png"][rng.integers(4)], b"x")
            if rng.integers(2):
                path.write_bytes(flip(path.read_bytes()))
        else:
            path = path.with_suffix(".npz")
            np.savez(path, images=images, labels=np.arange(6) % 2)
            path.write_bytes(flip(path.read_bytes()))
        section = {
            "name": kind,
            "path": str(path),
            "dir": str(folder / "cache"),
            "on_broken": ["skip", "fail"][i // 3 % 2],
        }
        odd = {"resolution": [None, 8, 5][rng.integers(3)], "memory_gb": [0.0, 1.0][rng.integers(2)]}
        cfg = config.parse({"data": {**section, **odd, "conditional": bool(rng.integers(2))}}).data
        try:
            dataset = data.load(cfg)
            pixels, used = next(data.batches(dataset, seed=0, batch_size=4))
            check(
                pixels.dtype == torch.uint8 and pixels.shape[0] == 4 and pixels.shape[2] == pixels.shape[3],
                pixels.shape,
            )
            check(used is None or bool((used < dataset.num_classes).all()), "a label that is no class")
            read += 1
        except config.ConfigError as error:
            check("\n" not in str(error) and str(error).isprintable() and "data" in str(error), repr(str(error)))
            refused += 1
        if kind == "folder":
            shutil.rmtree(path)
        else:
            path.unlink()
    left = sorted(path.name for path in folder.iterdir() if path.name not in ("source", "cache"))
    check(not left, f"written outside: {left}")
    logging.getLogger("sources").setLevel(logging.NOTSET)
    return f"{times} ({len(names)} images each): {refused} refused in one line, {read} read without what was broken"


# Hostile files --------------------------------------------------------------------------------------------------------


def hostile(times: int, folder: Path) -> str:
    """Files made to run code, to fill the memory, or to lead out of the folders that were named."""
    import data
    import generate

    rng = random.Random(times)
    tried = 0
    sprung = folder / "sprung"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(sprung),)

    yamls = [
        f"run: !!python/object/apply:os.mkdir ['{sprung}']",
        f"!!python/object/new:os.mkdir ['{sprung}']",
        "train: {steps: !!python/name:os.mkdir }",
        "run: !!python/module:os",
        "run: {name: !!python/object:config.Run {}}",
        "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1,
        12)]),
        "a: &a {b: *a}",
        "[" * 100_000,
        "{? [1]: 2}",
        "x" * 2_000_000,
    ]  # fmt: skip
    for text in yamls:
        (folder / "c.yml").write_text(text)
        one_line(*in_process(main.main, ["--cfg", str(folder / "c.yml")]), "c.yml")
        tried += 1
    for path in ("/dev/zero", "/proc/self/mem", str(folder)):
        one_line(*in_process(main.main, ["--cfg", path]), path)
        tried += 1

    # Files of a run
    run_folder = folder / "run"
    trainer.train(tiny(run_folder, train={"steps": 2}))
    last = run_folder / "checkpoints" / "last.ckpt"
    state = checkpoints.load(last)
    bombs: dict[str, Callable[[Path], object]] = {
        "pickle": lambda path: path.write_bytes(pickle.dumps(Trap())),
        "code in a checkpoint": lambda path: torch.save({**state, "format": 1, "model": Trap()}, path),
        "zip bomb": lambda path: deflated(last, path, {"archive/data/0": bytes(300_000_000)}),
        "overlapping zip": lambda path: overlapping(last, path),
    }
    for make in bombs.values():
        bad = folder / "bad.ckpt"
        bad.unlink(missing_ok=True)
        make(bad)
        code, said = in_process(generate.main, ["--cfg", str(run_folder / "config.yml"), "--ckpt", str(bad)])
        one_line(code, said, r"bad\.ckpt")
        tried += 1
    os.mkfifo(folder / "pipe.ckpt")
    one_line(
        *in_process(generate.main, ["--cfg", str(run_folder / "config.yml"), "--ckpt", str(folder / "pipe.ckpt")]),
        "pipe",
    )

    # Links out of a run folder, to something and to nothing
    outside = folder / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("file", "sub/step-00000001.ckpt", "sub/step-00000002.ckpt"):
        (outside / name).write_bytes(b"not ours")
    for name in (
        "config.yml",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000002.ckpt",
    ):
        for target in ("file" if "." in name else "sub", "nowhere"):
            bad_run = folder / f"linked{tried}"
            shutil.copytree(run_folder, bad_run)
            place = bad_run / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            place.symlink_to(outside / target)
            for resume in ([], ["--resume"]):
                if not resume and (bad_run / "config.yml").exists():
                    continue
                argv = tiny_command(folder, bad_run, train={"steps": 4})[:2]
                one_line(*in_process(main.main, [*argv, *resume]), re.escape(str(place)))
                tried += 1
    generated = folder / "linked" / "generated"
    shutil.copytree(run_folder, generated.parent)
    generated.symlink_to(outside / "sub")
    argv = [
        "--cfg",
        str(generated.parent / "config.yml"),
        "--ckpt",
        str(last),
        "--num",
        "4",
        f"run.dir={generated.parent}",
    ]
    one_line(*in_process(generate.main, argv), "generated")

    # Data sets
    zips = {
        name: {name: b"x", "ok.png": b"x"}
        for name in ("../a.png", "/etc/a.png", "a/../../b.png", "c:/a.png", "..\\a.png")
    }
    for members in zips.values():
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        refused_data(data, "zip", folder / "set.zip", "points outside")
        tried += 1
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**28 + 1))
    refused_data(data, "zip", folder / "set.zip", "unpacks to more than")
    with (
        zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(6):
            file.write(bytes(2**27))
    refused_data(data, "npz", folder / "bomb.npz", "data.memory_gb")
    (folder / "pickle.npz").write_bytes(pickle.dumps(Trap()))
    refused_data(data, "npz", folder / "pickle.npz", "cannot be read")
    for _ in range(times):
        width, height = rng.randrange(10_001, 60_000), rng.randrange(10_000, 60_000)
        (folder / "bombs").mkdir(exist_ok=True)
        head = struct.pack(">IIBBBBB", width, height, 8, rng.choice([0, 2]), 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
        png = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
        (folder / "bombs" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
        refused_data(data, "folder", folder / "bombs", "bomb")
        tried += 1
    check(not sprung.exists(), "code was run")
    check(all(path.read_bytes() == b"not ours" for path in outside.rglob("*") if path.is_file()), "written outside")
    check(len(list(outside.rglob("*"))) == 4, "written outside")
    check(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000, "a bomb was unpacked")
    return (
        f"{tried + 5} files, each refused in one line; no code was run, nothing outside changed, no bomb was unpacked"
    )


def refused_data(data, kind: str, path: Path, words: str) -> None:
    section = config.parse({"data": {"name": kind, "path": str(path), "memory_gb": 0.5}}).data
    try:
        data.load(section)
    except config.ConfigError as error:
        check(words in str(error) and "\n" not in str(error), error)
        return
    raise Lost(f"{path} was read")


def deflated(source: Path, path: Path, changes: dict[str, bytes]) -> None:
    """A checkpoint's zip again, compressed, with other contents."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, changes.pop(name, None) or old.read(name))
        for name, content in changes.items():
            new.writestr(name, content)


def overlapping(source: Path, path: Path) -> None:
    """A zip whose list of contents names one member a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))
        info = archive.infolist()[0]
        for i in range(1000):
            twin = copy.copy(info)
            twin.filename = twin.orig_filename = f"archive/data/{i}"
            archive.filelist.append(twin)


# Numbers --------------------------------------------------------------------------------------------------------------


def numbers(times: int, folder: Path) -> str:
    """Outputs, gradients or losses that stop being finite at some step: the run stops, and says where it began."""
    rng = random.Random(times)
    for i in range(times):
        cfg = tiny(folder / f"run{i}", train={"steps": 60, "log_every": 4, "save_every": 3, "max_bad_steps": 6})
        run = trainer.Trainer(cfg)
        layers = [n for n, m in run.train_step.model.named_modules() if re.search(r"block\d\.conv[01]$", n)]
        layer, first, kind = rng.choice(layers), rng.randrange(5, 20), ("output", "gradient", "loss")[i % 3]
        seen: dict[str, torch.Tensor] = {}

        def spoil(step, layer=layer, first=first, kind=kind, seen=seen):
            module, objective = step.model.get_submodule(layer), step.objective.forward
            if kind == "output":
                module.register_forward_hook(lambda m, a, out: out * math.inf if step.step >= first else None)
            elif kind == "gradient":
                spoilt = lambda g: g * math.nan if step.step >= first else g  # noqa: E731
                module.register_forward_hook(
                    lambda m, a, out: out.register_hook(spoilt) and None if out.requires_grad else None
                )
            else:

                def bad_loss(*args, **kwargs):
                    out = objective(*args, **kwargs)
                    if step.step >= first:
                        out.log["loss_by_sigma/1-10"] = (out.loss.detach().sum() * math.nan, torch.ones(()))
                        out.loss = out.loss + math.inf  # its gradient is finite
                    return out

                step.objective.forward = bad_loss

            class Watched(TrainingStep):
                def __call__(self, *batch):
                    if self.step == first:
                        seen.update({k: v.clone() for k, v in self.model.state_dict().items()})
                    super().__call__(*batch)

            step.__class__ = Watched

        spoil(run.train_step)
        try:
            with contextlib.redirect_stdout(io.StringIO()), run.opened():
                run.loop()
            raise Lost("it trained to the end")
        except config.RunFailed as error:
            said = str(error)
        check("\n" not in said and f"from step {first + 1:,} on. Objective ect" in said, said)
        if kind != "loss":
            check(f"layer {layer} " in said, f"{kind} of {layer}: {said}")
        check(("not finite at sigma" in said) == (kind != "gradient"), said)
        if kind == "loss":
            check("sigma 1-10" in said, said)
        state = checkpoints.load(cfg.run.folder / "checkpoints" / "last.ckpt")
        check(state["step"] == run.train_step.step and same(seen, state["model"]), "the weights were moved")
        check(
            any(first >= int(p.stem.split("-")[1]) for p in checkpoints.numbered(cfg.run.folder / "checkpoints")),
            "rotated",
        )
        again = trainer.Trainer(cfg)
        again.resume()
        with contextlib.redirect_stdout(io.StringIO()), again.opened():
            again.loop()
        step = again.train_step
        check(step.step == 60 and all(p.isfinite().all() for p in step.model.parameters()), "it did not go on")
    return f"{times}: each report names step, objective, noise levels and layer; the weights saved are those before it"


def out_of_memory(times: int, folder: Path) -> str:
    """A GPU that is full (simulated): following the message's advice leads to a run, with the same batch."""
    rng, advised = random.Random(times), 0
    for i in range(times):
        batch, limit = rng.choice([6, 9, 12, 16, 20]), rng.randrange(1, 6)
        real = TrainingStep.prepare

        def full(step, images, *rest, limit=limit, real=real):
            if len(images) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(step, images, *rest)

        TrainingStep.prepare, part = full, None
        try:
            for attempt in range(9):
                cfg = tiny(folder / f"run{i}-{attempt}", train={"batch_size": batch, "microbatch": part, "steps": 1})
                (folder / "c.yml").write_text(config.dump(cfg))
                code, said = in_process(main.main, ["--cfg", str(folder / "c.yml")])
                if code == 0:
                    break
                one_line(code, said, rf"no memory for {part or batch} images a pass; set train\.microbatch=\d+")
                part, advised = int(re.search(r"microbatch=(\d+)", said).group(1)), advised + 1
            check(code == 0 and checkpoints.load(cfg.run.folder / "checkpoints" / "last.ckpt")["step"] == 1, said)
        finally:
            TrainingStep.prepare = real
    return f"{times} sizes of batch and memory, {advised} times advised; each ended in a run of the whole batch"


# Ranks ----------------------------------------------------------------------------------------------------------------


def ranks(times: int, folder: Path) -> str:
    """One of two ranks killed within a step; the other ends, and both go on by --resume."""
    rng, longest, train = random.Random(times), 0.0, {**TRAIN, "precision": "fp64"}

    def pair(cfg: config.Config, *arguments: str, before=None) -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [Run(cfg, *arguments, before=before, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]

    whole_runs = pair(tiny(folder / "unbroken", train=train))
    check([run.wait() for run in whole_runs] == [0, 0], whole_runs[0].said())
    whole = state_of(folder / "unbroken")
    for i in range(times):
        cfg = tiny(folder / f"run{i}", train=train)
        both = pair(cfg, before=lambda: at_step(25, lambda _: time.sleep(1)))
        for run in both:
            run.until(1)
        time.sleep(rng.random() * 0.3)
        victim = i % 2
        os.kill(both[victim].pid, signal.SIGKILL)
        both[victim].wait()
        began = time.monotonic()
        code, said = both[1 - victim].wait(60), both[1 - victim].said()
        longest = max(longest, time.monotonic() - began)
        check(code == 1 and "another rank has ended" in said and "Traceback" not in said, f"{code}: {said}")
        again = pair(cfg, *resuming(cfg.run.folder))
        check([run.wait() for run in again] == [0, 0], again[0].said())
        check(same(state_of(cfg.run.folder), whole), "other weights")

        cfg = tiny(folder / f"term{i}", train=train)
        both = pair(cfg, before=lambda: at_step(25, lambda _: time.sleep(1)))
        for run in both:
            run.until(1)
        os.kill(both[i % 2].pid, signal.SIGTERM)  # one rank alone is told; both stop
        check([run.wait(60) for run in both] == [0, 0] and "continue with" in both[0].said(), both[0].said())
    told = ""
    if times > 1:
        told = "; torchrun --max-restarts 1 restarted a killed pair, which went on to its last step"
        torchrun(folder, train)
    return f"{times} kills and {times} SIGTERMs to one; the other ended after at most {longest:.1f} s{told}"


def torchrun(folder: Path, train: dict) -> None:
    """One rank of a real torchrun is killed; its restart goes on from the last checkpoint."""
    run_folder = folder / "torchrun"
    (folder / "torchrun.yml").write_text(config.dump(tiny(run_folder, train={**train, "steps": 120})))
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*starter, str(HERE.parent / "main.py"), "--cfg", str(folder / "torchrun.yml"), "--resume"]
    with open(folder / "torchrun.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(run_folder / "checkpoints" / "last.ckpt", 120)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code = process.wait(300)
    said = (folder / "torchrun.log").read_text()
    check(code == 0 and "step 0 of 120" in said and re.search(r"step [1-9]\d* of 120", said), said)
    check(state_of(run_folder)["step"] == 120, said)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(times: int, folder: Path) -> str:
    """Resident memory of a run that samples, scores and saves, after a tenth of its steps and at the end."""
    cfg = tiny(
        folder / "run",
        train={"steps": times, "save_every": 10, "log_every": 10},
        sample={"every": 20, "grid": 16},
        metrics={"features": "classifier", "num": 200, "every": 100, "at_end": True, "scores": ["fid", "kid", "prc"]},
        data={"dir": str(folder / "data")},
    )

    def resident(_: TrainingStep) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(folder / "resident", "a") as file:
            file.write(f"{pages * resource.getpagesize() / 2**20:.1f}\n")

    def before() -> None:
        at_step(times // 10, resident)
        at_step(times - 1, resident)

    run = Run(cfg, before=before)
    check(run.wait(3000) == 0 and "failed" not in run.said(), run.said())
    first, final = map(float, (folder / "resident").read_text().split())
    check(abs(final / first - 1) < 0.05, f"{first} MiB grew to {final} MiB")
    grown = f"{final:.0f} MiB at the end ({final / first - 1:+.1%})"
    return f"{times:,} steps: {first:.0f} MiB after step {times // 10}, {grown}"


# The table ------------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[int, Path], str], int, int]] = {  # name -> (what tries it, times, times in CI)
    # 0: only in the long form
    "crash": (crash, 50, 4),
    "signals": (signals, 3, 1),
    "ends": (ends, 3, 1),
    "disk-full": (disk_full, 7, 1),
    "disk-read-only": (disk_read_only, 5, 1),
    "folder-removed": (folder_removed, 5, 1),
    "moved": (moved, 5, 1),
    "other-data": (other_data, 5, 1),
    "damage": (damage, 2000, 60),
    "configs": (fuzz_configs, 1000, 60),
    "commands": (fuzz_commands, 300, 40),
    "data": (fuzz_data, 500, 60),
    "hostile": (hostile, 20, 2),
    "numbers": (numbers, 30, 3),
    "out-of-memory": (out_of_memory, 20, 2),
    "ranks": (ranks, 3, 1),
    "memory": (memory, 2000, 0),
}


def run_all(argv: list[str]) -> int:
    """Print a row for each fault; 1 where something was lost."""
    quick = "--quick" in argv
    names = [name for name in argv if name != "--quick"] or list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        print(f"no fault {unknown[0]}; there are {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    names = [name for name in names if FAULTS[name][2] or not quick]
    bad = 0
    print("| fault | tried | lost | seconds | command |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in names:
        tries, times, few = FAULTS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
            try:
                seen, lost = tries(few if quick else times, Path(folder)), "nothing"
            except Exception as error:
                traceback.print_exc()
                seen, lost, bad = " / ".join(str(error).split("\n")), "SOMETHING", bad + 1
        what = tries.__doc__.strip().splitlines()[0].rstrip(".")
        took = time.monotonic() - began
        print(f"| {what} | {seen} | {lost} | {took:.0f} | `python tests/reliability.py {name}` |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
