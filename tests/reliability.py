"""Faults, many times over: crashes, full disks, damaged and hostile files, dead ranks. Rows of docs/reliability.md.

    python tests/reliability.py [--quick] [NAME ...]      (no name: all)

Each fault is a function of the number of times it is tried; it returns what it saw, and raises where anything is lost.
Training runs are forked from this process, which has torch loaded, so that fifty of them are cheap. As root, disks are
filled and made read-only on a small tmpfs; otherwise by RLIMIT_FSIZE and permissions, and the row says so.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from conftest import tiny  # noqa: E402
from PIL import Image  # noqa: E402

import checkpoint  # noqa: E402
import config  # noqa: E402
import main  # noqa: E402
import metrics  # noqa: E402
import trainer  # noqa: E402

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
        given.write_text(config.dump(cfg))
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
            save, loop = checkpoint.save, trainer.Trainer.loop

            def marked_save(*a, **k):
                self.mark[0] = 1
                save(*a, **k)
                self.mark[0] = 0

            def marked_loop(run):
                self.mark[1] = 1
                loop(run)

            checkpoint.save, trainer.Trainer.loop = marked_save, marked_loop
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


def at_step(step: int, action: Callable[[trainer.Trainer], None]) -> None:
    """Call action(run) before step `step` of every run of this process."""
    real = trainer.Trainer.train_step

    def train_step(run, *batch):
        if run.step == step:
            action(run)
        real(run, *batch)

    trainer.Trainer.train_step = train_step


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

    state = checkpoint.load(folder / "checkpoints" / "last.ckpt")
    walk(state, "")
    return {**found, "step": torch.tensor(state["step"])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def inspect(folder: Path) -> int:
    """Read every file of a run; the number of checkpoints. Raises where one cannot be read."""
    paths = sorted((folder / "checkpoints").glob("*.ckpt"))
    for path in paths:
        checkpoint.load(path)
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
            run = Run(cfg, "--resume")
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
                step = checkpoint.load(cfg.run.folder / "checkpoints" / "last.ckpt")["step"]
                check(step >= newest, "a checkpoint was lost")
                newest = step
    litter = [path for i in range(finished) for path in (folder / f"run{i}").rglob(".*.part")]
    check(not litter, litter)
    return (
        f"{kills} kills, {saving} of them while a checkpoint was being written; {checked} checkpoints read after them; "
        f"{finished} runs finished by --resume, final state equal bit for bit"
    )


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
                    metrics.score = lambda *a, **k: time.sleep(60)
                at_step(11, lambda run: time.sleep(0.5))  # so that no run is over before its signal

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

                def filled(run, mounted=mounted):
                    if mounted:
                        fill(folder / "disk")
                    else:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

                def emptied(run, mounted=mounted):
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
    return checkpoint.newest_good(folder / "checkpoints")[1]["step"]


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

            def remove(run, kind=kind, outside=outside):
                shutil.rmtree(run.folder / kind.replace("link", "checkpoints"))
                if kind == "link":
                    (run.folder / "checkpoints").symlink_to(outside)

            run_folder = folder / f"run{i}-{kind}"
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


# The table ------------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[int, Path], str], int, int]] = {  # name -> (what tries it, times, times in CI)
    "crash": (crash, 50, 6),
    "signals": (signals, 10, 1),
    "disk-full": (disk_full, 7, 1),
    "disk-read-only": (disk_read_only, 5, 1),
    "folder-removed": (folder_removed, 5, 1),
}


def run_all(argv: list[str]) -> int:
    """Print a row for each fault; 1 where something was lost."""
    quick = "--quick" in argv
    names = [name for name in argv if name != "--quick"] or list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        print(f"no fault {unknown[0]}; there are {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    bad = 0
    print("| fault | tried | lost | seconds | command |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in names:
        tries, times, few = FAULTS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
            try:
                seen, lost = tries(few if quick else times, Path(folder)), "nothing"
            except Lost as error:
                seen, lost, bad = f"{error}", "SOMETHING", bad + 1
        what = tries.__doc__.strip().splitlines()[0].rstrip(".")
        took = time.monotonic() - began
        print(f"| {what} | {seen} | {lost} | {took:.0f} | `python tests/reliability.py {name}` |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
