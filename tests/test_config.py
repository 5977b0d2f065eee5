"""Settings and the messages about bad ones."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY

import config

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "config.yml", *sorted((ROOT / "configs").glob("*.yml"))]


def message(raw=None, overrides=(), text=None, tmp_path=None):
    path = tmp_path / "c.yml"
    path.write_text(text if text is not None else yaml.safe_dump(raw))
    with pytest.raises(config.ConfigError) as error:
        config.load(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_passes_and_explains_every_key(path):
    cfg = config.load(path)
    assert config.parse(cfg.model_dump()) == cfg
    lines = path.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"  \w+:", line):
            assert "#" in line or above.startswith("  #"), f"{path.name}: no comment on {line.strip()}"


def test_config_yml_shows_every_key():
    shown = yaml.safe_load((ROOT / "config.yml").read_text())
    everything = config.load(ROOT / "config.yml").model_dump()
    assert {s: sorted(v) for s, v in shown.items()} == {s: sorted(v) for s, v in everything.items()}


def test_the_committed_schema_is_current():
    assert (ROOT / "config.schema.json").read_text() == config.json_schema(), "python -m config > config.schema.json"
    printed = subprocess.run([sys.executable, "-m", "config"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert printed.stdout == config.json_schema()


def test_config_does_without_torch_and_rooms_above_it():
    above = ("torch", "numpy", "data", "training", "objectives")
    code = f"import config, sys; print([m for m in {above} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_dump_reads_back(tmp_path):
    cfg = config.parse(TINY)
    (tmp_path / "c.yml").write_text(config.dump(cfg))
    assert config.load(tmp_path / "c.yml") == cfg


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  stepz: 3", "c.yml:2: train.stepz: there is no such setting; did you mean train.steps?"),
        ("trian:\n  steps: 3", "c.yml:1: trian: there is no such setting; did you mean train?"),
        ("data:\n  lr: 3", "c.yml:2: data.lr: there is no such setting; did you mean train.lr?"),
        ("train:\n  lr: fast", "c.yml:2: train.lr: input should be a valid number, found 'fast'"),
        ("train:\n  steps: 1.5", "c.yml:2: train.steps: input should be a valid integer, found 1.5"),
        ("train:\n  steps: true", "c.yml:2: train.steps: input should be a valid integer, found True"),
        ("train:\n  batch_size: 0", "c.yml:2: train.batch_size: input should be greater than or equal to 1, found 0"),
        ("train:\n  lr: .nan", "c.yml:2: train.lr: input should be a finite number, found nan"),
        ("objective:\n  name: itc", "c.yml:2: objective.name: there is no 'itc'; did you mean ict?"),
        ("objective:\n  name: ict\n  q: 2", "c.yml:3: objective.q: there is no such setting for this"),
        (
            "network:\n  precond: emd",
            "c.yml:2: network.precond: 'emd' is not one of 'edm', 'cm', 'trigflow' or 'flow'; did you mean edm?",
        ),
        ("train: 3", "c.yml:1: train: expected keys and values below it, found 3"),
        ("- 1", "c.yml: expected sections"),
        ("train: {steps: 1", "c.yml:1: not valid YAML"),
        ("train:\n  lr: 1\n  lr: 2", "c.yml:3: not valid YAML: lr is given twice"),
        ("run: !!python/object/apply:os.system ['true']", "c.yml:1: not valid YAML: could not determine a constructor"),
        ("network: {sigma_min: 9, sigma_max: 8}", "c.yml:1: network.sigma_min: must be below network.sigma_max (8"),
        ("objective: {name: edm}\nnetwork: {precond: cm}", "c.yml:2: network.precond: objective edm"),
        ("data: {name: folder}", "c.yml: data.path: data.name: folder needs the path"),
        ("data: {path: x}", "c.yml:1: data.path: data.name: digits takes no path"),
        ("train: {batch_size: 10, microbatch: 3}", "c.yml:1: train.microbatch: must divide train.batch_size (10)"),
        ("sample: {sigmas: [80, 90]}", "c.yml:1: sample.sigmas: must descend"),
        ("sample: {sigmas: [90]}", "c.yml:1: sample.sigmas: starts above network.sigma_max"),
        ("ema: {decay: [0.9], half_life_kimg: [1]}", "c.yml:1: ema.half_life_kimg: give either this or ema.decay"),
        ("sample: {guidance: 2.0}", "c.yml:1: sample.guidance: needs a network that knows the null label"),
        ("network: {label_dropout: 0.1}", "c.yml:1: network.label_dropout: there are no labels to drop"),
        (
            "metrics: {reference: x.npz, features: inception, scores: [fid, prc]}",
            "c.yml:1: metrics.scores: metrics.reference has the statistics of a FID alone",
        ),
        ("a: &x {lr: 1}\ntrain: *x", "c.yml:2: not valid YAML: references (*name) are not read here"),
        ("? [train]\n: 3", "c.yml:1: not valid YAML: a key must be a name"),
        ("train: {steps: !!int x}", "c.yml: cannot be read: invalid literal for int()"),
        (f"train: {{steps: 0x{'f' * 4000}}}", "c.yml: cannot be read: Exceeds the limit (4300 digits)"),
        ("[" * 3000, "c.yml: cannot be read: maximum recursion depth exceeded"),
        ("{a: " * 3000, "c.yml: cannot be read: maximum recursion depth exceeded"),
        ("train: {lr: \0}", "c.yml: not valid YAML: unacceptable character #x0000"),
        ("#" * 1_000_001, "c.yml: cannot be read: it is longer than 1,000,000 characters"),
        ("train: {lr_warmup: 400000}", "c.yml:1: train.lr_warmup: must be below train.steps (400000)"),
        (
            "train: {lr_warmup: 1.0}",
            "c.yml:1: train.lr_warmup: input should be an integer from 0 (steps) or a number b",
        ),
        (
            "train: {log_every: 0}",
            "c.yml:1: train.log_every: input should be an integer from 1 (steps) or a number bet",
        ),
        ("train: {save_every: fast}", "c.yml:1: train.save_every: input should be an integer from 1 (steps) or"),
        (
            "sample: {every: true}",
            "c.yml:1: sample.every: input should be an integer from 0 (steps) or a number betwee",
        ),
        (
            "metrics: {every: -0.5}",
            "c.yml:1: metrics.every: input should be an integer from 0 (steps) or a number betw",
        ),
        ("objective: {name: sct, warmup: .nan}", "c.yml:1: objective.warmup: input should be an integer from 0"),
        ("objective: {stage: 0.2, double_kimg: 3}", "c.yml:1: objective.stage: give either this or objective.double_k"),
        ("objective: {name: ict, stage: 0.2}", "c.yml:1: objective.stage: there is no such setting for this objective"),
    ],
)
def test_messages_name_file_line_key_and_the_nearest_right_name(text, expected, tmp_path):
    assert message(text=text, tmp_path=tmp_path).startswith(expected)


def test_overrides(tmp_path):
    (tmp_path / "c.yml").write_text("train: {lr: 1e-4}\nobjective: {name: ect, q: 4.0, P_mean: -0.5}")
    cfg = config.load(tmp_path / "c.yml", ["train.steps=7", "data.conditional=true", "network.channel_mult=[1,2]"])
    assert (cfg.train.lr, cfg.train.steps, cfg.data.conditional, cfg.network.channel_mult) == (1e-4, 7, True, [1, 2])
    other = config.load(tmp_path / "c.yml", ["objective.name=ict", "objective.s0=4"])  # the file's settings are ECT's
    assert (other.objective.name, other.objective.P_mean, other.objective.s0) == ("ict", -1.1, 4)
    (tmp_path / "n.yml").write_text("network: {model_channels: 16, embedding_type: fourier}")
    adm = config.load(tmp_path / "n.yml", ["network.name=dhariwal_unet"])
    assert adm.network.name == "dhariwal_unet" and adm.network.model_channels == 16


@pytest.mark.parametrize(
    "override", ["steps=3", "train.steps", "train.steps=x", "train.stepz=3", "train.lr=[", "a.b=1"]
)
def test_a_bad_override_says_so(override, tmp_path):
    text = message(raw={}, overrides=[override], tmp_path=tmp_path)
    assert ("command line" in text and override.split("=")[0].split(".")[-1] in text) or text.startswith("c.yml: a:")


def test_a_length_is_steps_or_a_share_of_the_run():
    assert config.in_steps(7, 2800) == 7 and config.in_steps(0, 2800) == 0
    assert config.in_steps(0.02, 2800) == 56 and isinstance(config.in_steps(0.02, 2800), int)
    assert config.in_steps(0.01, 30) == 1 and config.in_steps(0.25, 30) == 8  # at least one; the nearest
    assert config.in_steps(0.25, 30, whole=False) == 7.5 and config.in_steps(0.01, 30, whole=False) == 1
    train = config.parse({"train": {"steps": 10, "lr_warmup": 0.5, "save_every": 0.1, "log_every": 3}}).train
    assert (train.lr_warmup, train.save_every, train.log_every) == (0.5, 0.1, 3)


def test_a_stage_takes_the_place_of_double_kimg(tmp_path):
    def stage(*overrides, text="{}"):
        (tmp_path / "c.yml").write_text(text)
        objective = config.load(tmp_path / "c.yml", list(overrides)).objective
        return objective.stage, objective.double_kimg

    assert stage() == (None, 3200.0) and stage(text="objective: {double_kimg: 36.0}") == (None, 36.0)
    assert stage("objective.stage=0.2") == stage(text="objective: {stage: 0.2}") == (0.2, None)
    assert stage("objective.stage=500") == (500, None)
    assert stage("objective.stage=null") == (None, 3200.0)
    assert stage("objective.stage=0.2", "objective.double_kimg=null", text="objective: {double_kimg: 36.0}") == (
        0.2,
        None,
    )
    # On the command line, over the file's other: that one gives way; both there contradict each other
    assert stage("objective.stage=0.2", text="objective: {double_kimg: 36.0}") == (0.2, None)
    assert stage("objective.double_kimg=36.0", text="objective: {stage: 0.2}") == (None, 36.0)
    assert stage("objective.double_kimg=null", text="objective: {stage: 0.2}") == (0.2, None)
    assert stage("objective.stage=null", text="objective: {double_kimg: 36.0}") == (None, 36.0)
    with pytest.raises(config.ConfigError, match=r"command line: objective\.stage: give either this or"):
        stage("objective.double_kimg=36.0", "objective.stage=0.2", text="objective: {stage: 0.3}")


def test_the_default_runs_lengths_are_those_it_was_measured_with():
    cfg = config.load(ROOT / "config.yml")
    steps, t = cfg.train.steps, cfg.train
    lengths = [config.in_steps(length, steps) for length in (t.lr_warmup, t.save_every, t.log_every, cfg.sample.every)]
    assert (steps, lengths) == (2300, [46, 575, 100, 575])
    assert config.in_steps(cfg.objective.flow, steps) == 690


def test_a_typo_is_one_line_exit_code_2_and_quick(tmp_path):
    (tmp_path / "c.yml").write_text("train:\n  bach_size: 3\n")
    for command in ("main.py", "generate.py"):
        extra = ["--ckpt", "x"] if command == "generate.py" else []
        result = subprocess.run(
            [sys.executable, ROOT / command, "--cfg", tmp_path / "c.yml", *extra], capture_output=True, text=True
        )
        assert result.returncode == 2 and result.stdout == ""
        assert (
            result.stderr == f"{tmp_path}/c.yml:2: train.bach_size: there is no such setting; "
            "did you mean train.batch_size?\n"
        )


def test_first_difference():
    a, b = config.parse(TINY), config.parse({**TINY, "train": {**TINY["train"], "lr": 1.0}})
    assert config.first_difference(a, b) == "train.lr is 0.001 there and 1.0 here"
    assert config.first_difference(a, b, frozenset(["train.lr"])) is None and config.first_difference(a, a) is None


def test_schema_describes_every_setting():
    schema = json.loads(config.json_schema())
    for name, part in schema["$defs"].items():
        for key, value in part["properties"].items():
            assert key == "name" or "description" in value, f"{name}.{key}"
