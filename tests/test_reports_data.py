"""What users ran into with their data (issue 14): read as meant, or refused in one line, and always said."""

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import decode, encoded, one_line, pixels, settings, take, write_folder, write_mnist, write_zip

import config
import data
from config import ConfigError
from sources import codecs, files, finding
from sources.labels import class_numbers


def refused(values: object, *words: str) -> None:
    with pytest.raises(ConfigError) as info:
        data.load(values)
    one_line(info, *words)


def made(root: Path, *names: str, size: int = 8) -> None:
    write_folder(root, {name: encoded(x) for name, x in zip(names, pixels(len(names), size), strict=True)})


# Pixels: one resize for every source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "to"), [(32, 28), (32, 8), (28, 64), (33, 17), (200, 16)])
def test_folder_zip_and_npz_give_the_same_pixels(tmp_path, size, to, channels):
    images = pixels(6, size, channels)
    members = {f"{i}.png": encoded(x) for i, x in enumerate(images)}
    write_folder(tmp_path / "images", members)
    np.savez(tmp_path / "a.npz", images=images)
    folder = data.load(settings(tmp_path, resolution=to)).images
    archive = data.load(settings(tmp_path, name="zip", path=write_zip(tmp_path / "a.zip", members), resolution=to))
    arrays = data.load(settings(tmp_path, name="npz", path=str(tmp_path / "a.npz"), resolution=to)).images
    assert torch.equal(folder, archive.images) and torch.equal(folder, arrays)
    there = [np.asarray(Image.fromarray(x.squeeze()).resize((to, to), Image.Resampling.LANCZOS)) for x in images]
    assert np.array_equal(folder.permute(0, 2, 3, 1).squeeze(-1).numpy(), there)


def test_a_large_jpeg_is_what_its_pixels_are(tmp_path):
    ramp = np.add.outer(np.arange(640), np.arange(640)) % 256
    jpeg = encoded(np.stack([ramp] * 3, 2).astype(np.uint8), "jpeg", quality=90)
    write_folder(tmp_path / "images", {"a.jpg": jpeg})
    (tmp_path / "b.jpg").write_bytes(jpeg)
    np.savez(tmp_path / "a.npz", images=np.asarray(Image.open(tmp_path / "b.jpg"))[None])
    arrays = data.load(settings(tmp_path, name="npz", path=str(tmp_path / "a.npz"), resolution=32)).images
    assert torch.equal(data.load(settings(tmp_path, resolution=32)).images, arrays)


def test_a_thin_line_keeps_its_brightness_wherever_it_is(tmp_path):
    """Of adaptive pooling, which the arrays went through, a line lost half or nothing by its place."""
    lines = np.zeros((32, 32, 32), np.uint8)
    lines[np.arange(32), :, np.arange(32)] = 255
    np.savez(tmp_path / "a.npz", images=lines)
    out = data.load(settings(tmp_path, name="npz", path=str(tmp_path / "a.npz"), resolution=28)).images.float()
    sums = out[2:-2, 0, 14].sum(1)
    assert sums.max() < 1.2 * sums.min()


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_at_28_is_mnist(tmp_path, name, kind):
    images, _ = write_mnist(tmp_path / "data" / kind / "raw")
    dataset = data.load(settings(tmp_path, name=name, path=None, resolution=28))
    assert np.array_equal(dataset.images[:, 0].numpy(), images) and dataset.resize is None
    thirty = data.load(settings(tmp_path, name=name, path=None, resolution=30))
    assert np.array_equal(thirty.images[:, 0, 1:29, 1:29].numpy(), images) and thirty.resize == "padded from 28x28"
    classes = dataset.facts()["classes"]
    assert list(classes)[:2] == (["0", "1"] if name == "mnist" else ["T-shirt/top", "Trouser"])


@pytest.mark.parametrize("name", ["folder", "zip", "npz"])
def test_images_that_are_not_square_need_a_resolution_whatever_they_come_from(tmp_path, name):
    wide = pixels(2, 12)[:, :8]
    members = {f"{i}.png": encoded(x) for i, x in enumerate(wide)}
    write_folder(tmp_path / "images", members)
    np.savez(tmp_path / "a.npz", images=wide)
    path = {"folder": str(tmp_path / "images"), "npz": str(tmp_path / "a.npz")}.get(name)
    path = path or write_zip(tmp_path / "a.zip", members)
    refused(settings(tmp_path, name=name, path=path), "data.resolution", "12 x 8 pixels, not square")
    dataset = data.load(settings(tmp_path, name=name, path=path, resolution=8))
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), wide[:, :, 2:10])
    assert "resized from 12x8" in dataset.said()[0]


# 16 bits --------------------------------------------------------------------------------------------------------------


def test_12_bits_in_16_are_warned_of_and_can_be_read(tmp_path):
    deep = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)
    write_folder(tmp_path / "images", {"a.png": encoded(Image.fromarray(deep))})
    dark = data.load(settings(tmp_path))
    assert dark.images.max() == 16
    (warning,) = dark.said()[1:]
    assert "no image exceeds 6% of the 16-bit range" in warning and "data.white_level=4095" in warning
    (lazy,) = data.load(settings(tmp_path, memory_gb=0.0)).said()[1:]
    assert lazy == warning
    bright = data.load(settings(tmp_path, white_level=4095))
    assert np.array_equal(bright.images[0, 0].numpy(), np.rint(deep / 4095 * 255)) and len(bright.said()) == 1


@pytest.mark.parametrize(("bits", "level"), [(10, 1023), (14, 16383)])
def test_the_advice_is_for_the_bits_that_there_are(tmp_path, bits, level):
    write_folder(tmp_path / "images", {"a.png": encoded(Image.fromarray(np.full((8, 8), level, np.uint16)))})
    assert f"data.white_level={level}" in data.load(settings(tmp_path)).said()[1]


def test_arrays_that_use_little_of_their_range_are_warned_of(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(4) // 64)  # 0 to 3, as of a segmentation
    values = settings(tmp_path, name="npz", path=str(tmp_path / "a.npz"))
    assert "no image exceeds 1% of the range" in data.load(values).said()[1]
    values.white_level = 4095
    refused(values, "data.white_level", "npz")


def tiff(values: np.ndarray, photometric: int = 1, sample_format: int = 1, bits: int = 16) -> bytes:
    """A grey TIFF, by hand: PIL writes neither signed nor white-is-zero ones."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: height}
    tags |= {279: values.nbytes, 339: sample_format}
    rows = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4)
    return head.ljust(200, b"\0") + values.tobytes()


def test_signed_and_white_is_zero_tiffs(tmp_path):
    values = np.linspace(-32768, 32767, 64).reshape(8, 8).round().astype(np.int16)
    signed = decode(tmp_path, tiff(values, sample_format=2))[0]
    assert np.array_equal(signed, np.rint((values.astype(float) + 32768) / 257))
    deep = np.arange(0, 65536, 1024).reshape(8, 8).astype(np.uint16)
    assert np.array_equal(decode(tmp_path, tiff(deep))[0], np.rint(deep / 257))
    grey = deep.astype(np.uint8)
    assert np.array_equal(decode(tmp_path, tiff(grey, photometric=0, bits=8))[0], 255 - grey)  # PIL's own turn
    assert np.array_equal(decode(tmp_path, tiff(deep, photometric=0))[0], 255 - np.rint(deep / 257))
    write_folder(tmp_path / "images", {"a.png": encoded(Image.fromarray(np.full((8, 8), 2**20, np.int32)), "tiff")})
    refused(settings(tmp_path), "a.png", "integers of 32 bits")


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "other"),
    [("train", "val"), ("training", "valid"), ("Train", "test"), ("train2017", "val2017"), ("seg_train", "seg_test"),
     ("trainA", "testA"), ("train_images", "test_images"), ("trainingSet", "testSet"), ("train", "validation")],
)  # fmt: skip
@pytest.mark.parametrize("conditional", [True, False])
def test_splits_above_the_classes_are_refused(tmp_path, train, other, conditional):
    made(tmp_path / "images", *(f"{part}/{name}.png" for part in (train, other) for name in ("cat/a", "dog/b")))
    values = settings(tmp_path, conditional=conditional)
    refused(values, train, other, f"set data.path to {tmp_path / 'images' / train}")
    shutil.move(tmp_path / "images", tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "images" / "set")  # the same, one deeper
    refused(values, f"set data.path to {tmp_path / 'images' / 'set' / train}")
    assert list(data.load(settings(tmp_path, path=str(tmp_path / "images" / "set" / train))).facts()["classes"]) == [
        "cat",
        "dog",
    ]


def test_splits_below_the_classes_and_in_a_zip_are_refused(tmp_path):
    names = [f"{kind}/{part}/{i}.png" for kind in ("cat", "dog") for part in ("test", "train") for i in range(2)]
    made(tmp_path / "images", *names)
    refused(settings(tmp_path), "images/cat holds test and train", "keep the images of train alone")
    path = write_zip(tmp_path / "a.zip", {name: encoded(pixels(1)[0]) for name in ("train/a.png", "test/b.png")})
    refused(settings(tmp_path, name="zip", path=path), "test and train", "keep the images of train alone")


def test_a_class_called_train_is_a_class(tmp_path):
    made(tmp_path / "images", "train/a.png", "car/b.png", "bullet_train/c.png", "crash_test/d.png")
    classes = data.load(settings(tmp_path, conditional=True)).facts()["classes"]
    assert classes == {"bullet_train": 1, "car": 1, "crash_test": 1, "train": 1}


def test_a_folder_around_the_classes_is_left_for_them(tmp_path):
    made(tmp_path / "images", *(f"photos/train/{name}" for name in ("owl/a.png", "cat/b.png", "cat/c.png")))
    write_folder(tmp_path / "images", {"photos/README.md": b"x", "__MACOSX/photos/._a.png": b"x"})
    (tmp_path / "images" / "photos" / "train" / "dog").mkdir()
    dataset = data.load(settings(tmp_path, conditional=True))
    assert dataset.labels.tolist() == [0, 0, 1] and dataset.codec(parsed(conditional=True)).classes == ["cat", "owl"]
    (line,) = dataset.said()
    assert f"from {tmp_path / 'images' / 'photos' / 'train'}, 2 classes: cat 2, owl 1" in line
    assert line.endswith("; left out: 1 .md, 1 empty folder")
    shutil.rmtree(tmp_path / "images" / "photos" / "train" / "owl")
    assert data.load(settings(tmp_path, conditional=True)).class_names == ["cat"]  # the class is no wrapping


def test_images_beside_class_folders_are_named(tmp_path):
    made(tmp_path / "images", "cat/a.png", "dog/b.png", "loose.png")
    refused(settings(tmp_path, conditional=True), "loose.png lies beside the class folders")
    assert len(data.load(settings(tmp_path))) == 3


def test_links_to_class_folders_are_classes_and_circles_are_not(tmp_path):
    made(tmp_path / "images", "cat/a.png", "dog/b.png")
    made(tmp_path / "elsewhere", "fox/c.png", "fox/deep/d.png", "owl/e.png")
    for name in ("fox", "owl"):
        (tmp_path / "images" / name).symlink_to(Path("..") / "elsewhere" / name)
    (tmp_path / "elsewhere" / "fox" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "cat" / "all").symlink_to(tmp_path)
    dataset = data.load(settings(tmp_path, conditional=True))
    assert dataset.facts()["classes"] == {"cat": 1, "dog": 1, "fox": 2, "owl": 1}
    assert dataset.facts()["left_out"] == {"link to a folder above it": 2}
    only = tmp_path / "only"  # links alone
    only.mkdir()
    for name in ("cat", "dog"):
        (only / name).symlink_to(tmp_path / "images" / name)
    assert data.load(settings(tmp_path, path=str(only), conditional=True)).class_names == ["cat", "dog"]
    (only / "kitty").symlink_to(tmp_path / "images" / "cat")
    refused(settings(tmp_path, path=str(only)), "cat and kitty", "the same folder")


def test_images_are_known_by_their_header_and_the_rest_is_counted(tmp_path):
    jpeg, png = encoded(pixels(1)[0], "jpeg"), encoded(pixels(1)[0])
    members = {"a.png": png, "b.jfif": jpeg, "c.JPE": jpeg, "0f3a": png, "img.001": jpeg, "LICENSE": b"text"}
    members |= {"d.txt": b"x", "e.txt": b"x", "f.heic": b"x", "g.jpg_original": jpeg, ".hidden": png}
    write_folder(tmp_path / "images", members)
    path = write_zip(tmp_path / "a.zip", members)
    for values in ({}, {"name": "zip", "path": path}):
        dataset = data.load(settings(tmp_path, **values))
        assert dataset.source.names == ["0f3a", "a.png", "b.jfif", "c.JPE", "img.001"] and len(dataset.images) == 5
        assert dataset.said()[0].endswith("; left out: 1 .heic, 1 .jpg_original, 2 .txt, 1 without a suffix")
    write_folder(tmp_path / "other", {"train-0.parquet": b"PAR1", "x.csv": b"x"})
    refused(settings(tmp_path, path=str(tmp_path / "other")), "holds no images", "1 .csv, 1 .parquet")


def test_a_folder_of_edms_files_has_the_labels_of_its_dataset_json(tmp_path):
    """EDM's zip, unpacked: its folders are of a thousand images each, not classes."""
    names = [f"0000{i // 2}/img{i}.png" for i in range(4)]
    made(tmp_path / "images", *names)
    told = {"labels": [[name, i % 2] for i, name in enumerate(names)], "classes": ["cat", "owl"]}
    (tmp_path / "images" / "dataset.json").write_text(json.dumps(told))
    dataset = data.load(settings(tmp_path, conditional=True))
    assert dataset.labels.tolist() == [0, 1, 0, 1] and dataset.class_names == ["cat", "owl"]
    assert dataset.facts()["left_out"] == {}


# Labels ---------------------------------------------------------------------------------------------------------------


def labelled(tmp_path: Path, labels: list, **more: object) -> dict[str, str]:
    """Settings of a zip of images with these labels."""
    names = [f"{i}.png" for i in range(len(labels))]
    members = {name: encoded(x) for name, x in zip(names, pixels(len(names)), strict=True)}
    pairs = [[name, label] for name, label in zip(names, labels, strict=True)]
    members["dataset.json"] = json.dumps({"labels": pairs, **more}).encode()
    return {"name": "zip", "path": write_zip(tmp_path / "a.zip", members)}


def parsed(**section: object) -> config.Config:
    return config.parse({"data": {"name": "folder", "path": "x", **section}})


def test_labels_from_one_leave_a_class_that_is_named(tmp_path):
    dataset = data.load(settings(tmp_path, conditional=True, **labelled(tmp_path, [1, 2, 3, 1])))
    assert dataset.said()[0].endswith("4 classes: 0 0, 1 2, 2 1, 3 1; class 0 has no images")
    assert dataset.codec(parsed(conditional=True)).class_counts == [0, 2, 1, 1]  # by which --class 0 is refused
    many = data.load(settings(tmp_path, conditional=True, **labelled(tmp_path, [30, 1])))
    assert "30 1" not in many.said()[0] and "and 21 more; classes 0, 2, " in many.said()[0]


def test_a_grid_shows_the_classes_that_there_are(tmp_path):
    from sampling.samples import samples_of

    dataset = data.load(settings(tmp_path, conditional=True, **labelled(tmp_path, [1, 2, 3, 1])))
    codec = dataset.codec(parsed(conditional=True))
    assert samples_of(codec).given_for_grid(dataset, 0, 5).tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    "labels",
    [[[0.1] * 25] * 4, ["cat", "dog", "cat", "owl"], [-1, 0, 1, 2], [0.5, 1, 2, 3], [None] * 4, [[1, 0, 0], [1], 2, 3]],
)
def test_labels_that_nobody_uses_are_not_checked(tmp_path, labels):
    values = labelled(tmp_path, labels)
    dataset = data.load(settings(tmp_path, **values))
    assert len(dataset) == 4 and dataset.labels is None and "labels, which are not used" in dataset.said()[0]
    refused(settings(tmp_path, conditional=True, **values), "dataset.json", "labels")


@pytest.mark.parametrize(
    "labels", [[[0], [2], [1], [2]], [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], [0.0, 2.0, 1, 2]]
)
def test_labels_by_other_names(tmp_path, labels):
    dataset = data.load(settings(tmp_path, conditional=True, **labelled(tmp_path, labels)))
    assert dataset.labels.tolist() == [0, 2, 1, 2] and dataset.num_classes == 3
    np.savez(tmp_path / "a.npz", images=pixels(4), labels=np.array(labels))
    dataset = data.load(settings(tmp_path, name="npz", path=str(tmp_path / "a.npz"), conditional=True))
    assert dataset.labels.tolist() == [0, 2, 1, 2] and dataset.num_classes == 3


def test_one_hot_keeps_classes_without_images():
    numbers, count = class_numbers("x", np.eye(5)[[1, 3]])
    assert numbers.tolist() == [1, 3] and count == 5 and numbers.dtype == np.int64


@pytest.mark.parametrize("second", [0, 2])
def test_two_labels_for_one_image_are_refused(tmp_path, second):
    told = json.dumps({"labels": [["a.png", 0], ["b.png", 1], ["a.png", second]]})
    members = {name: encoded(x) for name, x in zip(("a.png", "b.png"), pixels(2), strict=True)}
    path = write_zip(tmp_path / "a.zip", {**members, "dataset.json": told.encode()})
    values = settings(tmp_path, name="zip", path=path, conditional=True)
    if second:
        refused(values, "a.png two labels, 0 and 2")
    else:
        assert data.load(values).labels.tolist() == [0, 1]  # the same twice


def test_colons_and_backslashes_in_a_zip_are_names(tmp_path):
    names = ["2024-01-01T12:30:00.png", "a:b.png", "windows\\cat\\1.png"]
    path = write_zip(tmp_path / "a.zip", {name: encoded(x) for name, x in zip(names, pixels(3), strict=True)})
    assert data.load(settings(tmp_path, name="zip", path=path)).source.names == names


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_arrays_as_other_people_keep_them(tmp_path):
    images, path = pixels(4), tmp_path / "a.npz"
    values = settings(tmp_path, name="npz", path=str(path), conditional=True)
    for x, y in (("train_images", "train_labels"), ("x_train", "y_train")):
        np.savez(path, **{x: images, y: np.array([[0], [1], [1], [0]]), "val_images": images[:1]})
        dataset = data.load(values)
        assert np.array_equal(dataset.images.permute(0, 2, 3, 1), images) and dataset.labels.tolist() == [0, 1, 1, 0]
    np.savez(path, pictures=images, other=images)
    refused(values, "It holds pictures, other", "`train_images`")
    np.savez(path, images=images, labels=np.array([0, 1, -1, 2]))
    refused(values, "not -1 (row 2)")
    np.savez(path, images=images, labels=np.array([0, 1]))
    refused(values, "2 labels for 4 images")
    values.path = str(tmp_path / "a.npy")
    np.save(values.path, images)
    refused(values, "no labels")
    values.conditional = False
    assert np.array_equal(data.load(values).images.permute(0, 2, 3, 1), images)
    np.save(values.path, np.array([{}]), allow_pickle=True)
    refused(values, "cannot be read as an npz or npy")
    np.save(values.path, np.random.default_rng(0).normal(size=(5, 3)))
    assert data.load(values).shape == (3,) and "5 vectors of 3" in data.load(values).said()[0]
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50))
    refused(settings(tmp_path, name="npz", path=str(tmp_path / "a.parquet")), "what can be read: a folder of images")
    refused(settings(tmp_path, path=str(tmp_path / "a.parquet")), "or set data.name: parquet")
    (tmp_path / "a.h5").write_bytes(bytes(50))
    refused(settings(tmp_path, path=str(tmp_path / "a.h5")), "what can be read: a folder of images", "tar shards (tar)")
    refused(settings(tmp_path, name="zip", path=str(tmp_path / "a.parquet")), "cannot be read as a zip")


def test_an_npy_over_memory_gb_is_not_read(tmp_path):
    np.save(tmp_path / "a.npy", pixels(20, 32))
    values = settings(tmp_path, name="npz", path=str(tmp_path / "a.npy"), memory_gb=1e-5)
    refused(values, "data.memory_gb")


# What is said and kept ------------------------------------------------------------------------------------------------


def test_facts_of_every_kind_of_dataset(tmp_path):
    digits = data.load(settings(tmp_path, name="digits", path=None, conditional=True))
    assert digits.said() == [
        "data: 1,797 images of 8x8 grey from digits, 10 classes: 0 178, 1 182, 2 177, 3 183, 4 181, 5 182, 6 181, "
        "7 179, 8 174, 9 180"
    ]
    made(tmp_path / "images", "cat/a.png", "owl/b.png", size=16)
    made(tmp_path / "images", "owl/c.png", size=12)
    write_folder(tmp_path / "images", {"owl/d.png": b"no", "notes.txt": b"x"})
    dataset = data.load(settings(tmp_path, conditional=True, resolution=8, on_broken="skip"))
    where = f"data: 3 images of 8x8 RGB from {tmp_path / 'images'}"
    told = f"{where} (resized from 16x16 and others), 2 classes: cat 1, owl 2; left out: 1 .txt, 1 broken"
    assert dataset.said() == [told]
    identity = dataset.codec(parsed(conditional=True)).state()["data"]
    assert identity["classes"] == ["cat", "owl"] and identity["counts"] == [1, 2] and identity["count"] == 3
    json.dumps(dataset.facts())
    np.savez(tmp_path / "v.npz", vectors=np.zeros((7, 2, 3)), conditions=np.zeros((7, 4)))
    vectors = data.load(settings(tmp_path, name="npz", path=str(tmp_path / "v.npz"), conditional=True))
    assert vectors.said() == [f"data: 7 vectors of 2x3 from {tmp_path / 'v.npz'}, conditions of 4"]
    json.dumps(vectors.facts())


def test_odd_sizes_are_skipped_where_broken_images_are(tmp_path):
    made(tmp_path / "images", *(f"{i}.png" for i in range(5)))
    made(tmp_path / "images", "3.png", size=12)
    for memory_gb in (0.0, 1.0):
        refused(settings(tmp_path, memory_gb=memory_gb), "data.resolution", "3.png", "12 x 12", "others are 8 x 8")
        dataset = data.load(settings(tmp_path, memory_gb=memory_gb, on_broken="skip"))
        assert dataset.said()[0].endswith("left out: 1 of another size")
        assert len(take(dataset, 3)) == 3 and len(dataset) == (4 if memory_gb else 5)


def test_the_cache_remembers_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE_SECONDS", -1)
    made(tmp_path / "images", *(f"{i}.png" for i in range(3)))
    write_folder(tmp_path / "images", {"3.png": b"no"})
    first, second = (data.load(settings(tmp_path, on_broken="skip")).facts() for _ in range(2))
    assert first == second and first["left_out"] == {"broken": 1} and list((tmp_path / "data" / "cache").iterdir())


def fingerprint(tmp_path: Path, **values: object) -> str:
    return data.load(settings(tmp_path, **values)).facts()["fingerprint"]


def test_a_fingerprint_is_of_the_images_not_of_where_or_when(tmp_path):
    kept = {f"{kind}/{i}.bmp": encoded(x, "bmp") for kind in "ab" for i, x in enumerate(pixels(3))}
    write_folder(tmp_path / "images", kept)
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path, memory_gb=0.0)
    shutil.copytree(tmp_path / "images", tmp_path / "copy")  # elsewhere, and with other times
    assert first == fingerprint(tmp_path, path=str(tmp_path / "copy"))
    shutil.move(tmp_path / "copy" / "b", tmp_path / "copy" / "c")
    assert first == fingerprint(tmp_path, path=str(tmp_path / "copy"))  # the classes' names tell that apart
    (tmp_path / "copy" / "a" / "0.bmp").write_bytes(encoded(pixels(1)[0], "bmp"))  # another image of the same size
    assert first != fingerprint(tmp_path, path=str(tmp_path / "copy"))
    zips = [
        write_zip(tmp_path / f"{i}.zip", {**kept, **more}) for i, more in enumerate(({}, {"a/0.bmp": kept["a/1.bmp"]}))
    ]
    assert fingerprint(tmp_path, name="zip", path=zips[0]) != fingerprint(tmp_path, name="zip", path=zips[1])


def test_a_fingerprint_in_memory_is_of_images_and_of_labels_that_are_used(tmp_path):
    images = pixels(4)
    path = str(tmp_path / "a.npz")
    found = []
    for x, y in ((images, [0, 1, 1, 0]), (images, [0, 1, 0, 1]), (images[::-1], [0, 1, 1, 0])):
        np.savez(path, images=x, labels=np.array(y))
        found.append([fingerprint(tmp_path, name="npz", path=path, conditional=told) for told in (True, False)])
    assert len({told for told, _ in found}) == 3 and len({untold for _, untold in found}) == 2


def test_a_codec_keeps_classes_and_facts(tmp_path):
    made(tmp_path / "images", "cat/a.png", "owl/b.png")
    dataset = data.load(settings(tmp_path, conditional=True))
    state = dataset.codec(parsed(conditional=True)).state()
    assert codecs.codec_from(json.loads(json.dumps(state))).state() == state and state["classes"] == ["cat", "owl"]
    assert data.load(settings(tmp_path)).codec(parsed()).classes is None  # the network is told none


# Lazy sets ------------------------------------------------------------------------------------------------------------


def test_a_broken_header_is_met_before_the_first_step(tmp_path):
    made(tmp_path / "images", *(f"{i:03}.png" for i in range(100)))
    (tmp_path / "images" / "077.png").write_bytes(b"\x89PNG\r\n")
    values = {"memory_gb": 0.0, "resolution": 8, "channels": 3}
    refused(settings(tmp_path, **values), "077.png", "data.on_broken")
    dataset = data.load(settings(tmp_path, on_broken="skip", **values))
    assert dataset.facts()["left_out"] == {"broken": 1} and len(dataset) == 100


def test_headers_take_no_longer_than_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEADER_SECONDS", -1)
    made(tmp_path / "images", *(f"{i:03}.png" for i in range(100)))
    (tmp_path / "images" / "077.png").write_bytes(b"no")
    assert data.load(settings(tmp_path, memory_gb=0.0, resolution=8, channels=3)).files is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_in_mid_run_is_one_error_and_no_traceback(tmp_path, workers):
    made(tmp_path / "images", *(f"{i:02}.png" for i in range(40)), size=32)
    broken = tmp_path / "images" / "07.png"
    broken.write_bytes(broken.read_bytes()[:1000])  # the header is whole
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import config, data
cfg = config.parse({{"data": {{"name": "folder", "path": {str(tmp_path / "images")!r}, "memory_gb": 0.0}}}}).data
read = 0
try:
    for batch in data.batches(data.load(cfg), 3, 2, workers={workers}):
        read += 1
except config.ConfigError as error:
    kept = error  # and with it the frames of the traceback
    print(read, error)
sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    steps, said = done.stdout.strip().split(" ", 1)
    assert int(steps) > 0 and "07.png" in said and "data.on_broken: skip" in said and "\n" not in said
    assert (done.stderr, done.returncode) == ("", 2)


def test_splits_are_known_by_their_names():
    assert finding.is_split("seg_train") == ("seg", "train") and finding.is_split("VALID") == ("", "val")
    for name in ("trains", "valley", "testarossa", "cat", "trainer", "protest"):
        assert finding.is_split(name) is None


def test_a_damaged_json_is_no_hindrance_where_it_is_not_used_but_a_bomb_is(tmp_path, monkeypatch):
    members = {"a.png": encoded(pixels(1)[0]), "dataset.json": b'{"labels": [["a.png", 0]'}
    path = write_zip(tmp_path / "a.zip", members, zipfile.ZIP_STORED)
    assert len(data.load(settings(tmp_path, name="zip", path=path))) == 1
    monkeypatch.setattr(finding, "MAX_JSON", 10)
    refused(settings(tmp_path, name="zip", path=path), "dataset.json", "unpacks to more")
