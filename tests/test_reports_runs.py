"""Runs that end badly or are moved: reported cases, and others of their kinds."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import checkpoints
import config
import data
import generate
import main
from objectives import Output
from training import trainer
from training.step import TrainingStep

ROOT = Path(__file__).parent.parent
LAZY = {"name": "folder", "memory_gb": 0.0, "resolution": None, "channels": 1}


def pictures(folder, names=("",), each=24, seed=0):
    """Random 8x8 grey images, `each` in every subfolder of `names`."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


def command(cfg, name="c.yml"):
    """--cfg FILE of a config, written beside its run."""
    path = Path(cfg.run.dir).with_name(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.dump(cfg))
    return ["--cfg", str(path)]


def run_main(capfd, *words):
    """(exit code, stdout, stderr) of main.py in this process."""
    capfd.readouterr()
    code = main.main([str(word) for word in words])
    return code, *capfd.readouterr()


def last_step(folder):
    return checkpoints.load(folder / "checkpoints" / "last.ckpt")["step"]


def weights(folder):
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    return [*state["model"].values(), *state["ema"][0].values()]


def ended_well(code, out, err, folder, expected, words):
    """One line on stderr, the last thing said, with how to go on; the last whole step is saved."""
    assert code == expected, err
    assert "Traceback" not in out + err and err.count("\n") == 1, err
    assert re.search(words, err), err
    step = last_step(folder)
    resume = config.command("main.py", "--cfg", folder / "config.yml", "--resume")
    assert err.rstrip().endswith(f"step {step:,} is saved; continue with: {resume}"), err
    return step


def at_step(monkeypatch, step, action):
    """Call action() before step `step` of a run, counted from 0."""
    real = TrainingStep.__call__

    def observed(self, *batch):
        if self.step == step:
            action()
        real(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", observed)


# 1. Whatever ends a run saves first ----------------------------------------------------------------------------------

STEPS = {"steps": 12, "batch_size": 8, "save_every": 100, "log_every": 4}


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


def of_another_size(path):
    Image.new("L", (9, 9)).save(path)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [(truncated, "005.png .* cannot be read"), (of_another_size, "005.png .* 9 x 9"), (removed, "005.png .* No such")],
)
def test_a_bad_image_in_mid_run_costs_no_step(spoil, words, workers, tmp_path, capfd, monkeypatch):
    images = pictures(tmp_path / "images")
    settings = {**LAZY, "path": str(images), "workers": workers}
    whole = tiny(tmp_path / "whole", data=settings, train=STEPS)
    trainer.train(whole)
    folder, victim = tmp_path / "r", images / "005.png"
    kept = victim.read_bytes()
    with monkeypatch.context() as patched:
        # before what is met in an epoch after the first: with processes, some batches are read ahead
        at_step(patched, 1, lambda: spoil(victim))
        said = run_main(capfd, *command(tiny(folder, data=settings, train=STEPS)))
    step = ended_well(*said, folder, 2, words)
    assert 1 < step < 12
    victim.write_bytes(kept)
    code, out, err = run_main(capfd, "--cfg", folder / "config.yml", "--resume")
    assert code == 0 and f"step {step} of 12" in out, err
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole"), weights(folder), strict=True))


def test_a_file_mended_otherwise_than_it_was_is_no_other_data(tmp_path, capfd):
    """The truncated file is there from the start, as in the report: its mended bytes were never seen."""
    images = pictures(tmp_path / "images", each=80)
    truncated(images / "066.png")
    cfg = tiny(tmp_path / "r", data={**LAZY, "path": str(images), "workers": 0}, train=STEPS)
    ended_well(*run_main(capfd, *command(cfg)), tmp_path / "r", 2, "066.png .* cannot be read")
    Image.new("L", (8, 8), 7).save(images / "066.png")
    assert run_main(capfd, "--cfg", tmp_path / "r" / "config.yml", "--resume")[0] == 0
    assert last_step(tmp_path / "r") == 12
    of_another = pictures(tmp_path / "images", each=80, seed=1)  # later, the data are held to be what they then were
    code, _, err = run_main(capfd, "--cfg", tmp_path / "r" / "config.yml", "--resume", f"data.path={of_another}")
    assert code == 2 and "other images: fingerprint" in err


def test_the_broken_image_may_be_skipped_from_then_on(tmp_path, capfd):
    images = pictures(tmp_path / "images", each=80)
    truncated(images / "066.png")
    cfg = tiny(tmp_path / "r", data={**LAZY, "path": str(images), "workers": 0}, train=STEPS)
    ended_well(*run_main(capfd, *command(cfg)), tmp_path / "r", 2, "set data.on_broken: skip")
    assert run_main(capfd, "--cfg", tmp_path / "r" / "config.yml", "--resume", "data.on_broken=skip")[0] == 0


class Odd(Exception):
    """What a method of one's own may raise."""


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (Odd("the method\nhas a bug"), 1, r"^Odd: the method has a bug \(.*test_reports_runs\.py:\d+\); "),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, r"no memory for 8 images a pass; set train\.microbatch=4"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 68 bytes"), 2, r"set train\.microbatch=4"),
        (MemoryError(), 1, "the memory of this machine is full"),
        (OSError(24, "Too many open files", "/dev/shm/x"), 1, "^/dev/shm/x: Too many open files"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), 1, "unable to allocate shared"),
        (KeyboardInterrupt(), 130, "^stopped at once"),
        (config.RunFailed("rank 0: another rank has ended"), 1, "another rank has ended"),
    ],
)
def test_an_error_in_mid_run_costs_no_step(error, expected, words, tmp_path, capfd, monkeypatch):
    def fail():
        raise error

    with monkeypatch.context() as patched:
        at_step(patched, 7, fail)
        said = run_main(capfd, *command(tiny(tmp_path / "r", train=STEPS)))
    assert ended_well(*said, tmp_path / "r", expected, words) == 7
    trainer.train(tiny(tmp_path / "whole", train=STEPS))
    assert run_main(capfd, "--cfg", tmp_path / "r" / "config.yml", "--resume")[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole"), weights(tmp_path / "r"), strict=True))


def test_a_decoding_process_that_dies_costs_no_step(tmp_path, capfd, monkeypatch):
    def kill():
        for child in torch.multiprocessing.active_children():
            child.kill()

    settings = {**LAZY, "path": str(pictures(tmp_path / "images")), "workers": 2}
    with monkeypatch.context() as patched:
        at_step(patched, 3, kill)
        said = run_main(capfd, *command(tiny(tmp_path / "r", data=settings, train={**STEPS, "steps": 60})))
    step = ended_well(*said, tmp_path / "r", 1, "a process that decodes images was killed.* data.workers")
    assert step >= 4


def test_shared_memory_without_room_is_said_by_the_main_process(tmp_path, capfd, monkeypatch):
    """Torch would say so in a thread of the process that decodes, and the run would wait for ever."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    settings = {**LAZY, "path": str(pictures(tmp_path / "images")), "workers": 1}
    cfg = tiny(tmp_path / "r", data=settings, train=STEPS)
    real, asked = torch.Tensor.share_memory_, []
    with monkeypatch.context() as patched:  # the processes are forked from this one; five batches have room
        patched.setattr(
            torch.Tensor, "share_memory_", lambda t: asked.append(t) or (real if len(asked) < 10 else full)(t)
        )
        said = run_main(capfd, *command(cfg))
    ended_well(*said, tmp_path / "r", 1, r"no room for a batch in shared memory .* data\.workers lower")


def test_a_dead_decoding_process_is_noticed_at_the_next_batch_and_not_in_the_middle_of_an_update(tmp_path):
    dataset = data.load(config.Data(**LAZY, path=str(pictures(tmp_path / "images"))))
    batches = data.batches(dataset, 0, 8, workers=2)
    next(batches)
    for child in torch.multiprocessing.active_children():
        child.kill()
    for _ in range(50):
        time.sleep(0.01)  # an update
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        for _ in range(100):
            next(batches)


def test_a_state_that_an_error_left_half_updated_is_not_saved(tmp_path, monkeypatch):
    """An error between the optimizer and the averages: the checkpoint before stays the newest."""
    run = trainer.Trainer(tiny(tmp_path, train={**STEPS, "save_every": 2}))

    def fail(*args):
        raise RuntimeError("in the average")

    with pytest.raises(config.RunFailed, match=r"in the average .*; step 4 is saved; continue with"), run.opened():
        real = run.train_step.emas[0].update
        run.train_step.emas[0].update = lambda *a: fail() if run.train_step.step == 5 else real(*a)
        run.loop()
    assert last_step(tmp_path) == 4


def test_an_error_in_the_first_step_is_told_in_full_and_saves_nothing(tmp_path, monkeypatch):
    def fail():
        raise Odd("a bug")

    at_step(monkeypatch, 0, fail)
    with pytest.raises(Odd, match="a bug"):
        trainer.train(tiny(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_a_closed_terminal_stops_a_run_as_sigterm_does_unless_it_is_ignored(tmp_path):
    run = trainer.Trainer(tiny(tmp_path / "a"))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with run.opened():
            os.kill(os.getpid(), signal.SIGHUP)
            run.loop()
        assert last_step(tmp_path / "a") == 1 and run.stopping
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        run = trainer.Trainer(tiny(tmp_path / "b"))
        with run.opened():
            os.kill(os.getpid(), signal.SIGHUP)
            run.loop()
        assert last_step(tmp_path / "b") == 6 and not run.stopping
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("bad_from", "code"), [(8, 1), (11, 0)])
def test_a_run_whose_last_steps_were_not_finite_is_not_done(bad_from, code, tmp_path, capfd, monkeypatch):
    real = trainer.build_objective

    def spoilt(cfg, *rest):
        objective = real(cfg, *rest)
        forward = objective.forward

        def bad(*args, step=0, **kwargs):
            out = forward(*args, step=step, **kwargs)
            return Output(out.loss * math.nan, out.log) if step >= bad_from else out

        objective.forward = bad
        return objective

    monkeypatch.setattr(trainer, "build_objective", spoilt)
    said = run_main(capfd, *command(tiny(tmp_path / "r", train=STEPS)))
    assert said[0] == code and ("\ndone" in said[1]) == (code == 0), said
    again = run_main(capfd, "--cfg", tmp_path / "r" / "config.yml", "--resume")  # nor is it then
    assert again[0] == code and ("\ndone" in again[1]) == (code == 0), again
    if code:
        for _, _, err in (said, again):
            assert f"not finite in 4 steps in a row (the last ones), from step {bad_from + 1} on" in err


def test_the_report_word_by_word(tmp_path):
    """The broken image with loading processes, as a command of its own: nothing is said after the line."""
    images = pictures(tmp_path / "images", each=80)
    truncated(images / "066.png")
    words = command(tiny(tmp_path / "r", data={**LAZY, "path": str(images), "workers": 2}, train=STEPS))
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ended_well(result.returncode, result.stdout, result.stderr, tmp_path / "r", 2, "066.png .* cannot be read")


# 2. A run is where its config.yml lies -------------------------------------------------------------------------------


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "how", ["moved", "copied", "nested", "from inside", "with spaces", "named on the command line"]
)
def test_a_run_is_where_its_config_lies(how, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tiny("runs/a", train={"lr_decay": "none"})
    if how == "copied":  # a run without run.dir: its place came from its name
        given.run.dir, given.run.name = None, "a"
    Path("c.yml").write_text(config.dump(given))
    assert run_main(capfd, "--cfg", "c.yml")[0] == 0
    there = Path({"nested": "far/away/b", "with spaces": "my runs/b c"}.get(how, "runs/b"))
    there.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if how == "copied" else shutil.move)("runs/a", there)
    before = tree(Path("runs/a")) if how == "copied" else None
    cfg, words = there / "config.yml", []
    if how == "from inside":
        monkeypatch.chdir(there)
        cfg = "config.yml"
    if how == "named in words":
        shutil.move("runs/b", "runs/d")
        cfg, words = "runs/d/config.yml", ["run.dir=runs/d"]
        there = Path("runs/d")
    code, out, err = run_main(capfd, "--cfg", cfg, "--resume", "train.steps=8", *words)
    monkeypatch.chdir(tmp_path)
    assert code == 0 and "step 6 of 8" in out and not err, err
    assert last_step(there) == 8 and config.load(there / "config.yml").run.folder == there
    assert tree(Path("runs/a")) == before if how == "copied" else not Path("runs/a").exists()
    printed = shlex.split(out.strip().splitlines()[-1])
    if how != "from inside":  # what is printed is pasted where it was printed
        assert printed[printed.index("--cfg") + 1] == str(there / "config.yml")
    ckpt = there / "checkpoints" / "last.ckpt"
    assert generate.main(["--cfg", str(there / "config.yml"), "--ckpt", str(ckpt), "--num", "4"]) == 0
    assert (there / "generated" / "000").exists()
    assert tree(Path("runs/a")) == before if how == "copied" else not Path("runs/a").exists()


def test_a_place_on_the_command_line_wins_and_other_configs_are_no_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    trainer.train(tiny("runs/a"))
    own = Path("runs/a/config.yml")
    assert config.load(own).run.folder == Path("runs/a")
    assert config.load(own, ["run.dir=elsewhere"]).run.folder == Path("elsewhere")
    shutil.copy(own, "copy.yml")  # a copy of the config alone is a recipe
    assert config.load("copy.yml").run.folder == Path("runs/a")
    Path("plain/checkpoints").mkdir(parents=True)  # as in this repository: a package of that name
    Path("plain/config.yml").write_text("run: {name: mine}\n")
    assert config.load("plain/config.yml").run.folder == Path("runs/mine")
    recipe = tiny("runs/a")
    recipe.run.dir, recipe.run.name = None, "a"
    own.write_text(config.dump(recipe))
    assert config.load(own).run.folder == Path("runs/a")
    assert config.load(own, ["run.name=b"]).run.folder == Path("runs/b")  # the same recipe as a new run


@pytest.mark.parametrize("begun", [False, True])
def test_resuming_an_empty_place_is_refused_unless_torchrun_restarts(begun, tmp_path, capfd, monkeypatch):
    words = command(tiny(tmp_path / "r"))
    if begun:  # killed before its first save
        (tmp_path / "r").mkdir()
        shutil.copy(tmp_path / "c.yml", tmp_path / "r" / "config.yml")
    before = tree(tmp_path)
    code, out, err = run_main(capfd, *words, "--resume")
    assert code == 2 and err.count("\n") == 1 and "no checkpoint is saved there" in err and not out
    assert tree(tmp_path) == before and (tmp_path / "r").exists() == begun
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert run_main(capfd, *words, "--resume")[0] == 2
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # its first start: the same command must serve every next
    assert run_main(capfd, *words, "--resume")[0] == 0 and last_step(tmp_path / "r") == 6
