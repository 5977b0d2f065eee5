"""Paths, printed commands and values as people write them: taken as meant, or refused with the right word."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

import checkpoints
import config
import convert
import edit
import generate
import main
from training import trainer

ROOT = Path(__file__).parent.parent
# Every setting that is a path, with what it goes with.
PATHS = {
    "run.dir": [],
    "data.dir": [],
    "data.path": ["data.name=folder"],
    "data.autoencoder": ["data.name=latents", "data.path=a.safetensors"],
    "train.init_from": [],
    "metrics.weights": [],
    "metrics.reference": ["metrics.features=inception"],
    "objective.teacher": ["objective.name=cd"],
    "objective.lpips_weights": ["objective.name=ct", "objective.metric=lpips"],
    "objective.held_out": ["objective.name=autoencoder", "network.name=autoencoder", "data.name=folder", "data.path=a"],
}
WORDS = ("run.name", "run.device", "data.image_column", "data.label_column", "train.wandb")  # texts that are none


def load(tmp_path, *overrides, text="{}"):
    (tmp_path / "c.yml").write_text(text)
    return config.load(tmp_path / "c.yml", list(overrides))


def value(cfg, key):
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


# Paths ----------------------------------------------------------------------------------------------------------------


def test_every_path_is_known_here():
    names = {
        f"{section}.{key}"
        for section in config.Config.model_fields
        for kind in config.kinds(section).values()
        for key in kind.model_fields
        if config.is_text_setting(section, key) and f"{section}.{key}" not in WORDS
    }
    assert names == PATHS.keys()


@pytest.mark.parametrize("key", PATHS)
def test_home_is_expanded_in_every_path(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    there = str(tmp_path / "home" / "a b")
    assert value(load(tmp_path, *PATHS[key], f"{key}=~/a b"), key) == there
    section, name = key.split(".")
    name_too = [o for o in PATHS[key] if not o.startswith(f"{section}.name")]
    kind = [f"name: {o.split('=')[1]}, " for o in PATHS[key] if o.startswith(f"{section}.name")]
    text = f"{section}: {{{''.join(kind)}{name}: ~/a b}}"
    assert value(load(tmp_path, *name_too, text=text), key) == there


def test_home_is_expanded_in_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for run, argv in (
        (main.main, ["--cfg=~/no.yml"]),
        (generate.main, ["--cfg=~/no.yml", "--ckpt=~/no.ckpt"]),
        (edit.main, ["denoise", "--cfg=~/no.yml", "--ckpt=~/no.ckpt", "--input", "~/no.png", "--out=~/o"]),
        (convert.main, ["import", "~/no.pkl", "~/no.ckpt"]),
        (convert.main, ["export", "~/no.ckpt", "~/no", "--to=onnx"]),
    ):
        assert run(argv) == 2
        assert capsys.readouterr().err.startswith(f"{tmp_path}/no.")
    options = ["--out=~/o", "--samples=~/s", "--conditions=~/c.npy"]
    args = generate.arguments().parse_args(["--cfg=~/c.yml", *options])
    assert [args.cfg, args.out, args.samples, args.conditions] == [
        f"{tmp_path}/{n}" for n in ("c.yml", "o", "s", "c.npy")
    ]
    with pytest.raises(checkpoints.CheckpointError, match=f"^{tmp_path}/no.ckpt: there is no such checkpoint"):
        checkpoints.load("~/no.ckpt")
    assert not (tmp_path / "~").exists()


def test_a_home_of_nobody_is_refused(tmp_path):
    with pytest.raises(config.ConfigError, match=r"run\.dir: ~nobody-here is no user's home here; write \./~nobody"):
        load(tmp_path, "run.dir=~nobody-here/x")
    assert load(tmp_path, "run.dir=./~nobody-here/x").run.dir == "./~nobody-here/x"


@pytest.mark.parametrize(
    "text",
    [
        "/a/b #c",
        "a: b",
        "[x]",
        "{x}",
        "1e5",
        "0100",
        "2024-01-01",
        "yes",
        "&x",
        "*x",
        "!x",
        "a, b",
        "'a' b",
        "a\\b",
        "%",
        "-",
    ],
)
def test_a_path_on_the_command_line_is_taken_whole(text, tmp_path):
    cfg = load(tmp_path, "data.name=folder", f"data.path={text}", f"run.dir={text}")
    assert cfg.data.path == cfg.run.dir == text
    (tmp_path / "again.yml").write_text(config.dump(cfg))
    assert config.load(tmp_path / "again.yml") == cfg


@pytest.mark.parametrize("text", ["", "null", "~", "None"])
def test_no_path_is_still_none(text, tmp_path):
    assert load(tmp_path, f"run.dir={text}", text="run: {dir: x}").run.dir is None
    assert load(tmp_path, 'run.dir="null"', text="run: {dir: x}").run.dir == "null"


@pytest.mark.parametrize("name", ["2024-01-01", "1e5", "0100", "yes", "1_0", "12"])
def test_a_name_is_text_on_the_command_line_and_in_a_file(name, tmp_path):
    assert load(tmp_path, f"run.name={name}").run.name == name
    cfg = load(tmp_path, text=f"run:\n  name: {name}\n  dir: {name} # a comment")
    assert (cfg.run.name, cfg.run.dir) == (name, name)


# Printed commands -----------------------------------------------------------------------------------------------------


def test_a_printed_command_runs_from_where_it_is_printed(tmp_path, monkeypatch):
    name = 'it\'s a "run" #1 $HOME'
    for folder, script in (
        (ROOT, "convert.py"),
        (ROOT.parent, f"{ROOT.name}/convert.py"),
        (tmp_path, f"{ROOT}/convert.py"),
    ):
        monkeypatch.chdir(folder)
        line = config.command("convert.py", "export", name, "x", "--to", "onnx")
        assert shlex.split(line)[1:] == [script, "export", name, "x", "--to", "onnx"]
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == f"{name}: there is no such checkpoint\n"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # another python, or none, stands there
    assert shlex.split(config.command("main.py"))[0] == sys.executable


def test_a_runs_next_commands_work_when_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("my run's #1")
    trainer.train(tiny(folder, train={"steps": 2}))
    resume = config.command("main.py", "--cfg", folder / "config.yml", "--resume")
    line = capsys.readouterr().out.splitlines()[-1].strip()
    assert line.endswith("--calc_fid") and shlex.split(line)[3:6] == [
        f"{folder}/config.yml",
        "--ckpt",
        f"{folder}/checkpoints/last.ckpt",
    ]
    for pasted in (line, resume):
        done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with pytest.raises(config.ConfigError) as error:
        trainer.train(tiny(folder))
    again = str(error.value).split("another folder: ")[1]
    assert shlex.split(again) == [f"run.dir={folder}-2"]
    assert sorted(os.listdir()) == ["data", str(folder)]  # data: what scoring keeps


@pytest.mark.parametrize("labelled", [True, False])
def test_a_score_by_a_classifier_is_advised_where_there_are_labels(labelled, tmp_path, capsys):
    """Whether or not the model is told them."""
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, **({"labels": np.arange(32) % 2} if labelled else {}))
    trainer.train(tiny(tmp_path / "r", data={"name": "npz", "path": str(tmp_path / "x.npz")}, train={"steps": 1}))
    said, command = capsys.readouterr().out.splitlines()[-2:]
    assert said.split("; ")[-1] == ("sample and score with" if labelled else "sample with")
    argv = [*shlex.split(command)[2:], "--num", "20", "--out", str(tmp_path / "s")]
    assert ("--calc_fid" in argv) == labelled and generate.main(argv) == 0


def test_the_old_name_of_convert_says_the_new_command(tmp_path):
    argv = [sys.executable, ROOT / "checkpoint.py", "export", "a b", "x", "--to", "onnx"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    line = done.stderr.splitlines()[0].split("is now called convert.py: ")[1]
    assert shlex.split(line)[1:] == [f"{ROOT}/convert.py", "export", "a b", "x", "--to", "onnx"]


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimizer=AdamW", "adamw"),
        ("train.optimizer=RADAM", "radam"),
        ("data.name=CIFAR10", "cifar10"),
        ("network.name=Song_UNet", "song_unet"),
        ("objective.name=iCT", "ict"),
        ("train.compile=Auto", "auto"),
        ("train.lr_decay=None", "none"),
        ("metrics.scores=[FID, Kid]", ["fid", "kid"]),
        ("run.device=CPU", "cpu"),
        ("train.steps=1e5", 100_000),
        ("train.steps=2.5E+3", 2500),
        ("train.steps=0100", 100),
        ("train.steps=08", 8),
        ("train.steps=1_000", 1000),
        ("train.steps=0x10", 16),
        ("train.save_every=1e3", 1000),
        ("train.save_every=0.25", 0.25),
        ("train.microbatch=6.4e1", 64),
        ("network.channel_mult=[1.0, 2]", [1, 2]),
        ("data.channels=3.0", 3),
        ("train.lr=.5e-3", 0.0005),
        ("train.grad_clip=None", None),
        ("train.grad_clip=none", None),
        ("data.resolution=~", None),
        ("data.conditional=Yes", True),
        ("data.conditional=True", True),
        ("data.conditional=on", True),
        ("data.conditional=No", False),
        ("data.conditional=off", False),
    ],
)
def test_values_are_read_as_meant(override, expected, tmp_path):
    key, text = override.split("=")
    (section, name), got = key.split("."), value(load(tmp_path, override), key)
    assert got == expected and type(got) is type(expected)
    got = value(load(tmp_path, text=f"{section}: {{{name}: {text}}}"), key)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=1.5", "input should be a valid integer, found 1.5"),
        ("train.steps=1e30", "input should be a valid integer, found 1e+30"),
        ("train.steps=1:30", "input should be a valid integer, found '1:30'"),
        ("train.steps=0o17", "input should be a valid integer, found '0o17'"),
        ("train.steps=Yes", "input should be a valid integer, found True"),
        ("train.keep=None", "input should be a valid integer, found 'None'"),
        ("train.save_every=1.0", "input should be an integer from 1 (steps) or a number between 0 and 1"),
        ("data.conditional=y", "input should be a valid boolean, true or false, found 'y'"),
        ("data.flip=None", "input should be a valid boolean, true or false, found 'None'"),
        ("train.lr=None", "input should be a valid number, found 'None'"),
        ("train.optimizer=AdamWW", "'AdamWW' is not one of 'radam', 'adam', 'adamw' or 'muon'; did you mean adamw?"),
        ("objective.name=EDN", "there is no 'EDN'; did you mean"),
    ],
)
def test_values_that_mean_nothing_are_refused_with_the_right_word(override, said, tmp_path):
    key = override.split("=")[0]
    with pytest.raises(config.ConfigError) as error:
        load(tmp_path, override)
    assert str(error.value).startswith(f"command line: {key}: {said}")


# Attention ------------------------------------------------------------------------------------------------------------


def attention(tmp_path, capsys, resolution, **network):
    """What stderr says when a run on noise of this size begins; network: what its config sets."""
    from training.build import build_model, say_what_attends_nowhere

    class Codec:
        network_shape = {"resolution": resolution, "channels": 1, "label_dim": 0, "augment_dim": 0}

    cfg = config.parse({"network": {"model_channels": 8, "num_blocks": 1, **network}})
    say_what_attends_nowhere(cfg, build_model(cfg, Codec(), torch.device("cpu"), "fp32"))
    return capsys.readouterr().err


def test_attention_off_the_grid_is_said(tmp_path, capsys):
    said = attention(tmp_path, capsys, 48, channel_mult=[1, 2, 2], attn_resolutions=[16])
    assert said == "warning: network.attn_resolutions: no level has 16 pixels: 48, 24, 12\n"
    said = attention(tmp_path, capsys, 48, channel_mult=[1, 2], attn_resolutions=[24, 20, 12])
    assert said == "warning: network.attn_resolutions: no level has 20 or 12 pixels: 48, 24\n"
    for resolution, network in (
        (48, {"channel_mult": [1, 2, 2]}),
        (8, {"channel_mult": [1, 2]}),
        (48, {"channel_mult": [1, 2, 2], "attn_resolutions": [24, 12]}),
        (48, {"channel_mult": [1, 2, 2], "attn_resolutions": []}),
        (32, {"channel_mult": [1, 2], "attn_resolutions": [16]}),
    ):
        assert attention(tmp_path, capsys, resolution, **network) == ""


def test_a_run_says_it_once(tmp_path, capsys):
    for folder, network, lines in (("a", {"attn_resolutions": [16]}, 1), ("b", {}, 0)):
        cfg = tiny(tmp_path / folder, network=network, train={"steps": 1})
        if not network:  # left at its default, [16], for 8 pixels
            cfg = config.parse(
                {s: {k: v for k, v in c.items() if k != "attn_resolutions"} for s, c in cfg.model_dump().items()}
            )
        trainer.train(cfg)
        assert capsys.readouterr().err.count("attn_resolutions") == lines
        whole = config.load(tmp_path / folder / "config.yml", ["train.steps=2"])  # every setting stands there
        trainer.train(whole, resume=True)
        assert "attn_resolutions" not in capsys.readouterr().err
