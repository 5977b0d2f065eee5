"""Schedules against the original code's numbers and the papers' formulas."""

import json
import math

import pytest
import torch
from conftest import GOLDEN, golden, relative_error

import sampler
from objectives import schedules

NUMBERS = json.loads((GOLDEN / "schedules.json").read_text())


@pytest.mark.parametrize("name", [name for name in NUMBERS if name.startswith("ct")])
def test_ct_levels_and_target_decay_match_the_original(name):
    s0, s1 = map(int, name.split("_")[3:5])
    mu0 = 0.9 if name.endswith("mu0.9") else 0.95
    case = NUMBERS[name]
    levels = [schedules.ct_levels(k, case["total_steps"], s0, s1) for k in case["k"]]
    assert levels == case["num_scales"]
    decays = [schedules.ct_target_decay(n, s0, mu0) for n in levels]
    assert decays == pytest.approx(case["ema"], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name.startswith("ict")])
def test_ict_levels_match_the_paper(name):
    s0, s1, _ = map(int, name.split("_")[1:])
    case = NUMBERS[name]
    assert [schedules.ict_levels(k, case["total_steps"], s0, s1) for k in case["k"]] == case["num_scales"]


def test_ict_levels_double_at_equal_intervals_and_end_at_s1_plus_1():
    levels = [schedules.ict_levels(k, 8000, 10, 1280) for k in range(8000)]
    assert sorted(set(levels)) == [10 * 2**i + 1 for i in range(8)]
    assert levels[0] == 11 and levels[999] == 11 and levels[1000] == 21 and levels[-1] == 1281


def test_karras_grid_matches_the_original_and_its_ends():
    reference = golden("samplers")["karras_sigmas18"]
    assert relative_error(sampler.karras_sigmas(18), reference[:18]) < 1e-12
    grid = sampler.karras_sigmas(5, 0.1, 10.0)
    assert grid[0].item() == pytest.approx(10) and grid[-1].item() == pytest.approx(0.1)


def test_ict_probabilities_are_the_normal_mass_between_levels():
    sigmas = sampler.karras_sigmas(11).flip(0)
    p = schedules.ict_index_probabilities(sigmas, -1.1, 2.0)
    assert p.shape == (10,) and p.sum().item() == pytest.approx(1)
    normal = torch.distributions.Normal(-1.1, 2.0)
    mass = normal.cdf(sigmas[1:].log()) - normal.cdf(sigmas[:-1].log())
    assert torch.allclose(p, mass / mass.sum())


@pytest.mark.parametrize("key", [k[:-2] for k in golden("ect_losses") if k.endswith("_t")])
def test_ect_r_matches_the_original(key):
    case = golden("ect_losses")
    q, stage, _, mapping = key.split("_")
    r = schedules.ect_r(case[f"{key}_t"], int(stage[5:]), float(q[1:]), mapping)
    assert relative_error(r, case[f"{key}_r"]) < 1e-12


def test_ect_r_starts_as_diffusion_and_closes_on_t():
    t = torch.tensor([0.01, 0.5, 1.9, 2.0, 80.0], dtype=torch.float64)
    assert (schedules.ect_r(t, 0)[:3] == 0).all() and (schedules.ect_r(t, 0)[3:] > 0).all()
    gaps = [float(((t - schedules.ect_r(t, a)) / t).max()) for a in range(12)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 9 / 2**12 + 1e-9
    assert math.isclose(float(schedules.ect_r(t, 20)[0]), 0.01, rel_tol=1e-5)
