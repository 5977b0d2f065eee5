"""Checkpoints: whole or not at all, and never code."""

import os
import pickle
import zipfile

import pytest
import torch
from conftest import tiny

import checkpoints
import networks
from training.trainer import Trainer


@pytest.fixture
def trained(tmp_path):
    run = Trainer(tiny(tmp_path))
    with torch.no_grad():  # the average is not the weights: a test can tell them apart
        for p in run.emas[0].module.parameters():
            p.add_(torch.randn_like(p))
    return run, checkpoints.save(run.state(), tmp_path / "checkpoints", 3, keep=2)


def test_load_model_gives_the_ema_not_the_raw_weights(trained):
    run, path = trained
    model = checkpoints.load_model(path)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 80.0])
    assert torch.equal(model(x, sigma), run.emas[0].module(x, sigma))
    assert not torch.allclose(model(x, sigma), run.model.eval()(x, sigma))
    second = checkpoints.load_model(path, average=1)
    assert torch.equal(second(x, sigma), run.emas[1].module(x, sigma))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_newest_few_and_last_are_kept(trained):
    run, path = trained
    for step in (5, 10, 100):
        checkpoints.save(run.state(), path.parent, step, keep=2)
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["last.ckpt", "step-00000010.ckpt", "step-00000100.ckpt"]
    assert (path.parent / "last.ckpt").read_bytes() == (path.parent / "step-00000100.ckpt").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoints.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new, half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.ckpt"]


def test_damage_is_named_never_loaded(trained, tmp_path):
    _, path = trained
    good, reference = path.read_bytes(), checkpoints.load(path)
    bad = tmp_path / "bad.ckpt"
    for i in range(20):  # cut short
        bad.write_bytes(good[: len(good) * i // 20])
        with pytest.raises(checkpoints.CheckpointError, match=r"bad\.ckpt"):
            checkpoints.load(bad)
    refused = 0
    for i in range(60):  # one bit turned over: refused, or (padding) of no effect
        place = (len(good) * (2 * i + 1)) // 120
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1 << i % 8]) + good[place + 1 :])
        try:
            state = checkpoints.load(bad)
        except checkpoints.CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(state["model"][k], v) for k, v in reference["model"].items())
    assert refused > 40


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
    _, path = trained
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
    run, path = trained
    newer = checkpoints.save(run.state(), path.parent, 7, keep=3)
    newer.write_bytes(newer.read_bytes()[:1000])  # and with it last.ckpt, the same file by another name
    found, _, problems = checkpoints.newest_good(path.parent)
    assert found == path and len(problems) == 2 and "last.ckpt" in problems[0]
