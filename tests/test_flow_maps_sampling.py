"""Flow maps sampled, searched, edited and scored: by the originals' numbers, a map known exactly, and the commands."""

import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import golden, relative_error, tiny
from PIL import Image

import config
import edit
import generate
import networks
import sampler
from sampling import drawing, editing, plan
from sources.codecs import ImageCodec
from training import trainer

SD = 0.5


def wide(t, z):
    return t.reshape(-1, *[1] * (z.ndim - 1))


def stand_in(case):
    """The golden files' u = a tanh(z) cos(t) + b sin(2 r) z + c (t - r) z."""
    a, b, c = case["coef"][:3]

    def u(z, t, r):
        t, r = wide(t, z), wide(r, z)
        return a * torch.tanh(z) * torch.cos(t) + b * torch.sin(2 * r) * z + c * (t - r) * z

    return u


# Against the originals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [k for k in golden("meanflow_losses") if re.match(r"sample_\d", k)])
def test_jumps_match_meanflow(name):
    case, times = golden("meanflow_losses"), [float(t) for t in name.split("_")[1:]]
    x = sampler.jumps(stand_in(case), case["sample_z1"], times[:-1])
    assert times[-1] == 0 and x.dtype == torch.float64 and relative_error(x, case[name]) < 1e-6


@pytest.mark.parametrize("name", [k for k in golden("soflow_losses") if re.match(r"sample_\d", k)])
def test_noise_added_anew_matches_soflow(name):
    case, steps = golden("soflow_losses"), int(re.search(r"_(\d+)step", name)[1])
    x = sampler.jumps(stand_in(case), case["sample_z1"], sampler.times(steps), lambda i: case["sample_noises"][i - 1])
    assert relative_error(x, case[name]) < 1e-6


@pytest.mark.parametrize("name", [k for k in golden("imf_losses") if re.match(r"sample_\d", k)])
def test_jumps_match_imf(name):
    case, steps = golden("imf_losses"), int(re.search(r"_(\d+)step", name)[1])
    assert relative_error(sampler.jumps(stand_in(case), case["sample_z1"], sampler.times(steps)), case[name]) < 1e-6


# A map known exactly: data N(0, SD^2) ---------------------------------------------------------------------------------


def scale(t):
    return (t**2 + SD**2 * (1 - t) ** 2).sqrt()


def exact(z, t, r):
    """u of data N(0, SD^2): z goes as `scale`; at r = t the velocity."""
    t, r = wide(t, z), wide(r, z)
    velocity = (t - SD**2 * (1 - t)) / scale(t) ** 2 * z
    return torch.where(t == r, velocity, (1 - scale(r) / scale(t)) / (t - r).where(t != r, 1) * z)


Z = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [1.0, 0.9, 0.2, 0.01]])
def test_an_exact_map_arrives_whatever_the_jumps(times):
    assert torch.allclose(sampler.jumps(exact, Z, times), SD * Z)


def test_heun_goes_along_the_velocity_with_the_square_of_the_steps():
    errors = [float((sampler.flow_heun(exact, Z, sampler.times(n)) - SD * Z).norm() / Z.norm()) for n in (20, 40)]
    assert errors[1] < 1e-3 and 2.5 < errors[0] / errors[1] < 6


def test_heun_evaluates_twice_per_step_but_the_last():
    calls = []
    sampler.flow_heun(lambda z, t, r: calls.append((float(t[0]), float(r[0]))) or z, Z, [1.0, 0.5])
    assert calls == [(1, 1), (0.5, 0.5), (0.5, 0.5)]


def test_new_noise_keeps_the_spread_of_the_data():
    noise = torch.Generator().manual_seed(1)
    x = sampler.jumps(exact, Z, [1.0, 0.7, 0.3], lambda i: torch.randn(Z.shape, generator=noise, dtype=Z.dtype))
    assert (
        float(x.std()) == pytest.approx(SD, rel=0.02)
        and abs(torch.corrcoef(torch.stack([x[:, 0], Z[:, 0]]))[0, 1]) < 0.9
    )


def test_clean_data_of_a_map_by_its_time():
    t = torch.rand(len(Z), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(sampler.to_data(exact)(Z, t), Z * wide(SD / scale(t), Z))


def test_each_jump_is_told_where_it_goes():
    calls = []
    sampler.jumps(lambda z, t, r: calls.append((float(t[0]), float(r[0]))) or z, Z, [1.0, 0.6, 0.1])
    assert calls == [(1, 0.6), (0.6, 0.1), (0.1, 0)]


def test_times():
    assert sampler.times(1) == [1.0] and sampler.times(4) == [1.0, 0.75, 0.5, 0.25]
    assert sampler.times(2, [1.0, 0.3, 0.1]) == [1.0, 0.3] and sampler.times(2, [1.0]) == [1.0, 0.5]


def test_times_are_found_one_after_another():
    best = [0.62, 0.17]

    def score(times):
        return 1 + sum(abs(t - b) for t, b in zip(times[1:], best, strict=False))

    rounds = list(sampler.search_levels(score, 3, 1.0, 0.0, clock="time"))
    assert rounds[-1][0] == pytest.approx([1.0, *best], abs=0.02) and rounds[0][0] == rounds[1][0][:-1]


# Editing in the clock "time" ------------------------------------------------------------------------------------------


def test_edits_of_a_map_keep_what_is_known_and_start_at_their_time():
    x, known = 0.3 * torch.ones(1, 1, 4, 4), torch.zeros(4, 4, dtype=torch.bool)
    known[:, 2:] = True
    seen = []

    def spy(z, t, r):
        seen.append((z, float(t[0]), float(r[0])))
        return exact(z, t, r)

    z, noises = torch.randn(3, 1, 4, 4), torch.randn(4, 3, 1, 4, 4)
    settings = {"noise_at": lambda i: noises[i], "clock": "time"}
    out = editing.edit(sampler.to_data(spy), x, *editing.inpainting(known), [1.0, 0.4], z, **settings)
    assert torch.equal(out[..., 2:], x.expand(3, 1, 4, 4)[..., 2:]) and (out - x)[..., :2].abs().min() > 0
    assert [call[1:] for call in seen] == [(1, 0), (pytest.approx(0.4), 0)]
    assert torch.allclose(seen[1][0][..., 2:], 0.6 * x[..., 2:] + 0.4 * noises[1][..., 2:])

    seen.clear()
    editing.stroke(sampler.to_data(spy), x, [0.4], z, **settings)
    editing.denoise(sampler.to_data(spy), x, [0.2], **settings)
    assert torch.allclose(seen[0][0], 0.6 * x + 0.4 * z) and torch.allclose(seen[1][0], 0.8 * x)


# A network ------------------------------------------------------------------------------------------------------------


def small(times="t,t-r", label_dim=3, **options):
    torch.manual_seed(0)
    told = networks.flow_map.columns(times, options.get("guidance_inputs", False))
    net = networks.SongUNet(8, 1, 1, label_dim=label_dim, model_channels=8, channel_mult=[1], num_blocks=1, told=told)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = networks.FlowMap(net, times, **options).eval()
    model.codec = ImageCodec(8, 1, label_dim)
    return model


@pytest.mark.parametrize("solver", ["jumps", "renoise", "heun"])
def test_a_sample_does_not_depend_on_its_batch_and_is_of_its_class(solver):
    model, labels = small(), torch.arange(10) % 3
    draw = lambda rows, size: torch.cat(list(drawing.generate(model, 4, rows, [1.0, 0.4], solver, labels[rows], size)))  # noqa: E731
    whole, parts = draw(range(10), 10), draw(range(10), 3)
    assert (whole - parts).abs().max() < 1 / 255 and (whole[7:8] - draw(range(7, 8), 1)).abs().max() < 1 / 255
    others = torch.cat(list(drawing.generate(model, 4, range(10), [1.0, 0.4], solver, (labels + 1) % 3)))
    assert (whole[0] - whole[1]).abs().max() > 0.1 and (whole - others).abs().max() > 0.02


def test_solvers_differ_and_count_their_evaluations():
    model, calls = small(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = {}
    for solver, nfe in {"jumps": 3, "renoise": 3, "heun": 5}.items():
        calls.clear()
        own = drawing.Drawing(model, 0, 4, [1.0, 0.6, 0.2], solver, torch.zeros(4).long())
        found[solver] = own.draw(0, 4)
        assert len(calls) == own.nfe == nfe
    assert not torch.equal(found["jumps"], found["renoise"]) and not torch.equal(found["jumps"], found["heun"])
    manifest = own.manifest("npz")
    assert manifest["times"] == [1.0, 0.6, 0.2] and "sigmas" not in manifest


def test_guidance_is_told_where_the_network_takes_it_and_mixed_where_not():
    seen, labels = [], torch.zeros(4).long()
    model = small("t-r", guidance_inputs=True)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    draw = lambda **how: next(drawing.generate(model, 0, range(4), [1.0], "jumps", labels, **how))  # noqa: E731
    guided = draw(guidance=3.0, interval=[0.2, 0.9])
    assert len(seen) == 1 and torch.equal(seen[0]["guidance"], torch.full((4,), 3.0))
    assert torch.allclose(seen[0]["interval"], torch.tensor([0.2, 0.9]).expand(4, 2))
    assert not torch.allclose(guided, draw()) and not torch.allclose(guided, draw(guidance=3.0))

    plain, z, t, r = small(), torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2)
    with torch.no_grad():
        own, null = plain(z, t, r, class_labels=torch.eye(3)[:2]), plain(z, t, r)
        mixed = sampler.guided(plain, 2.5)(z, t, r, class_labels=torch.eye(3)[:2])
    assert not torch.allclose(own, null) and torch.allclose(mixed, null + 2.5 * (own - null))


# What a config asks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meanflow", ([1.0, 0.5], "jumps")),
        ("soflow", ([1.0, 0.5], "renoise")),
        ("imf", ([1.0, 0.5], "jumps")),
        ("flow", ([1.0, 0.75, 0.5, 0.25], "heun")),
        ("ect", ([80.0, 0.821], "multistep")),
    ],
)
def test_the_methods_own_sampler(name, expected):
    cfg = config.parse({"objective": {"name": name}, "sample": {"heun_steps": 4}})
    assert plan.plan(cfg, 2) == expected


def test_times_and_solver_of_a_config():
    sample = {"times": [1.0, 0.3, 0.1], "solver": "renoise"}
    cfg = config.parse({"objective": {"name": "meanflow"}, "sample": sample})
    assert plan.plan(cfg, 2) == ([1.0, 0.3], "renoise")


@pytest.mark.parametrize(
    ("objective", "sample", "expected"),
    [
        (
            "meanflow",
            {"sigmas": [80.0, 1.0]},
            "sample.sigmas: objective meanflow makes a flow map, which is told times",
        ),
        ("ect", {"times": [1.0]}, "sample.times: objective ect trains at noise levels: set sample.sigmas"),
        ("meanflow", {"times": [0.5, 1.0]}, "sample.times: must descend"),
        ("meanflow", {"times": [1.5]}, "sample.times"),
        ("meanflow", {"solver": "multistep"}, "sampled by jumps, renoise or heun"),
        ("ect", {"solver": "jumps"}, "sampled by multistep or heun"),
        ("meanflow", {"interval": [0.2, 0.8]}, "sample.interval: is for networks that are told their guidance"),
    ],
)
def test_what_does_not_go_together(objective, sample, expected):
    with pytest.raises(config.ConfigError, match=re.escape(expected)):
        config.parse({"objective": {"name": objective}, "sample": sample})


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """MeanFlow with classes, iMF told its guidance, plain flow matching; of 8 x 8 digits."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    shared = {"data": {"dir": str(folder / "data"), "conditional": True}, "train": {"lr": 0.01, "steps": 8}}
    for name, objective in {"meanflow": {}, "imf": {"guidance": 8.0}, "flow": {}}.items():
        shared["train"]["steps"] = 40 if name == "imf" else 8  # until the guidance that it is told shows
        trainer.train(tiny(folder / name, objective={"name": name, **objective}, **shared))
    return folder


def call(run, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", *map(str, arguments)])


def images(run, out, *arguments):
    assert call(run, "--num", 4, "--format", "npz", "--out", out, *arguments) == 0
    return np.load(out / "samples" / "000000.npz")["images"], json.loads((out / "manifest.json").read_text())


def test_steps_times_and_solver(runs, tmp_path, capsys):
    run = runs / "meanflow"
    one, manifest = images(run, tmp_path / "a")
    assert manifest["times"] == [1.0] and manifest["solver"] == "jumps"
    two, manifest = images(run, tmp_path / "b", "--steps", 2)
    assert manifest["times"] == [1.0, 0.5] and not np.array_equal(one, two)
    assert np.array_equal(two, images(run, tmp_path / "c", "--times", "1,0.5")[0])
    again, manifest = images(run, tmp_path / "d", "--times", "1,0.5", "sample.solver=renoise")
    assert manifest["solver"] == "renoise" and not np.array_equal(two, again)
    assert (run / "samples" / "step-00000008.png").exists()
    _, manifest = images(runs / "flow", tmp_path / "e", "sample.heun_steps=5")
    assert manifest["solver"] == "heun" and len(manifest["times"]) == 5
    assert "4 samples, 9 evaluations each" in capsys.readouterr().out


def test_guidance_of_imf_costs_nothing_more(runs, tmp_path, capsys):
    free, _ = images(runs / "imf", tmp_path / "a")
    guided, manifest = images(runs / "imf", tmp_path / "b", "--guidance", 4, "--interval", "0.1,0.9")
    assert manifest["guidance"] == 4 and manifest["interval"] == [0.1, 0.9] and not np.array_equal(free, guided)
    assert "1 evaluations each, seed 0, guidance 4, in t from 0.1 to 0.9" in capsys.readouterr().out


def test_search_and_sweep(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampler, "search_levels", functools.partial(sampler.search_levels, tolerance=0.4))
    run = runs / "meanflow"
    assert call(run, "--search-times", 2, "--num", 100) == 0
    said = capsys.readouterr().out
    kept = json.loads((run / "times.json").read_text())["2"]
    assert kept["times"][0] == 1 and 0 < kept["times"][1] < 1 and kept["solver"] == "jumps"
    assert not (run / "sigmas.json").exists() and f"kept in {run}/times.json" in said
    assert images(run, tmp_path / "a", "--steps", 2)[1]["times"] == kept["times"]
    assert images(run, tmp_path / "b", "--steps", 2, "sample.solver=renoise")[1]["times"] == [1.0, 0.5]
    capsys.readouterr()
    assert call(run, "--sweep", "1,2", "--num", 100, "--class", 3, "--out", tmp_path / "s") == 0
    said = capsys.readouterr().out
    assert "class 3" in said and "against the 183 images of class 3 in digits" in said
    assert re.search(rf"^ +2 +([\d.]+)   1, {kept['times'][1]:.4g}  ", said, re.M)
    (run / "times.json").unlink()
    assert call(run, "--num", 40, "--nearest", "--calc_fid", "--steps", 3, "--out", tmp_path / "n") == 0
    assert "score at 3 NFE" in capsys.readouterr().out and (tmp_path / "n" / "nearest.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "meanflow",
            ["--sigmas", "80,1"],
            "--sigmas: a flow map is told times from 1 (noise) to 0 (data); give --times",
        ),
        ("meanflow", ["--times", "0.5,1"], "--times: [0.5, 1.0] must descend"),
        ("meanflow", ["--times", "1,0"], "--times: [1.0, 0.0] must descend and be above 0"),
        ("meanflow", ["--times", "2,1"], "--times: 2.0 is above 1"),
        ("meanflow", ["--guidance", "2"], "sample.guidance: needs a network that knows the null label"),
        ("meanflow", ["--interval", "0,1"], "sample.interval: is for networks that are told their guidance"),
        ("imf", ["--guidance", "0.5"], "sample.guidance: this network is told it, from 1"),
        ("imf", ["--interval", "0.5"], "sample.interval"),
        (
            "flow",
            ["--steps", "3"],
            "--steps: this config samples by Heun's method; set sample.heun_steps, or give --times",
        ),
        (
            "flow",
            ["--search-times", "3"],
            "--search-times: this config samples by Heun's method; set sample.solver=jumps",
        ),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(name, arguments, expected, runs, tmp_path, capsys):
    assert call(runs / name, "--num", 20, "--out", tmp_path / "o", *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_what_is_guided_in_training_is_not_guided_again():
    objective = {"name": "meanflow", "guidance": 2.0}
    with pytest.raises(config.ConfigError, match="guided in training"):
        config.parse({"data": {"conditional": True}, "objective": objective, "sample": {"guidance": 2.0}})


@pytest.mark.parametrize("name", ["meanflow", "imf"])
def test_editing(name, runs, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "in.png")

    def results(task, *arguments):
        out = tmp_path / f"{task}{len(list(tmp_path.iterdir()))}"
        settings = ["--cfg", f"{runs / name}/config.yml", "--ckpt", f"{runs / name}/checkpoints/last.ckpt"]
        settings += ["--input", str(tmp_path / "in.png"), "--class", "3", "--out", str(out), *arguments]
        assert edit.main([task, *settings]) == 0
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("in_*[0-9].png"))]

    a, b, *_ = results("inpaint", "--mask", "0,0,4,8", "--steps", "3")
    assert np.array_equal(a[:, 4:], picture[:, 4:]) and not np.array_equal(a, b)
    (first,), (second,) = (results("denoise", "--sigma", sigma) for sigma in ("0.01", "3"))
    assert np.abs(first - picture).mean() < 6 < np.abs(second - picture).mean()
    near, far = (results("stroke", "--num", "1", "--steps", "1", "--sigma", sigma)[0] for sigma in ("0.01", "5"))
    assert np.abs(near - picture).mean() < 6 < np.abs(far - picture).mean()
    means = lambda x: x.reshape(4, 2, 4, 2).mean((1, 3))  # noqa: E731
    (result,) = results("superres", "--factor", "2", "--num", "1", "--times", "1,0.8,0.3")
    inside = means(((result > 0) & (result < 255)).astype(float)) == 1
    assert inside.sum() > 3 and np.abs(means(result) - means(picture))[inside].max() < 1.1
    both = ["--input", str(tmp_path / "in.png"), str(tmp_path / "in.png"), "--num", "3"]
    assert edit.main([
        "interpolate", "--cfg", f"{runs / name}/config.yml", "--ckpt", f"{runs / name}/checkpoints/last.ckpt",
        *both, "--out", str(tmp_path / "i"),
    ]) == 0  # fmt: skip
    assert "evaluations each" in capsys.readouterr().out


def test_vectors(tmp_path, capsys):
    states = np.random.default_rng(0).standard_normal((400, 2)).astype(np.float32)
    np.savez(tmp_path / "v.npz", vectors=states[:, :1] + 0.1, conditions=states)
    data = {"name": "npz", "path": str(tmp_path / "v.npz"), "conditional": True}
    network = {"name": "mlp", "width": 16, "depth": 1}
    raw = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"}, "data": data, "network": network,
        "objective": {"name": "soflow"}, "metrics": {"at_end": False, "num": 100},
        "train": {"steps": 4, "batch_size": 32, "precision": "fp32"},
    }  # fmt: skip
    trainer.train(config.parse(raw))
    assert call(tmp_path / "run", "--num", 120, "--steps", 2, "--calc_fid", "--out", tmp_path / "o") == 0
    assert "score at 2 NFE: 2-Wasserstein distance" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["solver"] == "renoise"
