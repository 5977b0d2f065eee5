"""The quick half of tests/reliability.py: every fault a few times. The long half is `python tests/reliability.py`."""

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import reliability
import torch
from conftest import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import config
from checkpoints import disk
from objectives import Output
from objectives.common import by_level
from training import trainer
from training.logs import RunLog

SCRIPT = Path(__file__).with_name("reliability.py")


@pytest.fixture(scope="module")
def rows():
    """What the script prints for each fault; one process for all, since most of a short one is importing torch."""
    result = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=900)
    found = {line.split("reliability.py ")[-1].rstrip("` |"): line for line in result.stdout.splitlines()}
    return found, result.stdout + result.stderr


@pytest.mark.parametrize("fault", [name for name, (_, _, few) in reliability.FAULTS.items() if few])
def test_nothing_is_lost_and_nothing_let_in(fault, rows):
    found, said = rows
    assert "| nothing |" in found.get(fault, ""), found.get(fault, said)


def test_an_fp16_scaler_goes_on_where_it_was(tmp_path):
    cfg = tiny(tmp_path, train={"precision": "fp16"})
    run = trainer.Trainer(cfg)
    step, images = run.train_step, run.dataset.images[:16]
    step(images, None)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    objective = step.objective
    scale = step.scaler.get_scale()
    step.objective = lambda *a, **k: Output(objective(*a, **k).loss * math.inf)
    step(images, None)
    assert step.scaler.get_scale() == scale / 2 < 65536
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    step.objective = objective
    skipped = int(step.skipped)
    with run.opened():
        run.save()
    resumed = trainer.Trainer(cfg)
    resumed.resume()
    again = resumed.train_step
    assert again.step == step.step == 2
    assert again.scaler.get_scale() == scale / 2 and int(again.skipped) == skipped >= 1
    for each in (step, again):
        each(images, None)
    assert torch.equal(step.flat.vector, again.flat.vector)
    assert step.scaler.state_dict() == again.scaler.state_dict()


def test_a_checkpoint_of_a_device_without_a_scaler_resumes_on_one_with(tmp_path):
    trainer.Trainer(tiny(tmp_path, train={"precision": "fp32"}))
    run = trainer.Trainer(tiny(tmp_path, train={"precision": "auto"}))
    run.train_step.step = 2
    state = {**run.state(), "scaler": {}}
    checkpoints.save(state, tmp_path / "checkpoints", 2, 2)
    run.train_step.scaler = torch.amp.GradScaler("cpu")
    run.resume()
    assert run.train_step.step == 2 and run.train_step.scaler.get_scale() == 65536


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    run = trainer.Trainer(tiny(tmp_path))
    with run.opened():
        run.train_step.step = 2
        run.save()
        with torch.no_grad():
            next(run.train_step.model.parameters()).view(-1)[0] = math.nan
        run.train_step.step = 4
        run.save()
    assert "the weights are not finite" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 2


def test_checkpoints_from_before_a_bad_streak_are_kept(tmp_path):
    run = trainer.Trainer(tiny(tmp_path, train={"keep": 1}))
    with run.opened():
        for run.train_step.step, streak in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
            run.train_step.streak.fill_(streak)
            run.save()
    assert [path.name for path in checkpoints.numbered(tmp_path / "checkpoints")] == [
        f"step-{i:08d}.ckpt" for i in (2, 3, 4, 5)
    ]


def test_a_bad_loss_is_in_the_bin_of_its_noise_level_alone():
    bins = by_level(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0.05, 0.5, 20.0]))
    assert {name.split("/")[1]: math.isfinite(total) for name, (total, _) in bins.items()} == {
        "0-0.1": True, "0.1-1": False, "1-10": True, "10-inf": True,
    }  # fmt: skip


def test_a_crash_between_the_two_names_of_a_checkpoint_costs_no_step(tmp_path):
    run = trainer.Trainer(tiny(tmp_path))
    for run.train_step.step in (2, 4):
        checkpoints.save(run.state(), tmp_path / "checkpoints", run.train_step.step, 2)
    last, older = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "step-00000002.ckpt"
    last.unlink()
    last.hardlink_to(older)
    path, state, problems = checkpoints.newest_good(last.parent)
    assert (path.name, state["step"], problems) == ("step-00000004.ckpt", 4, [])


def test_a_run_killed_in_its_first_save_is_started_anew_by_torchrun(tmp_path, capsys, monkeypatch):
    with pytest.raises(config.ConfigError, match="no checkpoint is saved there"):
        trainer.train(tiny(tmp_path), resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000002.ckpt.1.part").write_bytes(b"half")
    trainer.train(tiny(tmp_path), resume=True)
    assert "starting at step 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))


def test_curves_survive_a_lost_folder_and_have_no_thread(tmp_path, capsys):
    threads = threading.active_count()
    log = RunLog(tmp_path / "r", 0, 10, 4)
    log.curves(1, {"loss": 2.0})
    assert threading.active_count() == threads
    (tmp_path / "r").rename(tmp_path / "gone")
    log.curves(2, {"loss": 1.0})
    (tmp_path / "r").rename(tmp_path / "gone2")
    (tmp_path / "r").write_text("a file in its place")
    log.curves(3, {"loss": 1.0})
    log.curves(4, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    for name, steps in (("gone", [1]), ("gone2", [2])):
        assert [e.step for e in EventAccumulator(str(tmp_path / name)).Reload().Scalars("loss")] == steps


def test_resuming_hides_the_curves_after_the_checkpoint(tmp_path):
    for step, last in ((0, 6), (4, 8)):
        log = RunLog(tmp_path, step, 10, 4)
        for at in range(step + 1, last + 1):
            log.curves(at, {"loss": float(step)})
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(i, 0.0 if i <= 4 else 4.0) for i in range(1, 9)]


def test_appending_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    disk.append(path, b"one\n")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        disk.append(tmp_path / "link", b"two\n")
    assert path.read_bytes() == b"one\n"


def test_a_message_stays_on_one_line_whatever_a_name_holds(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        config.load(tmp_path / "a\nb\x1b[31m.yml")
    assert str(error.value).isprintable() and r"a\nb\x1b" in str(error.value)
    with pytest.raises(config.ConfigError, match="over 240 bytes"):
        config.parse({"run": {"dir": "x" * 300}})
    with pytest.raises(config.ConfigError, match=r"run\.dir: .*no NUL"):
        config.parse({"run": {"dir": "a\0b"}})
