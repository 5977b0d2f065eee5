"""Checkpoints: whole or not at all, and never code."""

import copy
import os
import pickle
import runpy
import sys
import zipfile

import pytest
import torch
from conftest import tiny

import checkpoints
import networks
from checkpoints import disk, state
from sources.codecs import ImageCodec


@pytest.fixture
def trained(tmp_path):
    """A state as a run has it, its two averages as models, and the checkpoint that holds them."""
    cfg = tiny(tmp_path)
    codec = ImageCodec(8, 1, class_counts=None)
    model, *emas = (networks.build(cfg.network.model_dump(), **codec.network_shape).eval() for _ in range(3))
    with torch.no_grad():  # an average is not the weights: a test can tell them apart
        for p in (*emas[0].parameters(), *emas[1].parameters()):
            p.add_(torch.randn_like(p))
    whole = {"step": 3, "config": cfg.model_dump(), "data": codec.state(), "objective": {}, "optimizer": {}}
    whole |= {"model": model.state_dict(), "ema": [ema.state_dict() for ema in emas]}
    return whole, emas, checkpoints.save(whole, tmp_path / "checkpoints", 3, keep=2)


def test_load_model_gives_the_ema_not_the_raw_weights(trained):
    whole, emas, path = trained
    model = checkpoints.load_model(path)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 80.0])
    assert torch.equal(model(x, sigma), emas[0](x, sigma))
    raw = checkpoints.model_from({**whole, "ema": [whole["model"]]}, path)
    assert not torch.allclose(model(x, sigma), raw(x, sigma))
    second = checkpoints.load_model(path, average=1)
    assert torch.equal(second(x, sigma), emas[1](x, sigma))
    assert not torch.equal(model(x, sigma), second(x, sigma))
    with pytest.raises(checkpoints.CheckpointError, match="has 2 averages, no number 2"):
        checkpoints.load_model(path, average=2)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_newest_few_and_last_are_kept(trained):
    whole, _, path = trained
    for step in (5, 10, 100):
        checkpoints.save(whole, path.parent, step, keep=2)
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["last.ckpt", "step-00000010.ckpt", "step-00000100.ckpt"]
    assert (path.parent / "last.ckpt").read_bytes() == (path.parent / "step-00000100.ckpt").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.ckpt"
    disk.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new, half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        disk.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.ckpt"]


def test_damage_is_named_never_loaded(trained, tmp_path):
    *_, path = trained
    good, reference = path.read_bytes(), checkpoints.load(path)
    bad = tmp_path / "bad.ckpt"
    for i in range(20):  # cut short
        bad.write_bytes(good[: len(good) * i // 20])
        with pytest.raises(checkpoints.CheckpointError, match=r"bad\.ckpt"):
            checkpoints.load(bad)
    for i in range(60):  # one bit turned over
        place = (len(good) * (2 * i + 1)) // 120
        bad.write_bytes(turned(good, place, i % 8))
        with pytest.raises(checkpoints.CheckpointError, match=r"bad\.ckpt") as error:
            checkpoints.load(bad)
        assert "\n" not in str(error.value)
    for cut in range(1, state.CHECKSUM + 1):  # the checksum is not whole, or is gone
        bad.write_bytes(good[:-cut])
        with pytest.raises(checkpoints.CheckpointError, match=r"its checksum is wrong|is not a zip file"):
            checkpoints.load(bad)
    bad.write_bytes(good)
    assert all(torch.equal(checkpoints.load(bad)["model"][k], v) for k, v in reference["model"].items())


def turned(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def small(path, **more):
    """A checkpoint of the parts that every one has, and no network."""
    parts = {name: kind([0] if kind is list else 1 if kind is int else {}) for name, kind in state.PARTS.items()}
    checkpoints.write_state(path, {**parts, "model": {"w": torch.arange(5000.0)}, **more})
    return path


def test_nothing_is_read_before_the_checksum_is_right(tmp_path, monkeypatch):
    path = small(tmp_path / "a.ckpt")
    content = path.read_bytes()
    checkpoints.load(path)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    for place in range(0, len(content), 97):
        path.write_bytes(turned(content, place, place % 8))
        with pytest.raises(checkpoints.CheckpointError, match=r"checksum is wrong|is not a zip"):
            checkpoints.load(path)


def test_files_from_before_the_checksum_are_read(tmp_path):
    """They hold the zip's own CRC-32 only; those that came next also said inside that they have a checksum."""
    path = small(tmp_path / "a.ckpt", sealed=True)
    assert torch.equal(checkpoints.load(path)["model"]["w"], torch.arange(5000.0))
    torch.save({"format": state.FORMAT, **checkpoints.load(path)}, path)
    content = path.read_bytes()
    assert content[-22:].startswith(b"PK\5\6") and b"sha256:" not in content
    assert torch.equal(checkpoints.load(path)["model"]["w"], torch.arange(5000.0))
    path.write_bytes(turned(content, content.index(torch.arange(5000.0).numpy().tobytes()) + 999, 3))
    with pytest.raises(checkpoints.CheckpointError, match=r"a\.ckpt: damaged: the checksum of .*/data/0 is wrong"):
        checkpoints.load(path)
    for part in range(20):
        path.write_bytes(content[: len(content) * part // 20])
        with pytest.raises(checkpoints.CheckpointError, match=r"a\.ckpt"):
            checkpoints.load(path)


@pytest.mark.parametrize("checksum", [False, True])
def test_files_that_unpack_to_more_than_their_size_are_refused(tmp_path, checksum):
    def deflated(file):
        with zipfile.ZipFile(small(tmp_path / "a.ckpt")) as old, zipfile.ZipFile(file, "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, bytes(10_000_000) if name.endswith("/0") else old.read(name))

    def overlapping(file):  # its list of contents names one member a thousand times
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", bytes(10_000))
            for i in range(1000):
                twin = copy.copy(archive.infolist()[0])
                twin.filename = twin.orig_filename = f"archive/data/{i}"
                archive.filelist.append(twin)

    for make in (deflated, overlapping):
        bad = tmp_path / "bad.ckpt"
        with open(bad, "w+b") as file:
            make(file)
            if checksum:
                file.write(state._checksum(file, file.seek(-2, os.SEEK_END)))
        with pytest.raises(checkpoints.CheckpointError, match=r"bad\.ckpt: refused: it unpacks to more than its size"):
            checkpoints.load(bad)


def test_a_file_made_by_hand_is_one_line(trained, tmp_path):
    whole, *_ = trained
    for part in (
        {"data": {}},
        {"data": {**whole["data"], "shape": {"resolution": -1, "channels": 1}}},
        {"data": {**whole["data"], "scaling": {"mean": "x"}}},
        {"ema": [{1: torch.zeros(1)}]},
        {"ema": [{"a": torch.zeros(1)}]},
        {"ema": [None]},
    ):
        checkpoints.write_state(tmp_path / "a.ckpt", {**whole, **part})
        with pytest.raises(checkpoints.CheckpointError, match=r"a\.ckpt: ") as error:
            checkpoints.load_model(tmp_path / "a.ckpt")
        assert "\n" not in str(error.value)


def test_the_model_carries_what_knows_its_data(trained):
    whole, _, path = trained
    model = checkpoints.load_model(path)
    assert model.codec.kind == "images" and model.codec.state() == checkpoints.load(path)["data"]
    assert list(model.state_dict()) == list(whole["model"])  # and it is no part of the weights


def test_the_old_name_of_the_command_still_works(monkeypatch, tmp_path, capsys):
    import checkpoint

    assert checkpoint.load_model is checkpoints.load_model
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "export", str(tmp_path / "no"), "out", "--to", "onnx"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(checkpoint.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 2
    assert "now called convert.py" in err.split("\n")[0] and "no such checkpoint" in err.split("\n")[1]


def test_code_in_a_file_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "trap.ckpt"
    torch.save({"format": 1, "model": Trap()}, path)
    with pytest.raises(checkpoints.CheckpointError, match=r"trap\.ckpt"):
        checkpoints.load(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(checkpoints.CheckpointError):
        checkpoints.load(path)
    assert not (tmp_path / "sprung").exists()


def test_other_files_are_named(tmp_path):
    for name, make in {
        "empty.ckpt": lambda p: p.write_bytes(b""),
        "other.ckpt": lambda p: torch.save({"weights": torch.zeros(1)}, p),
        "future.ckpt": lambda p: torch.save({"format": 99}, p),
        "photos.zip": lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"),
    }.items():
        make(tmp_path / name)
        with pytest.raises(checkpoints.CheckpointError, match=name):
            checkpoints.load(tmp_path / name)
    with pytest.raises(checkpoints.CheckpointError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "missing.ckpt")


def test_weights_of_another_network_are_refused_by_the_first_difference(trained, tmp_path):
    *_, path = trained
    build = lambda **kw: networks.Preconditioner(networks.SongUNet(8, 1, 1, **{**SAME, **kw}))  # noqa: E731
    checkpoints.initialise(build(), path)
    with pytest.raises(checkpoints.CheckpointError, match=r"another network: .* is \[.*\] there and \[.*\] here"):
        checkpoints.initialise(build(model_channels=12), path)
    with pytest.raises(checkpoints.CheckpointError, match=r"another network: .* has no place in this one"):
        checkpoints.initialise(build(attn_resolutions=[]), path)
    with pytest.raises(checkpoints.CheckpointError, match=r"another network: it has no model\.dec\.8x8_block1\.norm2"):
        checkpoints.initialise(build(attn_resolutions=[4, 8]), path)


SAME = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def test_newest_good_falls_back(trained):
    whole, _, path = trained
    newer = checkpoints.save(whole, path.parent, 7, keep=3)
    newer.write_bytes(newer.read_bytes()[:1000])  # and with it last.ckpt, the same file by another name
    found, _, problems = checkpoints.newest_good(path.parent)
    assert found == path and len(problems) == 2 and "last.ckpt" in problems[0]
