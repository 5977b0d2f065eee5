"""The sample-and-score command on a small run."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from sklearn.datasets import load_digits

import generate
from metrics import classifier
from sampling import drawing, samples, shards
from training import trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny(folder / "r", data={"conditional": True, "dir": str(folder / "data")}, train={"lr": 0.02, "steps": 12})
    trainer.train(cfg)
    return folder / "r"


def call(run, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", *map(str, arguments)])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_formats(run, tmp_path, capsys):
    assert call(run, "--num", 5, "--out", tmp_path / "png", "--format", "png", "--seed", 3) == 0
    assert call(run, "--num", 5, "--out", tmp_path / "npz", "--format", "npz", "--seed", 3, "--batch", 2) == 0
    assert call(run, "--num", 9, "--out", tmp_path / "grid", "--seed", 3) == 0
    arrays = np.load(tmp_path / "npz" / "samples" / "000000.npz")
    assert arrays["images"].shape == (5, 8, 8, 1) and arrays["images"].dtype == np.uint8 and len(arrays["labels"]) == 5
    files = sorted((tmp_path / "png" / "samples" / "000000").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    for file, image in zip(files, arrays["images"], strict=True):  # whatever the batch: within one level
        assert np.abs(pixels(file).astype(int) - image[..., 0]).max() <= 1
    assert min(pixels(tmp_path / "grid" / "grid.png").shape[:2]) >= 3 * 48
    assert "images/s" in capsys.readouterr().out


def test_steps_seeds_and_classes_matter(run, tmp_path):
    def images(name, *arguments):
        assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / name, *arguments) == 0
        return np.load(tmp_path / name / "samples" / "000000.npz")

    one, two = images("a"), images("b", "--steps", 2)
    assert not np.array_equal(one["images"], two["images"])
    assert np.array_equal(two["images"], images("c", "--sigmas", "80,0.821")["images"])
    assert not np.array_equal(one["images"], images("d", "--seed", 1)["images"])
    assert images("e", "--class", 7)["labels"].tolist() == [7] * 4


def test_a_sample_is_from_the_ema(run, tmp_path):
    assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / "a") == 0
    assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / "b", "--ema", 1) == 0
    import checkpoints
    from sources.images import draw_labels

    model = checkpoints.load_model(run / "checkpoints" / "last.ckpt")
    labels = draw_labels(0, range(4), model.codec.class_counts)
    x = torch.cat(list(drawing.generate(model, 0, range(4), [80.0], given=labels)))
    expected = model.codec.from_model(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "a" / "samples" / "000000.npz")["images"], expected)
    assert not np.array_equal(np.load(tmp_path / "b" / "samples" / "000000.npz")["images"], expected)


@pytest.mark.parametrize("flag", [["--calc_fid", "metrics.scores=[fid]"], ["--calc_fid=True"]])
def test_scores(flag, run, tmp_path, capsys):
    assert call(run, "--num", 150, "--out", tmp_path / "s", *flag) == 0
    assert "score at 1 NFE: fid" in (said := capsys.readouterr().out) and "classifier features, 150 samples" in said


def test_new_samples_never_replace_old_ones(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"mine")
    assert call(run, "--num", 2, "--out", tmp_path / "mine") == 2
    assert "already holds something" in capsys.readouterr().err
    assert call(run, "--num", 2) == 0 and call(run, "--num", 2) == 0
    assert sorted(p.name for p in (run / "generated").iterdir())[:2] == ["000", "001"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--class", 10], "--class: 10 is no class of this network; it has 0 to 9"),
        (["--sigmas", "80,90"], "--sigmas: [80.0, 90.0] must descend"),
        (["--sigmas", "100"], "--sigmas: 100.0 is above network.sigma_max (80.0)"),
        (
            ["--steps", "3", "sample.solver=heun"],
            "--steps: this config samples by Heun's method; set sample.heun_steps",
        ),
        (
            ["network.model_channels=12"],
            "was trained with another network: network.model_channels is 8 there and 12 here",
        ),
        (["--ema", 2], "has 2 averages, no number 2"),
        (["data.resolution=16", "--calc_fid"], "data: is 1x16x16 and the checkpoint's 1x8x8"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(arguments, expected, run, tmp_path, capsys):
    assert call(run, "--num", 2, "--out", tmp_path / "o", *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num", "0"],
        ["--num", "x"],
        ["--sigmas", "nan"],
        ["--steps", "1", "--sigmas", "80"],
        ["--calc_fid=maybe"],
        ["--nmu", "3"],
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(arguments, run, capsys):
    with pytest.raises(SystemExit) as stop:
        call(run, *arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# Many samples: on disk, piece by piece, whatever stops and however many take part


def kept(folder):
    """Every sample in a folder, in order: uint8 (N, H, W)."""
    files = sorted(path for path in (folder / "samples").rglob("0*.*") if path.is_file())
    if files[0].suffix == ".png":
        return np.stack([pixels(file) for file in files])
    return np.concatenate([np.load(file)["images"][..., 0] for file in files])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 20)


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_stopped_run_goes_on(run, tmp_path, monkeypatch, capsys, small_shards, format):
    asked = ["--num", 50, "--format", format, "--seed", 5, "--batch", 8]
    assert call(run, *asked, "--out", tmp_path / "whole") == 0
    write, draw, drawn = samples.ImageSamples.write, drawing.Drawing.draw, []

    def stop_in_the_second(kind, images, labels, start, path):
        if start == 20:
            monkeypatch.setattr(samples.ImageSamples, "write", write)
            (path.parent / f".{path.name}.part").mkdir()  # as a killed process leaves it
            raise KeyboardInterrupt
        write(kind, images, labels, start, path)

    monkeypatch.setattr(samples.ImageSamples, "write", stop_in_the_second)
    assert call(run, *asked, "--out", tmp_path / "parts") == 130
    assert "--out" in capsys.readouterr().err and len(kept(tmp_path / "parts")) == 20
    assert generate.main(["--cfg", f"{run}/config.yml", "--samples", f"{tmp_path}/parts", "--calc_fid"]) == 2
    assert "finish it first" in capsys.readouterr().err

    monkeypatch.setattr(
        drawing.Drawing, "draw", lambda self, start, stop: (drawn.append((start, stop)), draw(self, start, stop))[1]
    )
    assert call(run, *asked, "--out", tmp_path / "parts") == 0
    assert drawn == [(20, 40), (40, 50)]
    assert np.array_equal(kept(tmp_path / "parts"), kept(tmp_path / "whole"))
    assert not [path for path in (tmp_path / "parts").rglob("*.part") if any(path.iterdir())]
    assert call(run, *asked, "--out", tmp_path / "parts") == 0  # again: nothing is left to do
    assert len(drawn) == 2 and "all were there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--seed", 1], "seed is 0 there and 1 here"),
        (["--num", 40], "num is 30 there and 40 here"),
        (["--sigmas", "80,1"], "sigmas is [80.0] there and [80.0, 1.0] here"),
        (["--ema", 1], "weights is"),
        (["--class", 3], "labels is"),
        (["--format", "png"], "format is 'npz' there and 'png' here"),
    ],
)
def test_another_command_does_not_go_on(run, tmp_path, capsys, other, named):
    first = ["--num", 30, "--format", "npz", "--out", tmp_path / "o"]
    assert call(run, *first) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert call(run, *first, *other) == 2
    said = capsys.readouterr().err
    assert "holds samples of another command: " + named in said and said.count("\n") == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_damaged_manifest_is_named(run, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    assert call(run, "--num", 500, "--out", tmp_path) == 2
    assert "manifest.json: cannot be read" in capsys.readouterr().err


def test_two_processes_make_the_images_of_one(run, tmp_path):
    asked = ["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", "--num", "1100", "--format", "npz"]
    assert generate.main([*asked, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    done = subprocess.run(
        [*launch, "generate.py", *asked, "--out", str(tmp_path / "two"), "--calc_fid"],
        cwd=Path(generate.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("score at 1 NFE: fid") == 1
    assert np.array_equal(kept(tmp_path / "one"), kept(tmp_path / "two"))
    (rate,) = re.findall(r"1,100 samples, .*: ([\d,]+) images/s on each of 2 x cpu", done.stdout)
    assert int(rate.replace(",", "")) > 0


def test_no_more_than_a_shard_is_held(run, tmp_path, monkeypatch):
    """2,000 samples in shards of 100: the tensors of 8x8 grey images alive at any time, training set aside."""
    monkeypatch.setattr(shards, "SHARD", 100)
    calls, seen = [], []

    def count_images():
        calls.append(1)
        if len(calls) % 7:  # looking through every object takes a while
            return
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 4 and o.shape[1:] == (1, 8, 8)]
        alive = {o.data_ptr(): len(o) for o in alive if len(o) != 1797}
        seen.append(sum(alive.values()))

    read, write = samples.read_npz, samples.ImageSamples.write
    update = classifier.ClassifierFeatures.forward
    monkeypatch.setattr(samples.ImageSamples, "write", lambda *args: (count_images(), write(*args))[1])
    monkeypatch.setattr(samples, "read_npz", lambda *args: (count_images(), read(*args))[1])
    monkeypatch.setattr(
        classifier.ClassifierFeatures,
        "forward",
        lambda self, x: (count_images(), update(self, x))[1] if len(x) else None,
    )
    asked = ["--num", 2000, "--batch", 50, "--calc_fid"]
    assert call(run, *asked, "--out", tmp_path / "o") == 0
    assert len(calls) >= 20 + 2 * 20 + 2000 / 64 and max(seen) >= 100  # it does see images
    assert max(seen) <= 100 + 2 * 64 + 400  # a shard, the scorer's batches, the grid


# Images made elsewhere


def given(run, path, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--samples", str(path), *map(str, arguments)])


def figure(text):
    return float(re.search(r"fid ([\d.e+-]+)", text)[1])


def test_given_samples_score_as_drawn_ones(run, tmp_path, capsys, small_shards):
    assert call(run, "--num", 110, "--out", tmp_path / "npz", "--calc_fid") == 0
    assert call(run, "--num", 110, "--out", tmp_path / "png", "--format", "png") == 0
    expected = figure(capsys.readouterr().out)
    images = kept(tmp_path / "png")
    np.savez(tmp_path / "nhwc.npz", images=images[..., None])
    np.savez(tmp_path / "nchw.npz", np.repeat(images[:, None], 3, 1))  # grey, saved as RGB
    (tmp_path / "rgb").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).convert("RGB").save(tmp_path / "rgb" / f"{i}.png")
    places = ["npz", "png", "npz/samples", "png/samples", "nhwc.npz", "nchw.npz", "rgb"]
    for place in places:
        assert given(run, tmp_path / place, "--calc_fid") == 0
        said = capsys.readouterr().out
        assert figure(said) == pytest.approx(expected, rel=2e-3) and "110 samples" in said, place


def test_nearest_counts_copies(run, tmp_path, capsys):
    training = load_digits().images[:40]
    images = np.rint(training * 255 / 16).astype(np.uint8)
    images[7:] = np.random.default_rng(0).integers(0, 256, images[7:].shape)
    np.savez(tmp_path / "mixed.npz", images=images[..., None])
    assert given(run, tmp_path / "mixed.npz", "--nearest", "--out", tmp_path / "o") == 0
    assert "copies: 7 of 40 samples (17.5%)" in capsys.readouterr().out
    picture = pixels(tmp_path / "o" / "nearest.png").astype(int)
    red = (picture[..., 0] - picture[..., 1]) > 100
    assert red.any(1).sum() > 40 and red.any(0).sum() > 40
    frame = 54**2 - 48**2
    assert red.sum() == 7 * frame


@pytest.mark.parametrize(
    ("path", "arguments", "expected"),
    [
        ("none", ["--calc_fid"], "--samples: "),
        ("text.npz", ["--calc_fid"], "cannot be read as an npz of images"),
        ("float.npz", ["--calc_fid"], "give uint8"),
        ("empty", ["--calc_fid"], "holds no images"),
        ("good.npz", [], "--samples: say what to do with them"),
        ("good.npz", ["--calc_fid", "--num", 5], "--num: is for sampling from a checkpoint"),
        ("good.npz", ["--calc_fid", "--class", 5], "--class: is for sampling from a checkpoint"),
        ("good.npz", ["--calc_fid", "--ckpt", "x"], "--ckpt: give a checkpoint to sample from, or --samples"),
    ],
)
def test_samples_that_cannot_be_scored(run, tmp_path, capsys, path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no array")
    np.savez(tmp_path / "float.npz", images=np.zeros((20, 8, 8, 1)))
    np.savez(tmp_path / "good.npz", images=np.zeros((20, 8, 8, 1), np.uint8))
    assert given(run, tmp_path / path, *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_samples_of_another_size_get_no_score(run, tmp_path, capsys):
    np.savez(tmp_path / "big.npz", images=np.zeros((20, 16, 16, 1), np.uint8))
    assert given(run, tmp_path / "big.npz", "--calc_fid") == 1
    assert given(run, tmp_path / "big.npz", "--nearest", "--out", tmp_path / "o") == 1
    assert capsys.readouterr().err.count("both must be alike") == 2


def test_a_stream_reads_in_any_order_and_each_piece_once():
    images, reads = torch.arange(10, dtype=torch.uint8)[:, None, None, None], []
    parts = images.split([3, 4, 3])
    stream = drawing.Stream(lambda i: (reads.append(i), parts[i])[1], [3, 4, 3])
    assert len(stream) == 10
    assert stream.batch(torch.tensor([9, 0, 4, 4, 2, 7])).flatten().tolist() == [9, 0, 4, 4, 2, 7]
    assert reads == [0, 1, 2]
    assert stream.batch(torch.tensor([8])).flatten().tolist() == [8] and reads == [0, 1, 2]
