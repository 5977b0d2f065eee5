"""Scores say of what they are, and are of it: a class, guidance, sweeps; classes by name; folders others can score."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from sklearn.datasets import load_digits

import config
import data
import edit
import generate
from metrics import scores
from training import trainer

NAMES = ("cat", "owl", "zebra")


def folder_of(path, counts):
    """A class a folder, of random pictures."""
    noise = np.random.default_rng(0)
    for name, count in zip(NAMES, counts, strict=True):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise.integers(0, 256, (8, 8)).astype(np.uint8)).save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digits with classes and a null label; two classes of pictures; digits without labels."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    cache = {"dir": str(folder / "data")}
    pictures = {"name": "folder", "path": str(folder_of(folder / "photos", (1, 12, 30)))}
    for name, section, network in (
        ("digits", {"conditional": True}, {"label_dropout": 0.2}),
        ("pictures", {**pictures, "conditional": True}, {}),
        ("free", {}, {}),
    ):
        trainer.train(tiny(folder / name, data={**cache, **section}, network=network, train={"lr": 0.02, "steps": 4}))
    return folder


def call(run, *arguments):
    return generate.main(["--cfg", f"{run}/config.yml", "--ckpt", f"{run}/checkpoints/last.ckpt", *map(str, arguments)])


def fid(text):
    return float(re.search(r"fid ([\d.e+-]+)", text)[1])


# One class ------------------------------------------------------------------------------------------------------------


def test_a_class_is_scored_against_its_own_images(tmp_path):
    cfg = tiny(tmp_path, data={"conditional": True})
    digits = data.load(cfg.data)
    threes = digits.images[digits.labels == 3]
    settings = config.Metrics(features="classifier", scores=["fid", "kid", "prc"], num=100)
    score = lambda **how: scores.score(threes, digits, settings, tmp_path, "cpu", log=lambda _: None, **how)  # noqa: E731
    own, whole, other = score(of_class=3), score(), score(of_class=4)
    assert own["fid"] < 1e-3 and own["recall"] == own["precision"] == 1
    assert whole["fid"] > 20 and other["fid"] > 20 and own == score(of_class=3)  # from the cache too
    assert score()["fid"] == pytest.approx(whole["fid"])


def test_the_command_scores_the_class_asked_for_and_says_so(runs, tmp_path, capsys):
    asked = ["--class", 3, "--num", 150, "--calc_fid"]
    assert call(runs / "digits", *asked, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert re.search(
        r"score at 1 NFE: fid [\d.]+ \(classifier features, 150 samples, class 3; against the 183 images", said
    )
    assert "of class 3 in digits, 8 pixels)" in said
    images = np.load(tmp_path / "a" / "samples" / "000000.npz")["images"].transpose(0, 3, 1, 2)
    cfg = config.load(runs / "digits" / "config.yml")
    digits, settings = data.load(cfg.data), cfg.metrics
    own = scores.score(torch.from_numpy(images), digits, settings, cfg.data.dir, "cpu", of_class=3)["fid"]
    whole = scores.score(torch.from_numpy(images), digits, settings, cfg.data.dir, "cpu")["fid"]
    assert fid(said) == pytest.approx(own, rel=1e-3) and abs(own - whole) > 0.05 * own


def test_guidance_sweep_and_whole_sets_are_named(runs, tmp_path, capsys):
    assert call(runs / "digits", "--guidance", 2, "--num", 100, "--calc_fid", "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "100 samples, guidance 2; against the 1,797 images of digits, 8 pixels)" in said
    assert (
        call(runs / "digits", "--sweep", "1,2", "--class", 3, "--guidance", 2, "--num", 60, "--out", tmp_path / "b")
        == 0
    )
    said = capsys.readouterr().out
    assert "60 samples, seed 0, class 3, guidance 2; classifier features, against the 183 images of class 3" in said
    np.savez(tmp_path / "n.npz", images=np.zeros((20, 8, 8, 1), np.uint8))
    assert generate.main(["--cfg", f"{runs}/digits/config.yml", "--samples", f"{tmp_path}/n.npz", "--calc_fid"]) == 0
    assert "20 samples; against the 1,797 images of digits" in capsys.readouterr().out


def test_training_names_what_its_score_is_of(tmp_path, capsys):
    trainer.train(tiny(tmp_path / "r", data={"dir": str(tmp_path / "data")}, metrics={"at_end": True}))
    assert "score at 1 NFE: fid" in (said := capsys.readouterr().out) and "against the 1,797 images of digits" in said


@pytest.mark.parametrize(
    ("features", "size"), [("inception", 299), ("dinov2", 224), ("clip", 224), ("classifier", None)]
)
def test_the_resize_of_the_features_is_named(features, size, tmp_path):
    digits = data.load(tiny(tmp_path).data)
    said = scores.reference(config.Metrics(features=features), digits)
    assert f"both resized to {size} pixels" in said if size else "resized" not in said


@pytest.mark.parametrize("command", [["--calc_fid"], ["--sweep", "1,2"], ["--search-sigmas", "2"]])
def test_references_without_classes_refuse_a_class(command, runs, tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    settings = [f"metrics.reference={tmp_path / 'ref.npz'}", "metrics.features=inception"]
    assert call(runs / "digits", "--class", 3, *command, *settings, "--out", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert "--class: " in said and "holds the statistics of all classes together" in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_data_without_labels_refuse_a_class(runs, tmp_path, capsys):
    images = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    np.savez(tmp_path / "bare.npz", images=images[..., None])
    settings = ["data.name=npz", f"data.path={tmp_path / 'bare.npz'}", "data.conditional=false"]
    assert call(runs / "pictures", "--class", 2, "--calc_fid", *settings, "--out", tmp_path / "o") == 2
    assert "--class: class 2 alone has no reference: the training set npz has no labels" in capsys.readouterr().err
    assert call(runs / "free", "--class", 3, "--calc_fid", "--out", tmp_path / "o") == 2
    assert "--class: this network was trained without labels" in capsys.readouterr().err


def test_another_sets_class_of_that_number_is_not_scored_against(runs, tmp_path, capsys):
    other = folder_of(tmp_path / "other", (12, 12, 12))
    (other / "owl").rename(other / "zoo")  # zebra is class 1 there
    asked = ["--class", "zebra", "--calc_fid", "--out", tmp_path / "o", f"data.path={other}"]
    assert call(runs / "pictures", *asked) == 2
    assert "--class: class 2 is zebra in the checkpoint and zoo in the training set" in capsys.readouterr().err


# Classes by name ------------------------------------------------------------------------------------------------------


def test_a_class_by_its_name(runs, tmp_path, capsys):
    asked = ["--num", 12, "--format", "npz"]
    assert call(runs / "pictures", *asked, "--class", "zebra", "--out", tmp_path / "a") == 0
    assert "class 2 (zebra)" in capsys.readouterr().out
    assert np.load(tmp_path / "a" / "samples" / "000000.npz")["labels"].tolist() == [2] * 12
    assert call(runs / "pictures", *asked, "--class", 2, "--out", tmp_path / "a") == 0  # the same command
    assert call(runs / "pictures", *asked, "--class", "zbra", "--out", tmp_path / "b") == 2
    said = capsys.readouterr().err
    assert "--class: zbra is no class of this network; it has 0 to 2, by name cat, owl, zebra" in said
    assert call(runs / "pictures", "--num", 20, "--class", "owl", "--calc_fid", "--out", tmp_path / "c") == 0
    said = capsys.readouterr().out
    assert f"class 1 (owl); against the 12 images of class 1 (owl) in {runs / 'photos'}, 8 pixels)" in said
    assert call(runs / "pictures", "--class", "cat", "--calc_fid", "--out", tmp_path / "d") == 2
    assert "--class: 1 training images of class 0 (cat) are too few to score against" in capsys.readouterr().err
    for wrong in ("-1", "3", "1.0", ""):
        assert call(runs / "pictures", *asked, f"--class={wrong}", "--out", tmp_path / "b") == 2
        assert (said := capsys.readouterr().err).count("\n") == 1 and "is no class" in said


def test_a_name_that_is_anothers_number_is_a_name():
    from types import SimpleNamespace

    from sampling import choices

    codec = SimpleNamespace(classes=["1", "10", "2"], class_counts=[5, 5, 5], network_shape={"label_dim": 3})
    ask = lambda text: choices.chosen_class(SimpleNamespace(class_index=text), codec)  # noqa: E731
    assert [ask(text) for text in ("1", "10", "2", "0")] == [0, 1, 2, 0]


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_a_class_without_training_images_is_refused(command, runs, tmp_path, capsys, monkeypatch):
    import checkpoints

    path = runs / "digits" / "checkpoints" / "last.ckpt"
    state = checkpoints.load(path)
    state["data"]["class_counts"][0] = 0
    monkeypatch.setattr(checkpoints, "load", lambda path: state)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    options = ["--cfg", f"{runs}/digits/config.yml", "--ckpt", str(path), "--out", f"{tmp_path}/o", "--class", "0"]
    if command == "generate":
        assert generate.main(options) == 2
    else:
        assert edit.main(["denoise", "--input", str(tmp_path / "a.png"), *options]) == 2
    assert "--class: class 0 had no training images" in capsys.readouterr().err


# Folders that others read ---------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_holds_samples_alone_and_their_labels(runs, tmp_path):
    out = tmp_path / "s"
    assert call(runs / "pictures", "--num", 30, "--format", "png", "--out", out) == 0
    assert {path.parent.name for path in out.rglob("*.png")} == {"000000"} and len(list(out.rglob("*.png"))) == 30
    with Image.open(tmp_path / "s-grid.png") as grid:
        assert grid.width > 8
    labels = json.loads((out / "samples" / "dataset.json").read_text())["labels"]
    assert [name for name, _ in labels] == [f"000000/{i:06d}.png" for i in range(30)]
    assert call(runs / "pictures", "--num", 30, "--format", "npz", "--out", tmp_path / "n") == 0
    assert [label for _, label in labels] == np.load(tmp_path / "n" / "samples" / "000000.npz")["labels"].tolist()

    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:  # EDM's dataset
        for path in sorted((out / "samples").rglob("*.*")):
            archive.write(path, path.relative_to(out / "samples"))
    cfg = tiny(tmp_path, data={"name": "zip", "path": str(tmp_path / "s.zip"), "conditional": True})
    assert data.load(cfg.data).labels.tolist() == [label for _, label in labels]
    assert generate.main(["--cfg", f"{runs}/pictures/config.yml", "--samples", str(out), "--calc_fid"]) == 0


def test_a_picture_beside_is_not_written_over(runs, tmp_path):
    (tmp_path / "s-grid.png").write_bytes(b"mine")
    assert call(runs / "free", "--num", 3, "--format", "png", "--out", tmp_path / "s") == 0
    assert (tmp_path / "s-grid.png").read_bytes() == b"mine"
    assert not (tmp_path / "s" / "samples" / "dataset.json").exists()  # no labels
