"""Every kind of dataset from tiny files made here, the order of reading, and files that mean harm."""

import io
import itertools
import json
import logging
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from config import ConfigError, Data, parse
from objectives.draws import Draws
from sources import codecs, files, finding
from sources.augment import AUGMENT_DIM, augment
from sources.images import ImageSet, draw_labels, fit_channels, fit_resolution

RNG = np.random.default_rng(0)


def settings(tmp_path: Path, **values) -> Data:
    return Data(**{"name": "folder", "dir": str(tmp_path / "data"), "path": str(tmp_path / "images"), **values})


def pixels(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_zip(path: Path, files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def one_line(info: pytest.ExceptionInfo, *words: str) -> None:
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_256_values_go_to_float_and_back(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values, dtype)
    assert x.dtype == dtype and x[0] == -1 and x[255] == 1
    assert torch.equal(data.to_uint8(x), values)


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.0, 3.0])
    assert data.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


def test_flip_mirrors_the_flagged_images_left_to_right():
    images = torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)
    out = codecs.flip(images, torch.tensor([True, False, True]))
    assert torch.equal(out[1], images[1])
    assert torch.equal(out[0], images[0].flip(2)) and torch.equal(out[2, :, :, 0], images[2, :, :, -1])


def test_grey_from_colour_and_resizing_are_pils():
    images = torch.from_numpy(pixels(4)).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    ours = fit_channels(images, 1)
    assert np.array_equal(ours[:, 0], [np.asarray(picture.convert("L")) for picture in pictures])
    assert torch.equal(fit_channels(ours, 3), ours.expand(-1, 3, -1, -1))
    for size in (3, 4, 11, 16):
        there = [np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)) for picture in pictures]
        assert np.array_equal(fit_resolution(images, size).permute(0, 2, 3, 1), there)
    assert torch.equal(fit_resolution(images[:, :, 2:6], None), images[:, :, 2:6, 2:6])


# ---------------------------------------------------------------------------------------------------------------------
# What the model sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_training_batch_is_flipped_augmented_and_labelled_by_its_draws(dtype):
    images, labels = torch.from_numpy(pixels(12)).permute(0, 3, 1, 2), torch.arange(12) % 4
    plain = codecs.ImageCodec(8, 3, label_dim=4)
    x, given = plain.to_model(images, labels, Draws(3, 12), dtype)
    assert torch.equal(x, data.to_float(images, dtype)) and x.is_contiguous()
    assert given.keys() == {"class_labels"} and given["class_labels"].dtype == dtype
    assert torch.equal(given["class_labels"], torch.eye(4, dtype=dtype)[labels])
    assert plain.to_model(images, None, Draws(3, 12))[1] == {}
    both = codecs.ImageCodec(8, 3, augment_dim=AUGMENT_DIM, flip=True, augment=0.5)
    draws = Draws(3, 12)  # the flips come first, then the augmentation's
    flipped = codecs.flip(images, draws.integers(2, (12,)).bool())
    moved, told = augment(data.to_float(flipped, dtype), 0.5, draws)
    x, given = both.to_model(images, labels, Draws(3, 12), dtype)
    assert torch.equal(x, moved) and torch.equal(given["augment_labels"], told) and len(given) == 1
    assert not torch.equal(flipped, images) and not torch.equal(moved, data.to_float(flipped, dtype))
    assert torch.equal(plain.from_model(data.to_float(images, dtype)), images)


def test_an_image_codec_goes_into_a_checkpoint_and_comes_back_without_augmentation(tmp_path):
    dataset = ImageSet("x", 3, torch.tensor([0, 2, 2, 0, 2]), torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
    settings = {"data": {"name": "folder", "path": "x", "conditional": True, "flip": True}}
    codec = dataset.codec(parse(settings))
    assert codec.kind == "images" and codec.flip and not codec.augment and not list(codec.state_dict())
    assert codec.state() == {
        "shape": {"resolution": 8, "channels": 1, "label_dim": 3, "augment_dim": 0},
        "class_counts": [2, 0, 3],
        "scaling": None,
        "classes": ["0", "1", "2"],
        "data": {
            "count": 5,
            "size": [8, 8],
            "channels": 1,
            "classes": ["0", "1", "2"],
            "counts": [2, 0, 3],
            "fingerprint": dataset.facts()["fingerprint"],
        },
    }
    older = {name: value for name, value in codec.state().items() if name not in ("classes", "data")}
    assert codecs.codec_from(older).classes is None
    back = codecs.codec_from(codec.state())
    assert back.state() == codec.state() and not back.flip
    images = torch.from_numpy(pixels(4, channels=1)).permute(0, 3, 1, 2)
    assert torch.equal(back.to_model(images, None, Draws(0, 4))[0], data.to_float(images))
    settings["data"] = {**settings["data"], "conditional": False, "flip": False, "augment": 0.2}
    codec = dataset.codec(parse(settings))
    assert codec.augment == 0.2 and codec.class_counts is None
    assert codec.network_shape == {"resolution": 8, "channels": 1, "label_dim": 0, "augment_dim": AUGMENT_DIM}
    assert not codecs.codec_from(codec.state()).augment


def test_samples_are_asked_for_as_often_as_classes_come_where_the_network_is_told_them(tmp_path):
    images = {f"{'ab'[i % 4 == 0]}/{i}.png": encoded(x) for i, x in enumerate(pixels(12))}
    write_folder(tmp_path / "images", images)
    dataset = data.load(settings(tmp_path, conditional=True))
    drawn = dataset.draw_given(7, range(2000))
    assert torch.equal(drawn, draw_labels(7, range(2000), [9, 3])) and abs(drawn.float().mean() - 0.25) < 0.05
    assert torch.equal(dataset.draw_given(7, [5, 1000]), drawn[[5, 1000]])
    assert not torch.equal(dataset.draw_given(8, range(2000)), drawn)
    assert data.load(settings(tmp_path)).draw_given(7, range(4)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_each_epoch_is_a_permutation_of_its_own():
    n = 37
    epochs = [data.order(n, 1, torch.arange(e * n, (e + 1) * n)) for e in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(n))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], data.order(n, 2, torch.arange(n)))
    assert torch.equal(epochs[0], data.order(n, 1, torch.arange(n)))


def test_the_order_is_the_same_stream_on_every_machine():
    assert data.order(10, 0, torch.arange(10)).tolist() == [3, 2, 6, 8, 0, 1, 9, 4, 5, 7]


def take(dataset: ImageSet, count: int, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    iterator = data.batches(dataset, **{"seed": 5, "batch_size": 6, **options})
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> tuple[ImageSet, ImageSet]:
    """20 images, image i all of grey level i and labelled i: in memory, and lazy."""
    tmp_path = tmp_path_factory.mktemp("numbered")
    files = {f"{i:02}/x.png": encoded(np.full((8, 8), i, np.uint8)) for i in range(20)}
    write_folder(tmp_path / "images", files)
    return data.load(settings(tmp_path)), data.load(settings(tmp_path, memory_gb=0.0))


def test_batches_are_the_stream_in_steps_of_batch_size(numbered):
    stream = data.order(20, 5, torch.arange(42))
    images, labels = (torch.cat(parts) for parts in zip(*take(numbered[0], 7), strict=True))
    assert torch.equal(labels, stream)
    assert torch.equal(images[:, 0, 3, 3].long(), labels)  # one step of delay between the two would be seen
    smaller = torch.cat([labels for _, labels in take(numbered[0], 14, batch_size=3)])
    assert torch.equal(smaller, stream)
    larger = take(numbered[0], 1, batch_size=50)[0][1]  # more than two epochs in one batch
    assert torch.equal(larger, data.order(20, 5, torch.arange(50)))


def test_ranks_cut_the_batch_and_a_start_step_resumes(numbered):
    whole = take(numbered[0], 6)
    parts = [take(numbered[0], 6, rank_slice=rows) for rows in ((0, 2), (2, 3), (3, 6))]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))
    for later, (images, labels) in zip(take(numbered[0], 2, start_step=4), whole[4:], strict=True):
        assert torch.equal(images, later[0]) and torch.equal(labels, later[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_lazy_equals_resident_whatever_the_number_of_workers(numbered, workers):
    resident, lazy = numbered
    assert lazy.images is None and resident.images is not None
    assert (len(lazy), lazy.channels, lazy.resolution, lazy.num_classes) == (20, 1, 8, 20)
    state = torch.get_rng_state()
    for ours, theirs in zip(take(lazy, 5, start_step=2, workers=workers), take(resident, 5, start_step=2), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.equal(state, torch.get_rng_state())
    some = torch.tensor([19, 0, 7])
    assert torch.equal(lazy.batch(some), resident.batch(some))
    assert lazy.to("cpu") is lazy and torch.equal(resident.to("cpu").batch(some), lazy.batch(some))


# ---------------------------------------------------------------------------------------------------------------------
# Datasets by name


def test_digits(tmp_path):
    dataset = data.load(settings(tmp_path, name="digits", path=None, conditional=True))
    assert (len(dataset), dataset.channels, dataset.resolution, dataset.num_classes) == (1797, 1, 8, 10)
    assert dataset.images.dtype == torch.uint8 and dataset.labels[:10].tolist() == list(range(10))
    from sklearn.datasets import load_digits

    raw = load_digits().images
    assert dataset.images[:, 0].tolist() == [[[round(v * 255 / 16) for v in row] for row in image] for image in raw]
    larger = data.load(settings(tmp_path, name="digits", path=None, resolution=16, channels=3))
    assert larger.images.shape == (1797, 3, 16, 16)


def write_mnist(root: Path, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    images, labels = pixels(count, 28, 1)[..., 0], RNG.integers(0, 10, count, dtype=np.uint8)
    root.mkdir(parents=True)
    for split in ("train", "t10k"):
        (root / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (root / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return images, labels


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_padded_to_32(tmp_path, name, kind):
    images, labels = write_mnist(tmp_path / "data" / kind / "raw")
    dataset = data.load(settings(tmp_path, name=name, path=None, conditional=True))
    assert dataset.images.shape == (20, 1, 32, 32) and dataset.num_classes == 10
    assert np.array_equal(dataset.images[:, 0, 2:30, 2:30].numpy(), images)
    assert dataset.images.sum() == images.sum() and dataset.labels.tolist() == labels.tolist()
    half = data.load(settings(tmp_path, name=name, path=None, resolution=16)).images
    assert torch.equal(half, fit_resolution(dataset.images, 16))


@pytest.mark.parametrize(("name", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_cifar(tmp_path, monkeypatch, name, kind, classes):
    """torchvision checks the archive's hash, so its class is replaced; it gives NHWC arrays and lists of labels."""

    class Fake:
        def __init__(self, root, train, download):
            assert root == str(tmp_path / "data") and train and not download
            self.data, self.targets = images, labels

    images, labels = pixels(5, 32), [3, 0, classes - 1, 1, 1]
    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    dataset = data.load(settings(tmp_path, name=name, path=None, conditional=True))
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), images)
    assert dataset.labels.tolist() == labels and dataset.num_classes == classes


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_says_what_to_place_where(tmp_path, monkeypatch, name):
    asked = []

    class Offline:
        def __init__(self, root, train, download):
            asked.append(download)
            raise RuntimeError("Error downloading:\nTried https://x, got:\n<urlopen error>")

    monkeypatch.setattr(torchvision.datasets, name.upper(), Offline)
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name=name, path=None))
    one_line(info, "place", str(tmp_path / "data"), {"mnist": "train-images-idx3-ubyte", "cifar10": ".tar.gz"}[name])
    assert asked == [False, True]


def test_a_damaged_download_is_named(tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    write_mnist(raw)
    (raw / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="mnist", path=None))
    one_line(info, "damaged", "delete")


def test_folder_labels_are_the_sorted_subfolders(tmp_path):
    images = pixels(4)
    names = ["zebra/a.png", "ant/deep/b.PNG", "ant/c.png", "moth/d.png"]
    write_folder(tmp_path / "images", {n: encoded(i) for n, i in zip(names, images, strict=True)})
    write_folder(tmp_path / "images", {"ant/notes.txt": b"x", ".hidden/e.png": b"x", "ant/._f.png": b"x"})
    (tmp_path / "images" / "empty").mkdir()
    dataset = data.load(settings(tmp_path, conditional=True))
    assert dataset.labels.tolist() == [0, 0, 1, 2] and dataset.num_classes == 3
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), images[[2, 1, 3, 0]])


def test_flat_folder_has_no_labels_and_conditional_says_so(tmp_path):
    write_folder(tmp_path / "images", {f"{i}.png": encoded(x) for i, x in enumerate(pixels(2))})
    dataset = data.load(settings(tmp_path))
    assert dataset.labels is None and dataset.num_classes == 0
    assert next(data.batches(dataset, 0, 2))[1] is None
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, conditional=True))
    one_line(info, "data.conditional", "labels")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """ImageNet's train folder in small: 1,000 class folders of one image, whose red and green say its class."""
    root = tmp_path_factory.mktemp("imagenet")
    for place in reversed(range(1000)):
        image = np.full((4, 4, 3), [place // 256, place % 256, 0], np.uint8)
        write_folder(root, {f"n{place:08d}/n{place:08d}_1.png": encoded(image)})
    write_folder(root, {".cache/a.png": b"x", "notes.txt": b"x"})  # neither is a class
    return root


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_imagenet9_is_nine_groups_of_the_sorted_class_folders(tmp_path, imagenet, memory_gb):
    dataset = data.load(settings(tmp_path, name="imagenet9", path=str(imagenet), conditional=True, memory_gb=memory_gb))
    images, labels = dataset.read(torch.arange(len(dataset)))
    places = images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0]
    found = {label: places[labels == label].tolist() for label in range(9)}
    assert found == {
        0: [151, 207, 234, 235, 254],  # dog
        1: list(range(281, 286)),  # cat
        2: list(range(30, 33)),  # frog
        3: list(range(33, 38)),  # turtle
        4: [89, 90, 94, 96, 97],  # bird
        5: [372, 373, 374, 375, 378],  # monkey
        6: list(range(393, 398)),  # fish
        7: list(range(118, 122)),  # crab
        8: list(range(306, 311)),  # insect
    }
    assert len(dataset) == 42 and dataset.num_classes == 9
    assert list(data.IMAGENET9)[:3] == ["dog", "cat", "frog"] and list(data.IMAGENET9)[-1] == "insect"


def test_imagenet9_wants_all_of_imagenets_class_folders(tmp_path):
    for place in range(999):
        (tmp_path / "images" / f"n{place:08d}").mkdir(parents=True)
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="imagenet9"))
    one_line(info, "data.path", "999", "1000", "ImageNet")
    (tmp_path / "images" / "n99999999").mkdir()  # 1,000 folders, but empty
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="imagenet9"))
    one_line(info, "data.path", "holds no images")
    with pytest.raises(ConfigError) as info:
        parse({"data": {"name": "imagenet9"}})
    one_line(info, "data.path", "imagenet9")


def test_links_are_read_loops_and_pipes_are_not(tmp_path):
    outside = tmp_path / "outside"
    write_folder(outside, {"a.png": encoded(pixels(1)[0])})
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "endless.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.png")
    dataset = data.load(settings(tmp_path))
    assert len(dataset) == 2 and dataset.source.names == ["folder/a.png", "link.png"]
    left_out = {"link to no file": 2, "no file": 1, "link to a folder above it": 1}
    assert dataset.facts()["left_out"] == left_out


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_with_labels(tmp_path, how):
    images = pixels(3)
    files = {f"00000/img{i}.png": encoded(image) for i, image in enumerate(images)}
    pairs = [[name, label] for name, label in zip(files, [2, 0, 4], strict=True)]
    files["dataset.json"] = json.dumps({"labels": pairs[::-1]}).encode()
    path = write_zip(tmp_path / "set.zip", files, how)
    for memory in (1.0, 0.0):
        dataset = data.load(settings(tmp_path, name="zip", path=path, conditional=True, memory_gb=memory))
        assert dataset.labels.tolist() == [2, 0, 4] and dataset.num_classes == 5
        assert np.array_equal(dataset.batch(torch.arange(3)).permute(0, 2, 3, 1).numpy(), images)
    with torch.no_grad():
        assert [labels.sum().item() for _, labels in take(dataset, 2, batch_size=3, workers=2)] == [6, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.zip"]  # nothing was extracted


@pytest.mark.parametrize("extra", [{}, {"dataset.json": b'{"labels": null}'}])
def test_zip_without_labels(tmp_path, extra):
    path = write_zip(tmp_path / "set.zip", {"a.png": encoded(pixels(1)[0]), **extra})
    dataset = data.load(settings(tmp_path, name="zip", path=path))
    assert len(dataset) == 1 and dataset.labels is None


@pytest.mark.parametrize(
    "labels",
    [
        b"{",
        b"[" * 100_000,
        b'{"labels": 3}',
        b'{"labels": [["a.png"]]}',
        b'{"labels": [["b.png", 1]]}',
        b'{"labels": [["a.png", 1.5]]}',
        b'{"labels": [["a.png", -1]]}',
        b'{"labels": [["a.png", true]]}',
        b'{"labels": [["a.png", 1000000000]]}',
        b'{"labels": [["a.png", "cat"]]}',
        b'"labels"',
        b"\xff\xfe\x00",
    ],
)
def test_bad_label_files_are_named(tmp_path, labels):
    path = write_zip(tmp_path / "set.zip", {"a.png": encoded(pixels(1)[0]), "dataset.json": labels})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="zip", path=path, conditional=True))
    one_line(info, "dataset.json")
    dataset = data.load(settings(tmp_path, name="zip", path=path))  # nobody uses them: they are not checked
    (left_out,) = dataset.facts()["left_out"]
    assert len(dataset) == 1 and dataset.labels is None and "dataset.json" in left_out


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_npz(tmp_path, layout):
    images, path = pixels(5, 8, 1 if layout == "NHW" else 3), str(tmp_path / "set.npz")
    stored = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    np.savez_compressed(path, images=stored, labels=np.array([1, 0, 2, 2, 1]))
    dataset = data.load(settings(tmp_path, name="npz", path=path, conditional=True))
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), images)
    assert dataset.labels.tolist() == [1, 0, 2, 2, 1] and dataset.num_classes == 3
    np.savez(path, stored)
    assert data.load(settings(tmp_path, name="npz", path=path, resolution=4)).images.shape[2:] == (4, 4)


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "uint8"),
        ({"images": np.zeros((2, 8, 8, 5), np.uint8)}, "channels"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "empty"),
        ({"pictures": np.zeros((2, 8, 8, 3), np.uint8)}, "images"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "labels"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0.5, 1])}, "labels"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([-1, 1])}, "labels"),
        ({"images": np.array([Harm()], dtype=object)}, "npz"),
    ],
)
def test_bad_npz_is_named_and_never_unpickled(tmp_path, monkeypatch, arrays, word):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="npz", path="set.npz", conditional="labels" in arrays))
    one_line(info, "set.npz", word)
    assert not (tmp_path / "harm").exists()


def test_npz_over_memory_gb_is_not_unpacked(tmp_path):
    path = str(tmp_path / "set.npz")
    np.savez_compressed(path, images=np.zeros((1000, 32, 32, 3), np.uint8))
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="npz", path=path, memory_gb=0.001))
    one_line(info, "data.memory_gb")


# ---------------------------------------------------------------------------------------------------------------------
# Modes, sizes, the cache


def decode(tmp_path: Path, content: bytes, **values) -> np.ndarray:
    write_folder(tmp_path / "images", {"a.png": content})
    return data.load(settings(tmp_path, **values)).images[0].numpy()


def test_modes(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    assert decode(tmp_path, encoded(colour.quantize()), channels=3)[:, 0, 0].tolist() == [200, 100, 50]
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    half.paste((10, 20, 30, 255), (0, 0, 4, 8))
    out = decode(tmp_path, encoded(half), channels=3)
    assert out[:, 0, 0].tolist() == [10, 20, 30] and out[:, 0, 7].tolist() == [255, 255, 255]
    deep = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    out = decode(tmp_path, encoded(deep))
    assert out.shape == (1, 8, 8) and np.array_equal(out[0], np.rint(deep / 257))
    print_colours = decode(tmp_path, encoded(colour.convert("CMYK"), "jpeg", quality=100), channels=3)
    assert np.abs(print_colours[:, 0, 0].astype(int) - [200, 100, 50]).max() <= 6
    assert decode(tmp_path, encoded(Image.new("1", (8, 8), 1)))[0].min() == 255
    assert decode(tmp_path, encoded(Image.new("LA", (8, 8), (9, 255))), channels=3)[:, 1, 1].tolist() == [9, 9, 9]
    assert decode(tmp_path, encoded(colour), channels=1).tolist() == [np.asarray(colour.convert("L")).tolist()]
    with pytest.raises(ConfigError, match="floats"):
        decode(tmp_path, encoded(Image.new("F", (8, 8), 0.5), "tiff"))


def test_centre_crop_then_resize(tmp_path):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 255  # the centre square
    assert decode(tmp_path, encoded(image), resolution=8).min() == 255
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, 0)
    out = decode(tmp_path, encoded(ramp), resolution=16)[0, 4]
    assert np.abs(out.astype(int) - ramp[0].reshape(16, 4).mean(1)).max() <= 3
    large = np.repeat(np.repeat(ramp, 16, 0), 16, 1)  # 1024 pixels: a JPEG that is decoded at a reduced size
    out = decode(tmp_path, encoded(large, "jpeg", quality=95), resolution=16)[0, 4]
    assert np.abs(out.astype(int) - ramp[0].reshape(16, 4).mean(1)).max() <= 3


def test_a_photo_held_sideways_is_turned_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = pixels(1)[0]
    assert np.array_equal(decode(tmp_path, encoded(image, exif=exif)).transpose(1, 2, 0), np.rot90(image, -1))


def test_images_unlike_the_first_need_a_setting(tmp_path):
    write_folder(tmp_path / "images", {"a.png": encoded(pixels(1, 8)[0]), "b.png": encoded(pixels(1, 12)[0])})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path))
    one_line(info, "data.resolution", "b.png")
    with pytest.raises(ConfigError) as info:  # before the first step
        data.load(settings(tmp_path, memory_gb=0.0))
    one_line(info, "data.resolution", "b.png")
    assert data.load(settings(tmp_path, resolution=8)).images.shape == (2, 3, 8, 8)
    write_folder(tmp_path / "images", {"a.png": encoded(pixels(1, 8)[0][:4])})
    with pytest.raises(ConfigError, match="not square"):
        data.load(settings(tmp_path))


def test_one_colour_image_makes_the_set_colour_and_a_late_one_is_an_error(tmp_path):
    files = {f"{i:03}.png": encoded(x) for i, x in enumerate(pixels(130, 8, 1))}
    write_folder(tmp_path / "images", {**files, "004.png": encoded(pixels(1)[0])})
    assert data.load(settings(tmp_path)).channels == 3
    write_folder(tmp_path / "images", {**files, "129.png": encoded(pixels(1)[0])})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path))
    one_line(info, "data.channels", "129.png")
    assert data.load(settings(tmp_path, channels=1)).channels == 1


def test_slow_sets_are_cached_decoded_and_the_cache_is_never_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE_SECONDS", -1)
    images = pixels(3)
    write_folder(tmp_path / "images", {f"{i}.png": encoded(x) for i, x in enumerate(images)})
    first = data.load(settings(tmp_path)).images
    (cache,) = (tmp_path / "data" / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(files.Files, "decode", None)
        assert torch.equal(data.load(settings(tmp_path)).images, first)
    assert data.load(settings(tmp_path, channels=1)).images.shape == (3, 1, 8, 8)
    cache.write_bytes(cache.read_bytes()[:-100])
    assert torch.equal(data.load(settings(tmp_path)).images, first)
    (tmp_path / "images" / "1.png").write_bytes(encoded(images[0]))
    os.utime(tmp_path / "images" / "1.png", (time.time() + 5,) * 2)
    assert torch.equal(data.load(settings(tmp_path)).images[1], first[0])
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "CACHE_SECONDS", -1)
    write_folder(tmp_path / "images", {"a.png": encoded(pixels(1)[0])})
    (tmp_path / "data").write_bytes(b"a file, where a folder should be")
    assert len(data.load(settings(tmp_path))) == 1
    assert "data.dir" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile files


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def broken_images() -> dict[str, bytes]:
    good = encoded(pixels(1)[0])
    return {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "text": b"hello",
        "pickle": pickle.dumps({"a": 1}),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        "bomb": png_bomb(50_000, 50_000),
        "small_bomb": png_bomb(10_001, 10_000),
        "svg": b"<svg><image href='file:///etc/passwd'/></svg>",
    }


@pytest.mark.parametrize("kind", list(broken_images()))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_images_are_skipped_with_one_line_or_fatal(tmp_path, caplog, kind):
    images = pixels(4)
    names = ["0/a.png", "1/b.png", "2/d.png", "3/e.png"]
    files = {n: encoded(x) for n, x in zip(names, images, strict=True)}
    bad = broken_images()[kind]
    write_folder(tmp_path / "images", {**files, "1/c.png": bad})
    path = write_zip(tmp_path / "set.zip", {**files, "1/c.png": bad})
    for values in ({}, {"name": "zip", "path": path}):
        caplog.clear()
        dataset = data.load(settings(tmp_path, on_broken="skip", resolution=8, channels=3, **values))
        assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), images)
        if not values:
            assert dataset.labels.tolist() == [0, 1, 2, 3]
        naming, count = (record.getMessage() for record in caplog.records)
        assert "1/c.png" in naming and "\n" not in naming and "1 of 5" in count
        reason = {"eps": "not an image of a known kind", "bomb": "bomb", "small_bomb": "bomb"}.get(
            kind, "cannot be read"
        )
        assert reason in naming
        with pytest.raises(ConfigError) as info:
            data.load(settings(tmp_path, on_broken="fail", resolution=8, channels=3, **values))
        one_line(info, "1/c.png", "data.on_broken")


def test_lazily_the_next_good_image_stands_in_with_its_own_label(tmp_path, caplog):
    files = {f"{i}/x.png": encoded(np.full((8, 8), i, np.uint8)) for i in range(6)}
    write_folder(tmp_path / "images", {**files, "2/x.png": b"", "5/x.png": b"no"})
    values = {"resolution": 8, "channels": 1, "memory_gb": 0.0}
    for workers in (0, 2):
        caplog.clear()
        dataset = data.load(settings(tmp_path, on_broken="skip", **values))
        images, labels = (torch.cat(parts) for parts in zip(*take(dataset, 4, workers=workers), strict=True))
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        expected = data.order(6, 5, torch.arange(24))
        expected[expected == 2], expected[expected == 5] = 3, 0
        assert torch.equal(labels, expected)
        assert len([r for r in caplog.records if "2/x.png" in r.getMessage()]) == 1  # once, not once an epoch
    with pytest.raises(ConfigError) as info:
        take(data.load(settings(tmp_path, on_broken="fail", **values)), 4, workers=2)
    one_line(info, "/x.png", "data.on_broken")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:/a.png", "..\\a.png", "../notes.txt"])
def test_zip_names_that_climb_are_refused(tmp_path, name):
    path = write_zip(tmp_path / "set.zip", {"ok.png": encoded(pixels(1)[0]), name: encoded(pixels(1)[0])})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="zip", path=path))
    one_line(info, "outside the archive")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.zip"]


def test_zip_bombs_and_odd_members_are_skipped_by_name(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "MAX_FILE", 1000)
    good = encoded(np.zeros((8, 8, 3), np.uint8))
    path = write_zip(tmp_path / "set.zip", {"a.png": good, "b.png": good + bytes(100_000)})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("c.png", good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("d.png", good)
    content = Path(path).read_bytes()
    at = content.rindex(b"d.png") - 46  # its entry in the central directory: set the flag "encrypted"
    Path(path).write_bytes(content[: at + 8] + b"\x01" + content[at + 9 :])
    dataset = data.load(settings(tmp_path, name="zip", path=path, on_broken="skip"))
    assert len(dataset) == 1
    messages = [record.getMessage() for record in caplog.records]
    for name, word in (("b.png", "unpacks to more"), ("c.png", "compression"), ("d.png", "encrypted")):
        assert any(name in message and word in message for message in messages), messages
    monkeypatch.setattr(finding, "MAX_JSON", 10)
    path = write_zip(tmp_path / "json.zip", {"a.png": good, "dataset.json": b'{"labels": null     }'})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, name="zip", path=path))
    one_line(info, "dataset.json", "unpacks to more")


def test_a_hundred_mutated_zips_give_a_dataset_or_one_line(tmp_path):
    logging.getLogger("sources").setLevel(logging.ERROR)
    files = {f"{i}.png": encoded(x) for i, x in enumerate(pixels(3))}
    files["dataset.json"] = json.dumps({"labels": [[name, 0] for name in files]}).encode()
    content = np.frombuffer(Path(write_zip(tmp_path / "set.zip", files)).read_bytes(), np.uint8)
    refused = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        mutated = content.copy()
        where = rng.integers(0, len(content), 1 + trial % 10)
        mutated[where] = rng.integers(0, 256, len(where))
        path = tmp_path / f"{trial}.zip"
        path.write_bytes(mutated[: len(mutated) - (trial % 7 == 0) * rng.integers(0, len(mutated))].tobytes())
        try:
            dataset = data.load(settings(tmp_path, name="zip", path=str(path), on_broken="skip"))
            assert 1 <= len(dataset) <= 3 and dataset.images.shape[1:] == (3, 8, 8)
        except ConfigError as error:
            assert "\n" not in str(error)
            refused += 1
    logging.getLogger("sources").setLevel(logging.NOTSET)
    assert 10 < refused < 100


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": None}, ["data.path", "set data.path"]),
        ({"path": "nowhere"}, ["nowhere", "does not exist"]),
        ({"path": "file.zip"}, ["not a folder", "data.name: zip"]),
        ({"path": "file.npz"}, ["not a folder", "data.name: npz"]),
        ({"name": "zip", "path": "here"}, ["not a .zip", "data.name: folder"]),
        ({"name": "npz", "path": "here"}, ["not a .npz", "data.name: folder"]),
        ({"name": "zip", "path": "file.zip"}, ["cannot be read as a zip"]),
        ({"name": "npz", "path": "file.npz"}, ["cannot be read as an npz"]),
        ({"path": "here"}, ["holds no images"]),
        ({"path": "bad"}, ["cannot be read", "a.png"]),
        ({"path": "bad", "on_broken": "skip"}, ["none of the 1 images"]),
    ],
)
def test_missing_and_wrong_paths(tmp_path, monkeypatch, values, words):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"file.zip": b"no", "file.npz": b"no", "here/x.txt": b"no", "bad/a.png": b"no"})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path, **values))
    one_line(info, *words)


def test_a_strange_file_name_stays_on_one_line(tmp_path):
    write_folder(tmp_path / "images", {"a\nb\x1b[31m.png": b"no"})
    with pytest.raises(ConfigError) as info:
        data.load(settings(tmp_path))
    one_line(info, "a\\nb\\x1b")
    assert str(info.value).isprintable()


def test_a_script_that_leaves_loading_processes_behind_ends(tmp_path):
    """They ignore SIGTERM, for which Python would wait at its exit for ever."""
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import config, data
cfg = config.parse({{"data": {{"name": "folder", "path": {str(tmp_path)!r}, "memory_gb": 0.0}}}}).data
kept = sys.modules["kept"] = data.batches(data.load(cfg), 0, 2, workers=1)
next(kept)
print("read")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "read" in done.stdout, done.stderr
