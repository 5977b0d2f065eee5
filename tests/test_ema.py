"""Averaged weights: exponential ones, those of a power function against golden/edm2_phema, and what is made of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import golden, relative_error, tiny

import checkpoints
import config
import ema
from config import ConfigError
from ema import EMA, decay_from_half_life, power_decay, power_exponent, rebuild_weights, warmed_up
from training import trainer
from training.step import TrainingStep, learning_rate

ROOT = Path(__file__).parent.parent


def one(value):
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.register_buffer("count", torch.tensor(value))
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_update_keeps_decay_of_the_old_and_takes_the_rest_of_the_new():
    model = one(1.0)
    average = EMA(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 2.0)
    model.count.fill_(5.0)
    average.update(model, step=1)
    assert average.module.weight.item() == pytest.approx(1.1)  # 1.9 with the arguments swapped
    assert average.module.count.item() == 5.0
    average.update(model, step=2)
    assert average.module.weight.item() == pytest.approx(1.19)
    assert not average.module.weight.requires_grad and not average.module.training and model.weight.requires_grad


def test_half_life_is_in_images():
    decay = decay_from_half_life(half_life=500_000, batch_size=512)
    assert decay ** (500_000 / 512) == pytest.approx(0.5)


def test_warm_up_holds_the_half_life_to_a_share_of_the_steps():
    assert warmed_up(0.9999, 1000, 0.05) ** 50 == pytest.approx(0.5)
    assert warmed_up(0.9, 10**6, 0.05) == pytest.approx(0.9)
    assert warmed_up(0.9, 1, 0.0) == 0.9 and warmed_up(0.0, 1, 0.05) == 0.0


# Power-function averages ----------------------------------------------------------------------------------------------


def test_exponent_and_decay_are_edm2s():
    g = golden("edm2_phema")
    for std, gamma, betas in zip(g["sigma_rel"].tolist(), g["gamma"].tolist(), g["beta"].tolist(), strict=True):
        assert power_exponent(std) == pytest.approx(gamma, rel=1e-9)
        for nimg, beta in zip(g["beta_nimg"].tolist(), betas, strict=True):
            assert power_decay(std, nimg, int(g["beta_batch"])) == pytest.approx(beta, rel=1e-9, abs=1e-15)
    for std in (0.0, -0.1, 0.29, float("nan")):
        with pytest.raises(ValueError, match=r"must lie between 0 and 0\.288"):
            power_exponent(std)


def test_an_average_over_a_run_is_edm2s():
    g = golden("edm2_phema")
    for std, averages in zip(g["run_std"].tolist(), g["run_ema"], strict=True):
        model = torch.nn.Linear(5, 1, bias=False, dtype=torch.float64)
        kept = EMA(model, std=std)
        for step, (weights, average) in enumerate(zip(g["run_weights"], averages, strict=True), start=1):
            model.weight.data.copy_(weights[None])
            kept.update(model, step)
            assert torch.allclose(kept.module.weight[0], average, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["coef0", "coef1"])
def test_coefficients_of_snapshots_are_edm2s(case):
    g = golden("edm2_phema")
    for j, std in enumerate(g[f"{case}_out_std"].tolist()):
        snapshots = g[f"{case}_in_nimg"].tolist(), g[f"{case}_in_std"].tolist()
        weights, distance = rebuild_weights(*snapshots, g[f"{case}_out_nimg"].item(), std)
        assert torch.allclose(weights, g[case][:, j], rtol=1e-9, atol=1e-9)
        assert weights.sum().item() == pytest.approx(1)
        assert distance < 1e-6 if std == 0.1 else 1e-3 < distance < 0.5  # 0.1 is one of the snapshots


def test_a_run_is_rebuilt_as_edm2_does():
    g = golden("edm2_phema")
    for std, rebuilt, direct in zip(g["run_target_std"].tolist(), g["run_rebuilt"], g["run_direct"], strict=True):
        last = g["run_snapshot_nimg"].max().item()
        weights, distance = rebuild_weights(g["run_snapshot_nimg"].tolist(), g["run_snapshot_std"].tolist(), last, std)
        assert torch.allclose(weights @ g["run_snapshots"], rebuilt, rtol=1e-9, atol=1e-9)
        assert relative_error(rebuilt, direct) < 0.1 and distance < 0.1
    with pytest.raises(ValueError, match="two of the snapshots are the same"):
        rebuild_weights([100, 100], [0.05, 0.05], 100, 0.1)


def test_distance_is_that_of_the_weights_over_the_past():
    """Densely sampled: |sum_i w_i p_i - p| / |p|, p(t) = (g + 1) t^g / T^(g + 1) up to T."""
    nimg, std, grid = [0.5, 0.5, 1.0, 1.0], [0.05, 0.1, 0.05, 0.1], (torch.arange(200_000).double() + 0.5) / 200_000
    profile = lambda end, s: (  # noqa: E731
        (power_exponent(s) + 1) * grid ** power_exponent(s) / end ** (power_exponent(s) + 1) * (grid <= end)
    )
    weights, distance = rebuild_weights(nimg, std, 1.0, 0.15)
    made = sum(w * profile(end, s) for w, end, s in zip(weights, nimg, std, strict=True))
    assert distance == pytest.approx(relative_error(made, profile(1.0, 0.15)), rel=1e-3)


def test_either_a_decay_or_a_width():
    for how in ({}, {"decay": 0.9, "std": 0.1}):
        with pytest.raises(ValueError, match="give either decay or std"):
            EMA(one(1.0), **how)


# Snapshots and the command --------------------------------------------------------------------------------------------

STDS = {"decay": [0.9], "std": [0.05, 0.1], "snapshot_every": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 steps with an average of decay 0.9, two of widths and, to compare with, a third."""
    folder = tmp_path_factory.mktemp("averages")
    trainer.train(tiny(folder / "a", ema=STDS, train={"steps": 20, "lr": 0.01}))
    trainer.train(tiny(folder / "b", ema={**STDS, "std": [0.13]}, train={"steps": 20, "lr": 0.01}))
    return folder


def weights_of(path, average=0):
    return torch.cat([value.flatten() for value in checkpoints.load(path)["ema"][average].values()])


def test_averages_are_kept_and_snapshots_are_checkpoints(run):
    state = checkpoints.load(run / "a" / "checkpoints" / "last.ckpt")
    assert len(state["ema"]) == 3
    names = sorted(path.name for path in (run / "a" / "snapshots").iterdir())
    assert names == [f"step-{k:08d}.ckpt" for k in (3, 6, 9, 12, 15, 18, 20)]
    last = run / "a" / "snapshots" / names[-1]
    for i in (0, 1):
        assert weights_of(last, i).equal(weights_of(run / "a" / "checkpoints" / "last.ckpt", i + 1))
    model = checkpoints.load_model(last)
    assert model(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)
    assert not (run / "a" / "snapshots" / names[0]).samefile(last)


def test_command_rebuilds_an_average_that_was_not_kept(run, capsys):
    out = run / "a" / "checkpoints" / "std-0.13.ckpt"
    assert ema.main(["rebuild", str(run / "a"), "--std", "0.13"]) == 0
    said = capsys.readouterr().out
    assert "made of 14 averages" in said and str(out) in said and "generate.py" in said
    direct = weights_of(run / "b" / "checkpoints" / "last.ckpt", 1)
    nearest = relative_error(weights_of(run / "a" / "snapshots" / "step-00000020.ckpt", 1), direct)
    assert relative_error(weights_of(out), direct) < nearest / 3
    assert checkpoints.load(out)["step"] == 20 and checkpoints.load_model(out)
    assert ema.main(["rebuild", str(run / "a"), "--std", "0.13"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_kept_average_is_rebuilt_as_it_was_at_any_snapshot(run, tmp_path, capsys):
    for step in (20, 12):
        out = tmp_path / f"{step}.ckpt"
        assert ema.main(["rebuild", str(run / "a"), "--std", "0.1", "--step", str(step), "--out", str(out)]) == 0
        assert "0.0% from" in capsys.readouterr().out
        kept = weights_of(run / "a" / "snapshots" / f"step-{step:08d}.ckpt", 1)
        assert relative_error(weights_of(out), kept) < 1e-6


def test_command_says_in_one_line_what_is_wrong(run, tmp_path, capsys):
    for words, said in (
        (["rebuild", str(tmp_path), "--std", "0.1"], "has no snapshots; a run keeps them with ema.std"),
        (["rebuild", str(run / "a"), "--std", "0.4"], "--std: std is 0.4; it must lie between 0 and 0.288"),
        (["rebuild", str(run / "a"), "--std", "0.2", "--step", "7"], "--step: 7 has no snapshot"),
    ):
        assert ema.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    broken = tmp_path / "run" / "snapshots" / "step-00000003.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes((run / "a" / "snapshots" / "step-00000003.ckpt").read_bytes()[:3000])
    assert ema.main(["rebuild", str(tmp_path / "run"), "--std", "0.1"]) == 2
    assert "step-00000003.ckpt" in capsys.readouterr().err


def test_python_ema_py_is_the_command_and_importing_it_loads_torch_alone(run, tmp_path):
    out = tmp_path / "x.ckpt"
    words = [sys.executable, str(ROOT / "ema.py"), "rebuild", str(run / "a"), "--std", "0.07", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and out.exists(), done.stderr
    code = "import sys, ema; print({'checkpoints', 'config', 'yaml'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_a_resumed_run_has_the_snapshots_of_the_unbroken_one(run, tmp_path, monkeypatch):
    settings = {"ema": STDS, "train": {"steps": 20, "lr": 0.01, "save_every": 5}}
    real = TrainingStep.__call__

    def killed_at_step_12(self, *batch):
        if self.step == 12:
            raise RuntimeError("killed")
        real(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", killed_at_step_12)
        with pytest.raises(RuntimeError, match="killed"):
            trainer.train(tiny(tmp_path, **settings))
    for path in (*(tmp_path / "checkpoints").glob("step-00000012.ckpt"), tmp_path / "checkpoints" / "last.ckpt"):
        path.unlink()  # as if the machine had been lost
    trainer.train(tiny(tmp_path, **settings), resume=True)
    for path in (run / "a" / "snapshots").iterdir():
        for i in (0, 1):
            assert weights_of(tmp_path / "snapshots" / path.name, i).equal(weights_of(path, i)), path.name


def test_settings_of_averages_go_together():
    with pytest.raises(ConfigError, match=r"ema\.decay: there is no average to sample"):
        config.parse({"ema": {"decay": None}})
    assert config.parse({"ema": {"decay": None, "std": [0.05]}}).ema.std == [0.05]
    with pytest.raises(ConfigError, match=r"ema\.std"):
        config.parse({"ema": {"std": [0.3]}})


# EDM2's learning rate -------------------------------------------------------------------------------------------------


def test_learning_rate_is_edm2s():
    g = golden("edm2_phema")
    for (batch, lr, batches, ramp), expected in zip(g["lr_settings"].tolist(), g["lr"].tolist(), strict=True):
        steps = 10**7
        cfg = config.parse(
            {
                "train": {
                    "lr": lr, "lr_decay": "inverse_sqrt", "lr_decay_batches": batches or 1e12, "batch_size": int(batch),
                    "steps": steps, "lr_warmup": ramp * 1e6 / batch / steps if ramp else 0,
                }
            }
        ).train  # fmt: skip
        got = [learning_rate(nimg / batch, cfg) for nimg in g["lr_nimg"].tolist()]
        assert got == pytest.approx(expected, rel=1e-9)
    assert learning_rate(0, cfg) == 0  # a first step that rises has rate 0


def test_inverse_sqrt_says_from_when_it_falls():
    for given in ({"lr_decay": "inverse_sqrt"}, {"lr_decay_batches": 100}):
        with pytest.raises(ConfigError, match=r"train\.lr_decay_batches: belongs to train\.lr_decay: inverse_sqrt"):
            config.parse({"train": given})


def test_a_run_of_inverse_sqrt_can_be_made_longer(tmp_path):
    train = {"lr_decay": "inverse_sqrt", "lr_decay_batches": 3, "steps": 4}
    trainer.train(tiny(tmp_path, train=train))
    trainer.train(tiny(tmp_path, train={**train, "steps": 6}), resume=True)
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["step"] == 6
