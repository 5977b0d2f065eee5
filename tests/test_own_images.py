"""Own images in one command: what is chosen for them and said, kept by the run, and gone round by what is set."""

import contextlib
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from test_data import encoded, pixels, write_folder

import config
import generate
import main
import networks
from config import ConfigError
from training import own_images, trainer
from training.own_images import choose_channels, choose_conditional, choose_length, choose_network, choose_resolution

CFG = Path(__file__).parent.parent / "configs" / "images.yml"


def values(choices):
    return {key: value for key, value, _ in choices}


# What is chosen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "count", "on_gpu", "size", "why"),
    [
        ([480] * 20, 500, False, 32, "32 is the most for a CPU"),
        ([480] * 20, 500, True, 64, "64 is the most for a GPU with fewer than 10,000"),
        ([480] * 20, 9_999, True, 64, "fewer"),
        ([480] * 20, 10_000, True, 128, "128 is the most for a GPU"),
        ([100] * 20, 10_000, True, 96, "100 pixels or more"),
        ([48] * 20, 500, True, 48, "48 pixels or more"),
        ([48] * 20, 500, False, 32, "most for a CPU"),
        ([10, 20, *[64] * 18], 500, True, 64, "64 pixels or more"),  # the smallest tenth are enlarged
        ([10, 20, 28, *[64] * 17], 500, True, 28, "28 pixels or more"),  # three of twenty are more than that
        ([31] * 5, 5, False, 28, "31 pixels or more"),
        ([8], 1, False, 8, "8 pixels or more"),
        ([5], 1, True, 8, "images of 5 pixels are enlarged"),
        ([5000], 1, False, 32, "5,000 pixels or more"),
    ],
)
def test_resolution(sides, count, on_gpu, size, why):
    key, value, reason = choose_resolution(sides, count, on_gpu)
    assert (key, value) == ("data.resolution", size) and why in reason


def test_the_shorter_side_counts():
    seen = own_images.Look("folder", "photos", 3, [(400, 28), (28, 400), (90, 31)], 3, {})
    assert values(own_images.choose(seen, None, on_gpu=True))["data.resolution"] == 28
    assert seen.said() == "photos: 3 images (folder): 400x28 to 90x31; 3 in colour, 0 grey"


def test_channels():
    assert choose_channels(1, 40)[1:] == (3, "1 of 40 have colours")
    assert choose_channels(0, 40)[1:] == (1, "all are grey")


@pytest.mark.parametrize(
    ("classes", "value", "why"),
    [
        ({}, False, "there are no labels"),
        ({"cats": 500}, False, "there is one class, cats"),
        ({"cats": 500, "dogs": 0}, False, "there is one class, cats"),
        ({"cats": 10, "dogs": 9}, False, "2 classes of 9.5 images each are too few"),
        ({"cats": 10, "dogs": 10}, True, "2 classes of 10 images each, to be asked for by --class"),
        ({"cats": 50, "owl": 1}, True, "--class; owl has 1, which will be copied"),
        ({f"day {i}": 3 for i in range(90)}, False, "90 classes of 3.0 images"),
    ],
)
def test_conditional(classes, value, why):
    key, chosen, reason = choose_conditional(classes)
    assert (key, chosen) == ("data.conditional", value) and why in reason


@pytest.mark.parametrize(
    ("resolution", "count", "on_gpu", "channels", "mult", "blocks", "attends"),
    [
        (8, 50, False, 32, [1, 2], 1, []),
        (28, 50, False, 32, [1, 2, 2], 1, []),
        (32, 50_000, False, 32, [1, 2, 2], 1, []),
        (64, 50_000, False, 16, [1, 2, 2, 2], 1, []),
        (31, 50, False, 32, [1], 1, []),
        (32, 9_999, True, 64, [1, 2, 2], 2, [16]),
        (64, 10_000, True, 128, [1, 2, 2, 2], 2, [16]),
        (28, 50, True, 64, [1, 2, 2], 2, [14]),
        (96, 10_000, True, 128, [1, 2, 2, 2, 2], 2, [12]),
        (128, 10_000, True, 128, [1, 1, 2, 2, 2], 2, [16]),
    ],
)
def test_network(resolution, count, on_gpu, channels, mult, blocks, attends):
    assert values(choose_network(resolution, count, on_gpu)) == {
        "network.model_channels": channels, "network.channel_mult": mult, "network.num_blocks": blocks,
        "network.attn_resolutions": attends,
    }  # fmt: skip


@pytest.mark.parametrize("resolution", [8, 12, 28, 31, 32, 48, 100, 128, 256])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_chosen_network_can_be_built_and_its_levels_halve(resolution, on_gpu):
    chosen = {key.split(".")[1]: value for key, value in values(choose_network(resolution, 50_000, on_gpu)).items()}
    with torch.device("meta"):
        networks.build(config.parse({"network": chosen}).network.model_dump(), resolution, 3, 0, 9)
    levels = range(len(chosen["channel_mult"]))
    assert resolution % 2 ** levels[-1] == 0
    assert set(chosen["attn_resolutions"]) <= {resolution >> level for level in levels}


def test_length():
    assert list(values(choose_length(32, 50_000, False)).values()) == [32, 2000]
    assert list(values(choose_length(16, 50, False)).values()) == [32, 8000]
    assert list(values(choose_length(64, 9_999, True)).values()) == [256, 20_000]
    assert list(values(choose_length(64, 10_000, True)).values()) == [256, 40_000]
    assert (own_images.in_words(80), own_images.in_words(780), own_images.in_words(9000)) == (
        "a minute", "13 minutes", "2.5 hours",
    )  # fmt: skip


# From a folder of mixed photographs to samples ------------------------------------------------------------------------


def photographs(root, count=24):
    """Parts of photographs, cut and resized unevenly, some grey, a broken file and a text."""
    rng, members = np.random.default_rng(0), {}
    for i in range(count):
        image = Image.fromarray(load_sample_images().images[i % 2])
        width, height = rng.integers(60, 400, 2)
        left, top = rng.integers(0, image.width - width), rng.integers(0, image.height - height)
        image = image.crop((left, top, left + width, top + height)).resize((max(40, width // 2), max(36, height // 2)))
        kind = ("png", "jpeg", "webp")[i % 3]
        members[f"{i:02}.{kind}"] = encoded(image.convert("L") if i % 4 == 0 else image, kind)  # webp has no grey
    write_folder(root, {**members, "broken.jpg": b"\xff\xd8\xff\xe0 cut", "notes.txt": b"a text"})


def command(tmp_path, *more):
    place = [f"data.path={tmp_path / 'photos'}", f"data.dir={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}"]
    return ["--cfg", str(CFG), *place, "run.device=cpu", "train.precision=fp32", "sample.grid=4", *more]


SMALL = ("train.batch_size=4", "train.log_every=1", "sample.every=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three steps on mixed photographs, and what was said."""
    tmp_path, said = tmp_path_factory.mktemp("own"), io.StringIO()
    photographs(tmp_path / "photos")
    with contextlib.redirect_stdout(said):
        assert main.main(command(tmp_path, "train.steps=3", *SMALL)) == 0
    return tmp_path, said.getvalue()


def test_a_folder_of_mixed_photographs_trains_from_the_one_command(trained):
    tmp_path, said = trained
    for words in (
        "photos: 25 images (folder): ", "; 20 in colour, 4 grey; 1 broken",
        "data.name: folder  # ", "data.resolution: 32  # nine in ten images have ", "; 32 is the most for a CPU",
        "data.channels: 3  # 20 of 24 have colours", "data.conditional: false  # there are no labels",
        "network.model_channels: 32  # a CPU", "network.channel_mult: [1, 2, 2]  # levels of 32, 16, 8 pixels",
        "network.num_blocks: 1  # ", "network.attn_resolutions: []  # ",
        "warning: 25 images are few: the model may memorise and copy them", "--nearest",
        "left out: 1 .txt, 1 broken", "3 steps of about", "this will take about",
    ):  # fmt: skip
        assert words in said, words
    assert "train.steps: " not in said and "train.batch_size: " not in said  # they were set
    kept = yaml.safe_load((tmp_path / "run" / "config.yml").read_text())
    assert (kept["data"]["name"], kept["data"]["resolution"], kept["data"]["channels"]) == ("folder", 32, 3)
    assert kept["data"]["conditional"] is False and kept["network"]["channel_mult"] == [1, 2, 2]
    assert (kept["train"]["steps"], kept["train"]["batch_size"]) == (3, 4)


def test_samples_and_their_nearest_come_from_the_run_folder(trained, capsys):
    run = trained[0] / "run"
    ckpt = run / "checkpoints" / "last.ckpt"
    words = ["--cfg", str(run / "config.yml"), "--ckpt", str(ckpt), "--num", "16", "--nearest"]
    assert generate.main([*words, "--out", str(trained[0] / "out")]) == 0
    assert "copies: " in capsys.readouterr().out and (trained[0] / "out" / "nearest.png").exists()
    assert generate.main(["--cfg", str(CFG), "--ckpt", str(ckpt), "run.device=cpu"]) == 2
    assert "use the config.yml beside it" in capsys.readouterr().err


def test_a_run_goes_on_with_its_choices_though_the_folder_grew(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    write_folder(tmp_path / "photos", {f"grey{i:03}.png": encoded(x) for i, x in enumerate(pixels(80, 12, 1))})
    changed = own_images.look(config.load(CFG, [f"data.path={tmp_path / 'photos'}"]), "data.name")
    assert values(own_images.choose(changed, None, False))["data.resolution"] == 12  # a new run's
    more = ["train.steps=3", *SMALL, "--resume"]
    assert main.main(command(tmp_path, *more)) == 2
    assert "104 images, were 24" in capsys.readouterr().err
    assert main.main(command(tmp_path, *more, "--other-data")) == 0
    said = capsys.readouterr().out
    assert "32x32 RGB" in said and "chosen" not in said and "this will take" not in said
    kept = config.load(tmp_path / "run" / "config.yml")
    assert (kept.data.resolution, kept.network.channel_mult, kept.train.steps) == (32, [1, 2, 2], 3)
    assert main.main(["--cfg", str(tmp_path / "run" / "config.yml"), "--resume", "--other-data"]) == 0


def test_what_is_set_wins(tmp_path):
    photographs(tmp_path / "photos")
    given = ["data.resolution=16", "data.channels=1", "network.model_channels=8", "network.attn_resolutions=[8]"]
    cfg = config.load(CFG, [f"data.path={tmp_path / 'photos'}", "run.device=cpu", "train.steps=7", *given])
    cfg, lines = own_images.settle(cfg, resume=False)
    assert (cfg.data.resolution, cfg.data.channels, cfg.network.model_channels) == (16, 1, 8)
    assert (cfg.network.attn_resolutions, cfg.train.steps) == ([8], 7)
    assert (cfg.network.channel_mult, cfg.network.num_blocks, cfg.train.batch_size) == ([1, 2], 1, 32)  # of 16 pixels
    assert [line.split(":")[0].strip() for line in lines[2:7]] == [
        "data.name", "data.conditional", "network.channel_mult", "network.num_blocks", "train.batch_size",
    ]  # fmt: skip


def test_timing_moves_nothing(tmp_path):
    photographs(tmp_path / "photos", 6)
    cfg, _ = own_images.settle(config.load(CFG, command(tmp_path, "train.steps=3", *SMALL)[2:]), resume=False)
    run = trainer.Trainer(cfg)
    batch = run.dataset.read(torch.arange(4))
    before = {name: value.clone() for name, value in run.train_step.model.state_dict().items()}
    own_images.how_long(run.train_step, run.dataset)
    assert all(torch.equal(value, before[name]) for name, value in run.train_step.model.state_dict().items())
    assert (run.train_step.step, dict(run.train_step.sums)) == (0, {})
    other = trainer.Trainer(cfg)
    for one in (run, other):
        one.train_step(*batch)
    state = other.train_step.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.train_step.model.state_dict().items())


# Other sets, and what cannot be used ----------------------------------------------------------------------------------


def settled(path, *overrides):
    return own_images.settle(config.load(CFG, [f"data.path={path}", "run.device=cpu", *overrides]), resume=False)


def test_class_folders_are_classes_and_a_zip_is_read_as_one(tmp_path):
    members = {f"{name}/{i}.png": encoded(x) for name in ("cats", "owls") for i, x in enumerate(pixels(12, 40))}
    write_folder(tmp_path / "a", members)
    cfg, lines = settled(tmp_path / "a")
    assert cfg.data.conditional is True and "2 classes of 12 images" in "\n".join(lines)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    cfg, lines = settled(tmp_path / "a.zip")
    assert (cfg.data.name, cfg.data.conditional) == ("zip", False) and "no labels" in "\n".join(lines)


def test_digits_are_chosen_for_too():
    cfg, lines = own_images.settle(config.load(CFG, ["data.name=digits", "data.path=", "run.device=cpu"]), resume=False)
    assert (cfg.data.resolution, cfg.data.channels, cfg.data.conditional) == (8, 1, True)
    assert cfg.network.channel_mult == [1, 2] and not any("memorise" in line for line in lines)


def test_a_config_without_nulls_is_left_alone():
    cfg = config.load(CFG.parent.parent / "config.yml")
    assert own_images.settle(cfg, resume=False) == (cfg, [])


def test_memory_is_warned_of_below_a_thousand_images(tmp_path):
    for count, warned in ((999, True), (1000, False)):
        write_folder(tmp_path / str(count), {f"{i}.png": encoded(np.zeros((8, 8), np.uint8)) for i in range(count)})
        assert any("memorise" in line for line in settled(tmp_path / str(count))[1]) == warned


def test_two_images_and_a_huge_one_are_taken(tmp_path):
    write_folder(tmp_path / "two", {f"{i}.png": encoded(x) for i, x in enumerate(pixels(2, 6))})
    cfg, lines = settled(tmp_path / "two")
    assert cfg.data.resolution == 8 and "images of 6 pixels are enlarged" in "\n".join(lines)
    assert lines[-1] == "warning: 2 images are too few: the model can only copy; add hundreds"
    (tmp_path / "huge").mkdir()
    Image.new("L", (5000, 5000), 90).save(tmp_path / "huge" / "a.png")
    cfg, lines = settled(tmp_path / "huge")
    assert (cfg.data.resolution, cfg.data.channels) == (32, 1) and "1 image is too few" in lines[-1]


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "broken", {"a.png": b"no", "b.png": b"no"})
    write_folder(tmp_path / "split", {f"{part}/a.png": encoded(pixels(1)[0]) for part in ("train", "val")})
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    np.savez(tmp_path / "v.npz", vectors=np.zeros((4, 3), np.float32))
    for name, *overrides, words in (
        ("nothing", "does not exist; set it to your images"),
        ("empty", "holds no images"),
        ("broken", "none of the 2 images"),
        ("split", "parts of a split"),
        ("a.pdf", "is no folder and no .zip"),
        ("v.npz", "data.augment=0.0", "data.name: null is chosen by images"),
        ("split/train", "network.label_dropout=0.1", "network.label_dropout: there are no labels"),
        ("broken", "data.on_broken=fail", "data.on_broken: skip"),
    ):
        with pytest.raises(ConfigError) as info:
            settled(tmp_path / name, *overrides)
        assert words in str(info.value) and "\n" not in str(info.value), str(info.value)
    with pytest.raises(ConfigError, match=r"images\.yml:\d+: network.model_channels: .* found None|no such setting"):
        settled(tmp_path / "split/train", "network.name=dhariwal_unet")
    with pytest.raises(ConfigError, match=r"command line: data\.path: set it to your images"):
        config.load(CFG, ["data.path="])
