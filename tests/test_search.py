"""The search for noise levels, the sweep over numbers of steps, and their pictures."""

import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import generate
import sampler
from metrics import pictures
from sampling import search
from training import trainer


def test_golden_section_finds_the_lowest_point():
    calls = []
    found = sampler.golden_section(lambda u: calls.append(u) or abs(u - 0.7), -6.0, 4.0, 0.01)
    assert found == pytest.approx(0.7, abs=0.01)
    assert len(calls) <= 2 + math.ceil(math.log(1000) / -math.log((5**0.5 - 1) / 2))
    assert (
        sampler.golden_section(lambda u: u, 0, 1, 0.01) < 0.01
        and sampler.golden_section(lambda u: -u, 0, 1, 0.01) > 0.99
    )


def test_levels_are_found_one_after_another():
    best, trials = [0.8, 0.2, 0.03], []

    def score(sigmas):
        trials.append(list(sigmas))
        return 1 + sum(abs(math.log(s / b)) for s, b in zip(sigmas[1:], best, strict=False))

    rounds = list(sampler.search_levels(score, 4, 80.0, 0.002))
    assert [len(sigmas) for sigmas, _ in rounds] == [2, 3, 4]
    assert rounds[-1][0] == pytest.approx([80.0, *best], rel=0.1)
    for (sigmas, value), (longer, _) in itertools.pairwise(rounds):
        assert longer[:-1] == sigmas and value == score(sigmas)
    assert all(t[0] == 80 and t == sorted(t, reverse=True) and t[-1] >= 0.002 for t in trials)
    assert all(t[1] == rounds[0][0][1] for t in trials if len(t) == 3)  # greedy: what is found stays
    assert len({tuple(t) for t in trials[: len(trials) // 2]}) <= 45


def test_the_best_trial_wins_even_where_scores_are_noisy():
    noise = torch.Generator().manual_seed(0)
    tried = {}

    def score(sigmas):
        tried[sigmas[1]] = math.log(sigmas[1] / 0.5) ** 2 + float(torch.rand((), generator=noise))
        return tried[sigmas[1]]

    ((sigmas, value),) = sampler.search_levels(score, 2)
    assert value == min(tried.values()) == tried[sigmas[1]]


# The store


def test_the_store_keeps_results_for_every_number_of_steps(tmp_path):
    path = search.store(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert path == tmp_path / "sigmas.json" == search.store(str(tmp_path / "model.ckpt"))
    assert search.found(path, 2, 80.0) is None
    search.remember(path, 2, {"sigmas": [80.0, 0.8], "fid": 1.0})
    search.remember(path, 3, {"sigmas": [80.0, 0.8, 0.1], "fid": 0.9})
    search.remember(path, 2, {"sigmas": [80.0, 0.7], "fid": 0.8})
    assert search.found(path, 2, 80.0)["sigmas"] == [80.0, 0.7]
    assert search.found(path, 3, 80.0)["sigmas"] == [80.0, 0.8, 0.1] and search.found(path, 4, 80.0) is None
    assert list(json.loads(path.read_text())) == ["2", "3"]


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[1]",
        '{"x": 1}',
        '{"2": [80, 1]}',
        '{"2": {"sigmas": [80]}}',
        '{"2": {"sigmas": [1, 80]}}',
        '{"2": {"sigmas": [80, "1"]}}',
        '{"2": {"sigmas": [90, 1]}}',
        '{"2": {"sigmas": [80, -1]}}',
        '{"2": {"sigmas": [80, NaN]}}',
    ],
)
def test_a_store_that_makes_no_sense_is_named(tmp_path, text):
    path = tmp_path / "sigmas.json"
    path.write_text(text)
    with pytest.raises(generate.ConfigError, match=r"sigmas\.json: .*(delete|again)"):
        search.found(path, 2, 80.0)


# The commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = {"dir": str(folder / "data"), "conditional": True}
    trainer.train(tiny(folder / "r", data=data, train={"lr": 0.02, "steps": 12}))
    return folder / "r"


def call(run, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", *map(str, arguments)])


def test_search_keeps_levels_for_steps(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampler, "search_levels", functools.partial(sampler.search_levels, tolerance=1.5))
    assert call(run, "--search-sigmas", 2, "--num", 100) == 0
    said = capsys.readouterr().out
    trials = {levels: float(value) for value, levels in re.findall(r"^ +([\d.]+)   (80.*)$", said, re.M)}
    kept = json.loads((run / "sigmas.json").read_text())["2"]
    assert kept["sigmas"] == [80.0, float(min((t for t in trials if t != "80"), key=trials.get).split(", ")[1])]
    assert kept["step"] == 12 and kept["features"] == "classifier features" and kept["samples"] == 100
    assert len(trials) >= 6 and "80" in trials and "classifier features" in said

    assert call(run, "--steps", 2, "--num", 100, "--calc_fid", "--out", tmp_path / "o") == 0
    said = capsys.readouterr().out
    assert "sigmas.json (fid" in said and "step 12" in said
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["sigmas"] == kept["sigmas"]
    assert float(re.search(r"NFE: fid ([\d.]+)", said)[1]) == pytest.approx(kept["fid"], rel=1e-3)  # the same images
    assert call(run, "--sigmas", "80,0.5", "--num", 2, "--format", "npz", "--out", tmp_path / "p") == 0
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["sigmas"] == [80.0, 0.5]
    assert "sigmas.json" not in capsys.readouterr().out

    assert call(run, "--sweep", "1,2", "--num", 100, "--out", tmp_path / "s") == 0
    said = capsys.readouterr().out
    table = {steps: float(fid) for steps, fid in re.findall(r"^ +(\d) +([\d.]+)   80", said, re.M)}
    assert table["2"] == pytest.approx(kept["fid"], rel=1e-3) and table["1"] == pytest.approx(trials["80"], rel=1e-3)
    with Image.open(tmp_path / "s" / "sweep.png") as picture:
        assert picture.size == (720, 480)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--search-sigmas", 2, "sample.solver=heun"], "--search-sigmas: this config samples by Heun's method"),
        (["--sweep", "1,2", "sample.solver=heun"], "--sweep: this config samples by Heun's method"),
        (["--search-sigmas", 2, "metrics.scores=[prc]"], "holds neither fid nor kid"),
        (["--sweep", "1,2", "--nearest"], "--nearest: is for one number of steps"),
    ],
)
def test_searches_that_cannot_be(run, tmp_path, capsys, arguments, expected):
    assert call(run, "--num", 20, "--out", tmp_path / "o", *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--search-sigmas", "1"], ["--sweep", "1,0"], ["--sweep", "1", "--steps", "2"]])
def test_bad_numbers_of_steps(run, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        call(run, *arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# Pictures


def dots(image):
    """Centres (row, column) of the blue dots of a plot, from the left."""
    r, g, b = image.int()
    blue = ((b - r) > 100) & ((g - r) > 50)
    wide = torch.nn.functional.avg_pool2d(blue[None].float(), 9, 1, 4)[0] > 0.95  # lines are thinner
    columns = wide.any(0).nonzero().flatten()
    return [(wide[:, c].nonzero().float().mean().item(), c.item()) for c in columns]


def test_a_plot_is_to_scale():
    image = pictures.plot([1, 2, 4], [3.0, 1.0, 0.5], "steps", "fid")
    assert image.shape == (3, 480, 720) and image.dtype == torch.uint8
    found = dots(image)
    rows = [np.mean([r for r, c in found if low < c < high]) for low, high in ((90, 290), (290, 490), (490, 690))]
    assert (rows[2] - rows[1]) / (rows[1] - rows[0]) == pytest.approx(0.5 / 2.0, abs=0.02)


@pytest.mark.parametrize("y", [[0.0], [0.0, 0.0], [0.004, -0.0012], [431.0, 2.0], [1e-7, 2e-7]])
def test_a_plot_takes_any_scores(y):
    image = pictures.plot(range(len(y)), y, "steps", "kid")
    rows = {round(r) for r, _ in dots(image)}
    assert rows and all(55 <= row <= 415 for row in rows)


def test_copies_are_framed():
    samples = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    nearest = torch.full((3, 2, 1, 8, 8), 90, dtype=torch.uint8)
    image = pictures.beside(samples, nearest, torch.tensor([False, True, False])).int()
    assert image.shape[0] == 3
    assert ((image[0] - image[1]) > 100).sum() == 54**2 - 48**2
    assert (image == 0).all(0).sum() == 3 * 48**2 and (image == 90).all(0).sum() == 6 * 48**2
