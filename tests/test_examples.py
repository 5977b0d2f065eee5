"""The examples: each runs in a shortened form by its own first line, and stands on experts and data that are right."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy():
    return load("policy")


@pytest.fixture(scope="module")
def points():
    return load("points_2d")


def quick(path, *arguments, folder=None):
    """What the example prints, run by the command in its first line and --quick; in `folder`: beside its modules."""
    command = re.search(r"python (examples/\w+\.py)", path.read_text().split("\n")[0])
    assert command and ROOT / command[1] == path, f"{path}: the first line says no command"
    own = {} if folder is None else {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "error", path if folder else command[1], "--quick", *map(str, arguments)],
        cwd=folder or ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **own},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_these_are_all():
    assert [p.stem for p in EXAMPLES] == ["own_network", "photographs", "points_2d", "policy"]


def test_own_network_beside_modules_of_ones_own(tmp_path):
    """Run where config.py, data.py and metrics.py are another's: nothing that it imports needs ours."""
    path = ROOT / "examples" / "own_network.py"
    for name in ("config", "data", "metrics"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not yours')")
    said = quick(path, folder=tmp_path)
    stds = [float(s) for s in re.findall(r"std ([\d.]+)", said)]
    assert len(stds) == 3 and stds[2] == pytest.approx(0.5, abs=0.02)
    text = path.read_text()
    assert len(text.splitlines()) < 60
    own = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    imported = {n.module.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert imported & own <= {"objectives", "ema", "sampler"}


def test_points_2d(tmp_path):
    said = quick(ROOT / "examples" / "points_2d.py", "--out", tmp_path)
    rows = re.findall(r"\| (\w[\w ]*) \| (CT|iCT|ECT|sCT|MeanFlow|SoFlow) \| ([\d.]+) \|", said)
    assert len(rows) == 18 and all(0 < float(w) < 2 for _, _, w in rows)
    with Image.open(tmp_path / "points_2d.png") as image:
        assert image.width == 8 * 236 and image.height == 3 * 256


def test_policy(tmp_path):
    said = quick(ROOT / "examples" / "policy.py", "--out", tmp_path, "--bounds", "tanh")
    rows = re.findall(r"\| (pendulum|past_the_disc) \| ([\w ,]+) \| (-[\d.]+) \|.*\| ([\d.]+) \|", said)
    assert len(rows) == 8 and all(float(ms) > 0 for *_, ms in rows)
    assert (tmp_path / "pendulum-seed0" / "config.yml").exists() and "bounds: tanh" in said


def test_the_pendulums_expert_swings_it_up_and_holds_it(policy):
    ran = policy.episodes("Pendulum-v1", policy.pendulum_expert, range(5))
    assert ran["returns"].mean() > -250 and (np.abs(ran["actions"]) <= 2).all()
    assert (ran["obs"][-5:, 0] > 0.99).all()  # cos(angle) at the last step of each


def test_the_disc_has_two_ways_and_the_mean_of_both_hits_it(policy):
    check_env(gymnasium.make("PastTheDisc-v0").unwrapped, skip_render_check=True)
    ran = policy.episodes("PastTheDisc-v0", policy.disc_expert(0), range(500))
    assert (ran["returns"] > -3).all() and abs(ran["above"].mean() - policy.UP) < 0.06
    middle = policy.episodes("PastTheDisc-v0", lambda obs: np.tile([0.7, 0.0], (len(obs), 1)), range(5))
    assert (middle["returns"] < -10).all()


def test_points_have_the_scale_that_the_networks_expect(points):
    for draw in points.DATA.values():
        x = draw(20_000, torch.Generator().manual_seed(0))
        assert x.std() == pytest.approx(points.SD, abs=0.05) and x.mean(0).abs().max() < 0.02
    board = points.checkerboard(4000, torch.Generator().manual_seed(0)) / (points.SD * 3**0.5 / 2) + 2
    assert len({tuple(row) for row in board.floor().int().tolist()}) == 8
    assert (board.floor().sum(1) % 2 == 0).all()


def test_a_trajectory_ends_at_the_data(points):
    data = torch.tensor([[-0.5, 0.0], [0.5, 0.2]])
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    ends = points.trajectory_ends(data, z)
    nearest = torch.cdist(ends, data).min(1)
    assert nearest.values.max() < 0.03
    side = (z @ (data[1] - data[0])).sign()  # two equal points: the plane between them divides the noise
    far = side[(z @ (data[1] - data[0])).abs() > 0.1]
    assert torch.equal(far, (2 * nearest.indices - 1)[(z @ (data[1] - data[0])).abs() > 0.1].float())
