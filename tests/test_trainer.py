"""The loop: resuming, ranks and microbatches, bad numbers, and what a run leaves on disk."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import config
from config import ConfigError
from metrics import scores
from objectives import Output
from sources.images import ImageSet
from training import speed, trainer
from training.evaluate import Evaluation
from training.logs import RunLog
from training.step import TrainingStep, learning_rate

ROOT = Path(__file__).parent.parent


def weights(folder):
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    return {f"{part}.{k}": v for part in ("model", "objective") for k, v in state[part].items()} | {
        f"ema{i}.{k}": v for i, ema in enumerate(state["ema"]) for k, v in ema.items()
    }


def evaluation_of(run, folder):
    model = run.train_step.emas[0].module
    return Evaluation(run.cfg, run.dataset, model, folder, RunLog(folder, 0, 6, 16, shown=False), 16)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


OBJECTIVES = [
    {"name": "edm"}, {"name": "ct", "s1": 8}, {"name": "ict", "s1": 40}, {"name": "ect"}, {"name": "flow"},
    {"name": "meanflow", "guidance": 2.0}, {"name": "meanflow", "flow": 2, "derivative": "difference"},
    {"name": "soflow", "velocity_share": 0.3, "guidance": 2.0}, {"name": "imf", "guidance": 8.0},
]  # fmt: skip


@pytest.mark.parametrize(
    "objective, optimizer", [*[(o, "radam") for o in OBJECTIVES], ({"name": "ict", "s1": 40}, "muon")]
)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(objective, optimizer, tmp_path, monkeypatch):
    settings = {"objective": objective, "data": {"conditional": True, "augment": 0.3}}
    settings["train"] = {"optimizer": optimizer}
    trainer.train(tiny(tmp_path / "a", **settings))

    real, calls = TrainingStep.__call__, []

    def killed_at_step_3(self, *batch):
        calls.append(self.step)
        if len(calls) == 4:
            raise RuntimeError("killed")
        real(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", killed_at_step_3)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train(tiny(tmp_path / "b", **settings))
    for name in ("last", "step-00000003"):  # as if it had been killed outright: it saves the last whole step
        (tmp_path / "b" / "checkpoints" / f"{name}.ckpt").unlink()
    torch.manual_seed(999)  # another process would start from other generator states
    trainer.train(tiny(tmp_path / "b", **settings), resume=True)
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]  # it went on from the checkpoint of step 2
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 6]  # the first says what the data are


def test_training_learns_and_leaves_a_whole_run_folder(tmp_path, capsys):
    settings = {"steps": 60, "batch_size": 64, "lr": 3e-3, "log_every": 10, "save_every": 25}
    trainer.train(tiny(tmp_path / "r", train=settings, objective={"name": "edm"}))
    folder = tmp_path / "r"
    first, *entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first["data"]["count"] == 1797 and first["data"]["classes"]["9"] == 180 and first["step"] == 0
    assert [e["step"] for e in entries] == [10, 20, 30, 40, 50, 60] and entries[-1]["loss"] < 0.9 * entries[0]["loss"]
    assert (
        entries[-1]["images"] == 60 * 64 and entries[-1]["images_per_second"] > 0 and entries[-1]["skipped_steps"] == 0
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step-00000050.ckpt",
        "step-00000060.ckpt",
    ]
    assert config.load(folder / "config.yml").train.steps == 60
    assert (folder / "samples" / "step-00000060.png").stat().st_size > 200
    events = EventAccumulator(str(folder), size_guidance={"images": 1}).Reload()
    assert {"loss", "grad_norm", "lr", "images_per_second"} <= set(events.Tags()["scalars"])
    bins = [v for k, v in entries[0].items() if k.startswith("loss_by_sigma/")]
    assert len(bins) == 4 and min(bins) < entries[0]["loss"] < max(bins)
    assert events.Tags()["images"] == ["samples"]
    said = capsys.readouterr().out
    last = folder / "checkpoints" / "last.ckpt"
    command = config.command("generate.py", "--cfg", folder / "config.yml", "--ckpt", last, "--calc_fid")
    assert said.rstrip().endswith(command) and "step 60/60" in said


def test_a_script_gets_its_signals_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer.train(tiny(tmp_path))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_is_never_written_over(tmp_path):
    trainer.train(tiny(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds a run; add --resume .* run\.dir="):
        trainer.train(tiny(tmp_path))
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_resume_refuses_another_config_and_extends_where_the_schedule_allows(tmp_path):
    trainer.train(tiny(tmp_path))
    with pytest.raises(ConfigError, match=r"another config: train\.lr is 0\.001 there and 0\.5 here"):
        trainer.train(tiny(tmp_path, train={"lr": 0.5}), resume=True)
    trainer.train(tiny(tmp_path, train={"steps": 8}), resume=True)
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 8
    trainer.train(tiny(tmp_path / "linear", train={"lr_decay": "linear"}))
    with pytest.raises(ConfigError, match=r"train\.steps is 6 there and 8 here"):
        trainer.train(tiny(tmp_path / "linear", train={"lr_decay": "linear", "steps": 8}), resume=True)


@pytest.mark.parametrize("objective", [{"name": "ect", "double_kimg": 0.05}, {"name": "ict", "s1": 40}])
def test_microbatches_and_ranks_give_the_gradient_of_the_whole_batch(objective, tmp_path, monkeypatch):
    settings = {"objective": objective, "network": {"dropout": 0.0}, "data": {"augment": 0.5}}

    def gradient(rows=slice(0, 16), split=None, **place):
        run = trainer.Trainer(tiny(tmp_path, **settings, train={"precision": "fp64", "microbatch": split}))
        step = run.train_step  # by step 4 the pairs are closer than at step 0
        vars(step).update(step=4, update=lambda lr: None, **place)
        run.train_step(run.dataset.images[rows], None)
        return run.train_step.gradient

    whole = gradient()
    total = torch.zeros_like(whole)
    monkeypatch.setattr("training.step.talk", lambda call, own: own.copy_(total.add_(own)))
    gradient(slice(0, 8), rank=0, world=2, local_batch=8, microbatch=8)
    ranks = gradient(slice(8, 16), rank=1, world=2, local_batch=8, microbatch=8)  # its sum is of both
    assert whole.norm() > 0
    for other in (gradient(split=4), ranks):
        assert (other - whole).norm() / whole.norm() < 1e-10


def test_every_step_draws_anew_and_the_same_in_every_run(tmp_path):
    def drawn(step, rank=0):
        run, seen = trainer.Trainer(tiny(tmp_path)), []
        vars(run.train_step).update(step=step, rank=rank, local_batch=8, microbatch=4)
        run.train_step.objective = lambda model, x, step, draws, **c: (
            seen.append((draws.normal((4,)), c["dropout_keys"]))  # noise, and what the masks follow from
            or Output(model(x, x.new_ones(4), **c).mean((1, 2, 3)))
        )
        run.train_step(run.dataset.images[:8], None)
        return [tuple(part.tolist()) for both in seen for part in both]

    values = drawn(0) + drawn(1) + drawn(1, rank=1)
    assert len(values) == 12 and len(set(values)) == 12
    assert drawn(1) == values[4:8]


def test_a_step_that_is_not_finite_moves_no_weight_and_is_counted(tmp_path):
    run = trainer.Trainer(tiny(tmp_path))
    images = run.dataset.images[:16]
    run.train_step(images, None)
    before = {k: v.clone() for k, v in run.train_step.model.state_dict().items()}
    objective = run.train_step.objective
    run.train_step.objective = lambda *a, **k: Output(objective(*a, **k).loss * math.nan)
    run.train_step(images, None)
    assert int(run.train_step.skipped) == 1 and same(before, run.train_step.model.state_dict())
    run.train_step.objective = objective
    run.train_step(images, None)
    assert int(run.train_step.skipped) == 1 and not same(before, run.train_step.model.state_dict())
    assert all(torch.isfinite(p).all() for p in run.train_step.model.parameters())


def test_the_first_loss_is_the_objectives_on_the_first_batch(tmp_path):
    """Conditions, pixels and order reach the objective as they should."""
    run = trainer.Trainer(tiny(tmp_path, data={"conditional": True}))
    seen = []
    run.train_step.objective = lambda model, x, step, draws, **c: (
        seen.append((x, c)) or Output(model(x, x.new_ones(16), **c).mean((1, 2, 3)))
    )
    images, labels = run.dataset.images[:16], run.dataset.labels[:16]
    run.train_step(images, labels)
    x, conditions = seen[0]
    assert torch.allclose(x, images / 127.5 - 1) and x.min() == -1
    assert torch.equal(conditions["class_labels"].argmax(1), labels) and conditions["class_labels"].sum() == 16


def test_out_of_gpu_memory_names_the_batch_and_the_way_on(tmp_path, monkeypatch):
    def full(self, *batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "__call__", full)
    with pytest.raises(ConfigError, match=r"no memory for 16 images a pass; set train\.microbatch=8"):
        trainer.train(tiny(tmp_path))


def test_learning_rate_rises_and_falls():
    settings = config.Train(steps=100, lr=2.0, lr_warmup=10, lr_decay="linear")
    rates = [learning_rate(k, settings) for k in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([0.2, 2 * 0.5 * 0.96, 2 * 0.91, 1.0, 0.02])
    assert learning_rate(50, config.Train(steps=100, lr=2.0, lr_decay="cosine")) == pytest.approx(1.0)
    assert learning_rate(50, config.Train(steps=100, lr=2.0)) == 2.0


def test_the_learning_rate_reaches_the_optimizer(tmp_path):
    run = trainer.Trainer(tiny(tmp_path, train={"lr_warmup": 5}))
    for step in range(3):
        run.train_step.step = step
        run.train_step(run.dataset.images[:16], None)
        assert float(run.train_step.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * (step + 1) / 5)


def test_samples_in_training_are_from_the_average(tmp_path):
    run = trainer.Trainer(tiny(tmp_path))
    step = run.train_step
    evaluation = evaluation_of(run, tmp_path)
    draw = lambda: evaluation.draw(evaluation.drawing(None, 4))  # noqa: E731
    before = draw()
    for module, changes in ((step.model, False), (step.emas[1].module, False), (step.emas[0].module, True)):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.2 * torch.randn_like(p))
        assert torch.equal(draw(), before) != changes


def test_the_loop_samples_the_first_average(tmp_path, monkeypatch):
    run, models = trainer.Trainer(tiny(tmp_path)), []
    monkeypatch.setattr(trainer, "Evaluation", lambda *what: models.append(what[2]) or Evaluation(*what))
    with run.opened():
        run.loop()
    assert len(models) == 1 and models[0] is run.train_step.emas[0].module


def test_init_from_takes_the_ema(tmp_path):
    trainer.train(tiny(tmp_path / "a"))
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    run = trainer.Trainer(tiny(tmp_path / "b", train={"init_from": str(path)}))
    assert same(run.train_step.model.state_dict(), checkpoints.load(path)["ema"][0])


def test_init_from_a_model_trained_with_augmentation_labels(tmp_path):
    trainer.train(tiny(tmp_path / "a", data={"augment": 0.5}))
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    plain = trainer.Trainer(tiny(tmp_path / "b", train={"init_from": str(path)})).train_step.model.eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 80.0])
    assert torch.allclose(plain(x, sigma), checkpoints.load_model(path)(x, sigma), atol=1e-6)


def test_a_full_disk_costs_no_checkpoint_and_no_training(tmp_path, monkeypatch, capsys):
    real = checkpoints.state.write_atomically

    def full(path, write):
        if path.name == "step-00000004.ckpt":
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(checkpoints.state, "write_atomically", full)
    trainer.train(tiny(tmp_path))
    assert "step 4: no checkpoint could be written" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 6


@pytest.mark.parametrize("error", [ValueError("nothing to sort"), config.ConfigError("a broken image"), MemoryError()])
def test_what_only_shows_the_run_may_fail(error, tmp_path, monkeypatch, capsys):
    def fails(self, step):
        raise error

    monkeypatch.setattr(Evaluation, "write_grid", fails)
    trainer.train(tiny(tmp_path, sample={"every": 2}))
    assert f"warning: step 2: fails failed ({str(error) or 'MemoryError'})" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 6


def test_a_best_checkpoint_that_cannot_be_written_stops_where_the_config_says_so(tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_state", full)
    monkeypatch.setattr(scores, "score", lambda *args, **kwargs: {"fid": 1.0})
    settings = {
        "metrics": {"every": 3, "num": 100, "features": "classifier"},
        "train": {"on_save_error": "stop", "save_every": 9},
    }
    with pytest.raises(config.RunFailed, match="step 3: no checkpoint could be written"):
        trainer.train(tiny(tmp_path, **settings, sample={"every": 0}))


def test_a_signal_is_not_taken_for_a_broken_file(tmp_path):
    """A stop while rank 0 scores must reach `best_effort`, whatever is caught between."""
    run = trainer.Trainer(tiny(tmp_path))
    run.log, went_on = RunLog(tmp_path, 0, 6, 16, shown=False), []

    def work(step):
        try:
            run.on_signal(signal.SIGTERM, None)
        except Exception:
            went_on.append("took it for a broken image")

    run.best_effort(work)
    run.log.close()
    assert run.stopping and not went_on


def test_images_that_do_not_fit_on_the_device_stay_in_memory(tmp_path, monkeypatch, capsys):
    def full(dataset, device):
        raise torch.OutOfMemoryError("no memory")

    trainer.train(tiny(tmp_path / "a"))
    monkeypatch.setattr(ImageSet, "to", full)
    trainer.train(tiny(tmp_path / "b"))
    assert "the images do not fit in cpu's memory" in capsys.readouterr().out
    a, b = (checkpoints.load(tmp_path / r / "checkpoints" / "last.ckpt")["model"] for r in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    cfg = tiny(tmp_path / "r", train={"steps": 100_000, "save_every": 100_000})
    (tmp_path / "c.yml").write_text(config.dump(cfg))
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "main.py", "--cfg", tmp_path / "c.yml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 60
    log = tmp_path / "r" / "metrics.jsonl"
    while not (log.exists() and '"loss"' in log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.rstrip().endswith(config.command("main.py", "--cfg", tmp_path / "r" / "config.yml", "--resume"))
    assert checkpoints.load(tmp_path / "r" / "checkpoints" / "last.ckpt")["step"] >= 2


def test_the_best_checkpoint_by_score_is_kept(tmp_path, monkeypatch):
    """Scores fall, rise and fall below: best.ckpt holds the last step, then a resumed run betters only a worse one."""
    figures = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(scores, "score", lambda *args, **kwargs: {"fid": next(figures)})
    settings = {"every": 2, "num": 100, "features": "classifier", "at_end": False}
    trainer.train(tiny(tmp_path, metrics=settings))
    best = checkpoints.load(tmp_path / "checkpoints" / "best.ckpt")
    assert best["step"] == 4 and best["best"]["scores"] == {"fid": 3.0}
    assert checkpoints.load_model(tmp_path / "checkpoints" / "best.ckpt") is not None

    figures = iter([3.5, 2.5])
    trainer.train(tiny(tmp_path, metrics=settings, train={"steps": 8}), resume=True)
    assert checkpoints.load(tmp_path / "checkpoints" / "best.ckpt")["step"] == 4  # 3.5 is no better
    trainer.train(tiny(tmp_path, metrics=settings, train={"steps": 10}), resume=True)
    assert checkpoints.load(tmp_path / "checkpoints" / "best.ckpt")["step"] == 10

    figures = iter([9.0])  # by another metric figures do not compare
    trainer.train(tiny(tmp_path, metrics={**settings, "num": 200}, train={"steps": 12}), resume=True)
    assert checkpoints.load(tmp_path / "checkpoints" / "best.ckpt")["step"] == 12


@pytest.mark.parametrize(
    ("new", "old", "is_better"),
    [
        ({"fid": 1.0}, {"fid": 2.0}, True),
        ({"isc": 1.0}, {"isc": 2.0}, False),
        ({"w2": 1.0, "w2_of_data": 0.5}, {"w2": 2.0, "w2_of_data": 0.5}, True),
        ({"precision": 0.7, "recall": 0.1}, {"precision": 0.6, "recall": 0.9}, True),
        ({"fid": 1.0}, {"fid": float("nan")}, True),
        ({"fid": float("nan")}, {"fid": 2.0}, False),
    ],
)
def test_better_knows_which_way_a_figure_points(new, old, is_better):
    assert scores.better(new, old) is is_better


def test_sampling_and_scoring_do_not_count_as_training(tmp_path, monkeypatch):
    """Steps of 20 ms with 16 images are at most 800 images/s; a second of sampling among them would make it 30."""
    monkeypatch.setattr(Evaluation, "write_grid", lambda self, step: time.sleep(1.0))
    real = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, *batch: (time.sleep(0.02), real(self, *batch)))
    trainer.train(tiny(tmp_path, sample={"every": 3}, train={"steps": 12, "log_every": 2, "save_every": 100}))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    speeds = [entry["images_per_second"] for entry in entries]
    assert len(speeds) == 6 and min(speeds) > 60 and max(speeds) < 16 / 0.02 * 1.01


def test_a_run_says_its_speed_in_the_fields_terms(tmp_path, monkeypatch, capsys):
    """MFU and memory in metrics.jsonl, TensorBoard and the status line; how often moves no number; where counting
    fails there is no MFU."""
    for name, every in (("a", 2), ("b", 6)):
        trainer.train(tiny(tmp_path / name, train={"log_every": every, "keep": 9}))
    entries = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(entries) == 3 and all(0 < e["mfu"] < 1 and 0.05 < e["peak_memory_gb"] < 100 for e in entries)
    assert {"mfu", "peak_memory_gb"} <= set(EventAccumulator(str(tmp_path / "a")).Reload().Tags()["scalars"])
    assert re.search(r"step 6/6  loss \S+  [\d,]+ images/s, MFU [\d.]+%, \d+\.\d GB  ", capsys.readouterr().out)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))

    def fails(call):
        raise RuntimeError("no formula")

    monkeypatch.setattr(speed, "flops", fails)
    trainer.train(tiny(tmp_path / "c"))
    assert "mfu" not in json.loads((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "MFU" not in capsys.readouterr().out and same(weights(tmp_path / "a"), weights(tmp_path / "c"))
