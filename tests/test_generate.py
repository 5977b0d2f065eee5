"""The sample-and-score command on a small run."""

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import generate
import trainer


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
    arrays = np.load(tmp_path / "npz" / "samples.npz")
    assert arrays["images"].shape == (5, 8, 8, 1) and arrays["images"].dtype == np.uint8 and len(arrays["labels"]) == 5
    files = sorted((tmp_path / "png").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    for file, image in zip(files, arrays["images"], strict=True):  # whatever the batch: within one level
        assert np.abs(pixels(file).astype(int) - image[..., 0]).max() <= 1
    assert min(pixels(tmp_path / "grid" / "grid.png").shape[:2]) >= 3 * 48
    assert "images/s" in capsys.readouterr().out


def test_steps_seeds_and_classes_matter(run, tmp_path):
    def images(name, *arguments):
        assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / name, *arguments) == 0
        return np.load(tmp_path / name / "samples.npz")

    one, two = images("a"), images("b", "--steps", 2)
    assert not np.array_equal(one["images"], two["images"])
    assert np.array_equal(two["images"], images("c", "--sigmas", "80,0.821")["images"])
    assert not np.array_equal(one["images"], images("d", "--seed", 1)["images"])
    assert images("e", "--class", 7)["labels"].tolist() == [7] * 4


def test_a_sample_is_from_the_ema(run, tmp_path):
    assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / "a") == 0
    assert call(run, "--num", 4, "--format", "npz", "--out", tmp_path / "b", "--ema", 1) == 0
    import checkpoint
    import data
    import sampler

    model = checkpoint.load_model(run / "checkpoints" / "last.ckpt")
    labels = sampler.draw_labels(0, range(4), model.class_counts)
    x = torch.cat(list(sampler.generate(model, 0, range(4), [80.0], labels=labels)))
    expected = data.to_uint8(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npz")["images"], expected)
    assert not np.array_equal(np.load(tmp_path / "b" / "samples.npz")["images"], expected)


@pytest.mark.parametrize("flag", [["--calc_fid"], ["--calc_fid=True"]])
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
    [["--num", "0"], ["--num", "x"], ["--steps", "1", "--sigmas", "80"], ["--calc_fid=maybe"], ["--nmu", "3"]],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(arguments, run, capsys):
    with pytest.raises(SystemExit) as stop:
        call(run, *arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
