"""Tar and parquet shards: their order, labels, caches and damage; and that nothing is lost by a kill."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import data
from config import ConfigError, Data, parse
from sources import files, parquets, shards, tars

COUNT = 2000  # images of the large set, in 5 tars and in 2 parquet files
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def numbered(i: int) -> bytes:
    """A PNG of 8x8 pixels that say i."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), [i & 255, i >> 8, 7], np.uint8)).save(file, "png")
    return file.getvalue()


def read_numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 3, 3].long() + 256 * images[:, 1, 3, 3].long()).tolist()


def write_tar(path: Path, members: dict[str, bytes], **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_parquet(path: Path, columns: dict, features: dict | None = None, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return str(path)


def structs(numbers) -> pa.Array:
    return pa.array([{"bytes": numbered(i), "path": f"{i}.png"} for i in numbers], IMAGE)


def records(numbers, **labels) -> dict[str, bytes]:
    """Members of a tar; labels: the ending of each kind of them, and a function from number to text."""
    kinds = {"png": numbered, **{ending: lambda i, of=of: of(i).encode() for ending, of in labels.items()}}
    return {f"d/{i:05}.{ending}": of(i) for i in numbers for ending, of in kinds.items()}


def settings(tmp_path: Path, name: str, path, **values) -> Data:
    return Data(**{"name": name, "path": str(path), "dir": str(tmp_path / "data"), "memory_gb": 0.0, **values})


def refused(cfg: Data, *words: str) -> None:
    with pytest.raises(ConfigError) as info:
        data.load(cfg)
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Data]:
    """COUNT images, image i labelled i % 10, in both formats."""
    root = tmp_path_factory.mktemp("large")
    for start in range(0, COUNT, 400):
        members = records(range(start, start + 400), cls=lambda i: str(i % 10))
        write_tar(root / "tar" / f"{start:05}.tar", members)
    for start in range(0, COUNT, 1000):
        numbers = range(start, start + 1000)
        columns = {"image": structs(numbers), "label": [i % 10 for i in numbers]}
        write_parquet(root / "parquet" / f"train-{start:05}.parquet", columns, row_group_size=300)
    return {name: settings(root, name, root / name, conditional=True) for name in ("tar", "parquet")}


FORMATS = pytest.mark.parametrize("name", ["tar", "parquet"])


def stream(cfg: Data, steps: int, **options) -> list[int]:
    """The numbers of the images that batches of 100 give; asserts that each has its own label."""
    batches = data.batches(data.load(cfg), **{"seed": 3, "batch_size": 100, **options})
    numbers = []
    for images, labels in itertools.islice(batches, steps):
        numbers += read_numbers(images)
        assert labels.tolist() == [i % 10 for i in numbers[-len(labels) :]]
    batches.close()
    return numbers


# Order ---------------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_that_of_any_other_set(large, name, workers):
    expected = data.order(COUNT, 3, torch.arange(2 * COUNT)).tolist()
    assert stream(large[name], 25, workers=workers) == expected[:2500]  # more than an epoch
    assert stream(large[name], 3, workers=workers, start_step=30) == expected[3000:3300]


@FORMATS
def test_two_ranks_share_a_batch(large, name):
    parts = [stream(large[name], 20, rank_slice=rows) for rows in ((0, 40), (40, 100))]
    assert sorted(parts[0] + parts[1]) == list(range(COUNT))
    assert parts[0][:40] + parts[1][:60] == data.order(COUNT, 3, torch.arange(100)).tolist()


@FORMATS
def test_what_fits_is_decoded_once_and_the_same(large, name, monkeypatch):
    monkeypatch.setattr(files, "CACHE_SECONDS", -1)
    lazy = data.load(large[name])
    cfg = large[name].model_copy(update={"memory_gb": 1.0})
    resident = data.load(cfg)
    assert lazy.images is None and resident.images is not None and resident.files is None
    some = torch.tensor([1999, 0, 400, 7])
    assert torch.equal(lazy.batch(some), resident.batch(some)) and read_numbers(lazy.batch(some)) == some.tolist()
    assert lazy.facts() == resident.facts() and "2,000 images of 8x8 RGB" in lazy.said()[0]
    with monkeypatch.context() as patch:
        patch.setattr(files.Files, "decode", None)
        assert torch.equal(data.load(cfg).images, resident.images)


def test_a_fingerprint_is_of_the_images_not_of_where_they_lie(large):
    assert data.load(large["tar"]).facts()["fingerprint"] == data.load(large["parquet"]).facts()["fingerprint"]


READER = """
import sys; sys.path.insert(0, sys.argv[1])
import config, data
if __name__ == "__main__":
    dataset = data.load(config.Data(**eval(sys.argv[2])))
    for step, (images, labels) in enumerate(data.batches(dataset, 3, 100, workers=1)):
        print(*(images[:, 0, 3, 3].long() + 256 * images[:, 1, 3, 3].long()).tolist(), flush=True)
"""


@FORMATS
def test_killed_in_the_middle_every_image_of_the_epoch_is_read_once(large, name):
    command = [sys.executable, "-c", READER, str(Path(data.__file__).parent), repr(large[name].model_dump())]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [reader.stdout.readline() for _ in range(8)]
    reader.kill()  # SIGKILL: it has read ahead, and tells nobody
    reader.communicate()
    before = [int(number) for line in lines for number in line.split()]
    after = stream(large[name], 12, start_step=8)
    assert len(before) == 800 and sorted(before + after) == list(range(COUNT))


# Which files ---------------------------------------------------------------------------------------------------------


def test_a_path_is_a_folder_a_file_or_a_pattern(tmp_path):
    for i in range(8, 12):
        write_tar(tmp_path / "s" / f"a-{i:02}.tar", records([i]))
    (tmp_path / "s" / ".hidden.tar").write_bytes(b"no")
    for path, expected in (("s", [8, 9, 10, 11]), ("s/a-{08..10}.tar", [8, 9, 10]), ("s/*-1?.tar", [10, 11])):
        dataset = data.load(settings(tmp_path, "tar", tmp_path / path))
        assert read_numbers(dataset.batch(torch.arange(len(dataset)))) == expected
    assert data.load(settings(tmp_path, "tar", tmp_path / "s/a-11.tar")).source.names[0] == "a-11.tar: d/00011.png"
    refused(settings(tmp_path, "tar", tmp_path / "s/a-{10..99999999}.tar"), "a-12.tar does not exist")
    refused(settings(tmp_path, "tar", tmp_path / "s/b-*.tar"), "b-*.tar does not exist", "a-{000..049}.tar")
    refused(settings(tmp_path, "parquet", tmp_path / "s"), "holds no .parquet files")
    refused(settings(tmp_path, "parquet", tmp_path / "s/a-08.tar"), "is not a .parquet file")
    refused(settings(tmp_path, "tar", tmp_path / "s").model_copy(update={"path": None}), "set data.path to it")


def test_other_readers_say_who_reads_shards(tmp_path):
    path = write_tar(tmp_path / "s" / "a.tar", records([1]))
    refused(settings(tmp_path, "folder", tmp_path / "s"), "1 .tar; set data.name: tar")
    refused(settings(tmp_path, "folder", path), "set data.name: tar")
    write_parquet(tmp_path / "p" / "a.parquet", {"image": structs([1])})
    refused(settings(tmp_path, "folder", tmp_path / "p"), "1 .parquet; set data.name: parquet")
    with pytest.raises(ConfigError, match=r"image_column: is for data.name: parquet"):
        parse({"data": {"name": "tar", "path": "x", "image_column": "img"}})


def test_parts_of_a_split_are_not_read_as_one_set(tmp_path):
    for part in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "hub" / "data" / f"{part}.parquet", {"image": structs([1, 2])})
    good = tmp_path / "hub" / "data" / "train*.parquet"
    refused(settings(tmp_path, "parquet", tmp_path / "hub"), "test and train: parts of a split", f"to {good}")
    assert len(data.load(settings(tmp_path, "parquet", good))) == 4
    for part in ("train", "val"):
        write_tar(tmp_path / "w" / part / "0000.tar", records([1]))
    refused(settings(tmp_path, "tar", tmp_path / "w"), "train and val", f"to {tmp_path / 'w' / 'train'}")


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ({"cls": lambda i: f"{i % 3}\n"}, ["0", "1", "2"], None),
        (
            {"json": lambda i: json.dumps({"label": i % 3, "x": 1}), "txt": lambda i: "a caption"},
            ["0", "1", "2"],
            ".txt",
        ),
        ({"json": lambda i: json.dumps({"x": 1}), "txt": lambda i: str(i % 3)}, ["0", "1", "2"], ".json"),
        ({"cls": lambda i: ["cat", "dog", "emu"][i % 3]}, ["cat", "dog", "emu"], None),
        ({"json": lambda i: json.dumps({"label": 9}), "cls": lambda i: str(i % 3)}, ["0", "1", "2"], None),
    ],
)
def test_labels_of_a_tar(tmp_path, labels, classes, said):
    path = write_tar(tmp_path / "a.tar", records(range(9), **labels))
    dataset = data.load(settings(tmp_path, "tar", path, conditional=True))
    assert dataset.labels.tolist() == [i % 3 for i in range(9)] and dataset.class_names == classes
    assert (f"left out: 9 {said}" in dataset.said()[0]) if said else "left out" not in dataset.said()[0]


def test_labels_of_some_records_are_refused_or_left_out(tmp_path):
    members = records(range(6), cls=lambda i: str(i % 3))
    for gone, words in (("d/00002.cls", ["no label to its record 3"]), ("d/00004.cls", ["no label to its record 5"])):
        path = write_tar(tmp_path / "a.tar", {name: text for name, text in members.items() if name != gone})
        refused(settings(tmp_path, "tar", path, conditional=True), "a.tar", *words)
    dataset = data.load(settings(tmp_path, "tar", path))
    assert dataset.labels is None and len(dataset) == 6 and "labels, which are not used" in dataset.said()[0]
    write_tar(tmp_path / "two" / "a.tar", members)
    write_tar(tmp_path / "two" / "b.tar", records(range(6)))
    refused(settings(tmp_path, "tar", tmp_path / "two", conditional=True), "b.tar has no labels, and", "a.tar has")
    write_tar(tmp_path / "two" / "b.tar", records([7], cls=lambda i: "cat"))
    refused(settings(tmp_path, "tar", tmp_path / "two", conditional=True), "numbers as labels in some")
    path = write_tar(tmp_path / "c.tar", records([7], json=lambda i: '{"label": [0, 1]}'))
    refused(settings(tmp_path, "tar", path, conditional=True), "not all whole numbers", "[0, 1]")
    path = write_tar(tmp_path / "d.tar", records([6, 7], cls=lambda i: str(6 - i)))
    refused(settings(tmp_path, "tar", path, conditional=True), "not -1", "d.tar: d/00007.png")
    refused(settings(tmp_path, "tar", write_tar(tmp_path / "e.tar", records([7])), conditional=True), "has no labels")


def test_labels_of_a_parquet_are_what_it_says_of_its_columns(tmp_path):
    numbers, names = range(6), {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}
    columns = {"id": list(numbers), "img": structs(numbers), "kind": [i % 3 for i in numbers]}
    path = write_parquet(tmp_path / "a.parquet", columns, {"img": {"_type": "Image"}, "kind": names})
    dataset = data.load(settings(tmp_path, "parquet", path, conditional=True))
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2] and dataset.class_names == ["cat", "dog", "emu"]
    path = write_parquet(tmp_path / "b.parquet", columns)  # says nothing
    refused(settings(tmp_path, "parquet", path, conditional=True), "has no labels", "data.label_column")
    dataset = data.load(settings(tmp_path, "parquet", path, conditional=True, label_column="kind"))
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2] and dataset.class_names == ["0", "1", "2"]
    refused(settings(tmp_path, "parquet", path, label_column="img"), "no column img", "id (int64), img (struct<")
    text = pa.array(["dog", "cat"] * 3)
    for label in (text, text.dictionary_encode()):
        path = write_parquet(tmp_path / "c.parquet", {"image": columns["img"], "label": label})
        dataset = data.load(settings(tmp_path, "parquet", path, conditional=True))
        assert dataset.labels.tolist() == [1, 0] * 3 and dataset.class_names == ["cat", "dog"]
    path = write_parquet(tmp_path / "d.parquet", {"image": columns["img"], "label": [0, 1, None, 1, 1, 1]})
    refused(settings(tmp_path, "parquet", path, conditional=True), "no label to its record 3")
    both = {**columns, "fine": columns["kind"]}
    path = write_parquet(tmp_path / "e.parquet", both, {"fine": names, "kind": names})
    refused(settings(tmp_path, "parquet", path, conditional=True), "kind and fine; set data.label_column to one")
    assert "labels, which are not used" in data.load(settings(tmp_path, "parquet", path)).said()[0]
    dataset = data.load(settings(tmp_path, "parquet", path, conditional=True, label_column="kind"))
    assert dataset.class_names == ["cat", "dog", "emu"]
    other = {"_type": "ClassLabel", "names": ["a", "b", "c"]}
    write_parquet(tmp_path / "two" / "0.parquet", columns, {"kind": names})
    write_parquet(tmp_path / "two" / "1.parquet", columns, {"kind": other})
    refused(settings(tmp_path, "parquet", tmp_path / "two", conditional=True), "call their classes differently")


# What is no set of images --------------------------------------------------------------------------------------------


def test_columns_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE_SECONDS", -1)
    plain = pa.array([numbered(i) for i in range(4)])
    for kind in (pa.binary(), pa.large_binary()):
        path = write_parquet(tmp_path / "a.parquet", {"x": plain.cast(kind), "text": ["a"] * 4}, row_group_size=3)
        assert read_numbers(data.load(settings(tmp_path, "parquet", path)).batch(torch.arange(4))) == [0, 1, 2, 3]
    path = write_parquet(tmp_path / "b.parquet", {"id": [1], "text": ["a"]})
    refused(settings(tmp_path, "parquet", path), "no column of images", "its columns: id (int64), text (string)")
    path = write_parquet(tmp_path / "c.parquet", {"x": plain, "y": plain[::-1]})
    refused(settings(tmp_path, "parquet", path), "data.image_column", "x and y; set it to one")
    for memory_gb in (0.0, 1.0):  # lazily; and decoded, which is kept for each column
        for column, expected in (("y", [3, 2, 1, 0]), ("x", [0, 1, 2, 3])):
            cfg = settings(tmp_path, "parquet", path, image_column=column, memory_gb=memory_gb)
            assert read_numbers(data.load(cfg).batch(torch.arange(4))) == expected
    refused(settings(tmp_path, "parquet", path, image_column="z"), "no column z of images", "x (binary), y (binary)")
    paths = pa.array([{"bytes": None, "path": "a.png"}], IMAGE)
    refused(settings(tmp_path, "parquet", write_parquet(tmp_path / "d.parquet", {"image": paths})), "holds no bytes")
    path = write_parquet(tmp_path / "e.parquet", {"image": structs([]), "x": plain[:0]})
    refused(settings(tmp_path, "parquet", path), "holds no images")
    path = write_parquet(tmp_path / "f.parquet", {"mask": plain, "image": structs(range(4))})  # a struct goes before
    assert len(data.load(settings(tmp_path, "parquet", path))) == 4


def test_the_bytes_of_a_part_of_a_column_with_nulls():
    for kind in (pa.binary(), pa.large_binary()):
        column = pa.array([b"one", b"three", None, b"", b"no"], kind)
        for part, expected in ((column.slice(1, 3), [5, 0, 0]), (column.slice(1, 1), [5])):
            lengths, values = parquets._bytes_of(part)
            assert lengths.tolist() == expected and bytes(values) == b"three"
    assert parquets._bytes_of(pa.array([None], pa.binary()))[0].tolist() == [0]


def test_tars_without_images_with_two_in_a_record_or_compressed(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"x", "b.npy": b"y", "b.cls": b"1"})
    refused(settings(tmp_path, "tar", path), "holds no images", "1 .npy, 1 .txt, 1 record without an image")
    path = write_tar(tmp_path / "b.tar", {"d/a.left.png": numbered(1), "d/a.right.png": numbered(2)})
    refused(settings(tmp_path, "tar", path), "record d/a in", "a.left.png and a.right.png", "first dot")
    (tmp_path / "c.tar").write_bytes(gzip.compress(Path(path).read_bytes()))
    refused(settings(tmp_path, "tar", tmp_path / "c.tar"), "is compressed; unpack it")
    (tmp_path / "d.tar").write_bytes(b"hello" * 1000)
    refused(settings(tmp_path, "tar", tmp_path / "d.tar"), "d.tar is damaged or cut short at record 1")
    path = write_tar(tmp_path / "e.tar", {"./x/a.PNG": numbered(1), "./x/._a.png": b"", "y/a.input.png": numbered(2)})
    assert list(data.load(settings(tmp_path, "tar", path)).source.names) == ["e.tar: ./x/a.PNG", "e.tar: y/a.input.png"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_members_apart_are_read(tmp_path, form):
    members = {f"{'x' * 150}{i}/a.png": numbered(i) for i in range(3)}
    members |= {f"{'x' * 150}{i}/a.cls": str(i).encode() for i in range(3)}  # not beside their images
    dataset = data.load(
        settings(tmp_path, "tar", write_tar(tmp_path / "a.tar", members, format=form), conditional=True)
    )
    assert read_numbers(dataset.batch(torch.arange(3))) == [0, 1, 2] == dataset.labels.tolist()
    assert dataset.source.names[1].startswith("a.tar: xxxx")


def test_a_broken_image_is_named_and_skipped_as_in_a_zip(tmp_path, caplog):
    members = {**records(range(5)), "d/00002.png": b"no image"}
    for values in ({"memory_gb": 0.0}, {"memory_gb": 1.0}):
        cfg = settings(tmp_path, "tar", write_tar(tmp_path / "a.tar", members), on_broken="skip", **values)
        caplog.clear()
        dataset = data.load(cfg)
        numbers = read_numbers(dataset.batch(torch.arange(len(dataset))))
        assert numbers == ([0, 1, 3, 3, 4] if dataset.images is None else [0, 1, 3, 4])
        assert "a.tar: d/00002.png in" in caplog.text and "left out: 1 broken" in dataset.said()[0]
    refused(cfg.model_copy(update={"on_broken": "fail"}), "a.tar: d/00002.png", "set data.on_broken: skip")


@pytest.mark.parametrize("labelled", [False, True])
def test_a_truncated_tar_says_at_which_record(tmp_path, caplog, labelled):
    labels = {"cls": lambda i: str(i)} if labelled else {}
    whole = Path(write_tar(tmp_path / "whole.tar", records(range(5), **labels))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmember("d/00002.png")
    in_data, in_header, between = third.offset_data + 20, third.offset + 100, third.offset
    mid = bytearray(whole)
    mid[third.offset : third.offset + 512] = b"\xff" * 512
    cases = [whole[:in_data], whole[:in_header], whole[:between], bytes(mid)]
    for content, record in zip(cases, [3, 2, 2, 2], strict=True):  # the last header may be of a record that goes on
        path = tmp_path / "s" / "cut.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        refused(settings(tmp_path, "tar", path), f"cut.tar is damaged or cut short at record {record} (d/0000")
        write_tar(tmp_path / "s" / "good.tar", records([7], **labels))
        dataset = data.load(settings(tmp_path, "tar", tmp_path / "s", on_broken="skip", conditional=labelled))
        assert read_numbers(dataset.batch(torch.arange(len(dataset)))) == [*range(record - 1), 7]
        assert dataset.labels is None or dataset.labels.tolist() == [*range(record - 1), 7]
        assert "1 shard cut short" in dataset.said()[0]


def test_a_truncated_parquet_is_named(tmp_path):
    path = tmp_path / "s" / "a.parquet"
    content = Path(write_parquet(path, {"image": structs(range(50))}, row_group_size=10)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(settings(tmp_path, "parquet", path), "a.parquet cannot be read", "data.on_broken: skip")
    write_parquet(tmp_path / "s" / "b.parquet", {"image": structs([7, 8])})
    dataset = data.load(settings(tmp_path, "parquet", tmp_path / "s", on_broken="skip"))
    assert read_numbers(dataset.batch(torch.arange(len(dataset)))) == [7, 8]
    assert "1 damaged shard" in dataset.said()[0]
    at = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(3).column(0).dictionary_page_offset
    path.write_bytes(content[:at] + b"\xff" * 60 + content[at + 60 :])  # the footer is whole
    refused(settings(tmp_path, "parquet", path), "a.parquet is damaged after its first 30 rows")


# What is kept --------------------------------------------------------------------------------------------------------


@FORMATS
def test_an_index_is_made_once_and_never_stale(tmp_path, monkeypatch, name):
    def write(numbers):
        if name == "tar":
            return write_tar(tmp_path / "a.tar", records(numbers, cls=lambda i: str(i % 2)))
        return write_parquet(tmp_path / "a.parquet", {"image": structs(numbers), "label": [i % 2 for i in numbers]})

    def numbers() -> list[int]:
        dataset = data.load(settings(tmp_path, name, path, conditional=True))
        assert dataset.labels.tolist() == [i % 2 for i in read_numbers(dataset.batch(torch.arange(3)))]
        return read_numbers(dataset.batch(torch.arange(3)))

    path = write([1, 2, 3])
    assert numbers() == [1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr({"tar": tars, "parquet": parquets}[name], "index", None)
        assert numbers() == [1, 2, 3]
    write([4, 5, 6])
    os.utime(path, (time.time() + 5,) * 2)
    assert numbers() == [4, 5, 6]
    for kept in (tmp_path / "data" / "cache").iterdir():  # damaged: made again
        kept.write_bytes(kept.read_bytes()[:-50])
    assert numbers() == [4, 5, 6]
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_without_room_a_tar_is_read_and_a_parquet_says_what_to_do(tmp_path, caplog):
    (tmp_path / "data").write_bytes(b"a file, where a folder should be")
    assert len(data.load(settings(tmp_path, "tar", write_tar(tmp_path / "a.tar", records([1]))))) == 1
    assert "data.dir: where the images of" in caplog.text
    path = write_parquet(tmp_path / "a.parquet", {"image": structs([1])})
    refused(settings(tmp_path, "parquet", path), "data.dir", "could not be unpacked", "with room for them")


def test_shards_cost_the_same_however_many_images_they_hold(large):
    """What a loading process is given is arrays: no list of names, whose every use would copy memory after a fork."""
    found = data.load(large["tar"]).files
    assert isinstance(found, shards.Shards) and found.places.nbytes == COUNT * 24
    assert len(found.names) == COUNT and not any(
        isinstance(part, list) and len(part) > 5 for part in vars(found).values()
    )
