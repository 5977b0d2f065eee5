"""Runs resumed on other data than they were trained on, and the names of classes: reported cases, and like ones."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_reports_runs import LAZY, command, pictures, run_main, tree

import checkpoints
import config
from training import trainer


def renamed_class(images):
    (images / "owl").rename(images / "bird")


def swapped_classes(images):
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (images / old).rename(images / new)


def replaced_images(images):
    pictures(images, ("cat",), seed=9)


def one_replaced(images):
    Image.new("L", (8, 8), 3).save(images / "owl" / "003.png")


def fewer_images(images):
    (images / "dog" / "007.png").unlink()


def another_class(images):
    pictures(images, ("zebra",), seed=3)


def moved_between_classes(images):
    (images / "dog" / "007.png").rename(images / "owl" / "099.png")


DIFFERENT = [
    (renamed_class, "class 0 was 'cat', is 'bird'"),
    (swapped_classes, "other images: fingerprint [0-9a-f]+, was [0-9a-f]+"),
    (replaced_images, "other images: fingerprint"),
    (one_replaced, "other images: fingerprint"),
    (fewer_images, "71 images, were 72"),
    (another_class, "4 classes, were 3; 96 images, were 72"),
    (moved_between_classes, r"class 1 \('dog'\) has 23 images, had 24"),
]


@pytest.mark.parametrize("memory_gb", [0.0, 4.0])
@pytest.mark.parametrize(("change", "words"), DIFFERENT)
def test_other_data_are_named_and_need_a_word(change, words, memory_gb, tmp_path, capfd):
    images = pictures(tmp_path / "images", ("cat", "dog", "owl"))
    settings = {**LAZY, "path": str(images), "workers": 0, "memory_gb": memory_gb, "conditional": True}
    trainer.train(tiny(tmp_path / "r", data=settings))
    before = tree(tmp_path / "r")
    resume = ["--cfg", tmp_path / "r" / "config.yml", "--resume", "train.steps=8"]
    change(images)
    code, _, err = run_main(capfd, *resume)
    assert code == 2 and err.count("\n") == 1 and re.search(words, err) and "--other-data" in err, err
    assert tree(tmp_path / "r") == before
    code, out, err = run_main(capfd, *resume, "--other-data")
    if change is another_class:  # the network has a place for three
        assert code == 2 and "does not fit this run" in err
        return
    assert code == 0 and "step 6 of 8" in out and re.search(words, err), err
    assert run_main(capfd, *resume)[0] == 0  # from now on these are its data


def test_the_same_data_elsewhere_in_or_out_of_memory_are_no_other_data(tmp_path, capfd):
    images = pictures(tmp_path / "images", ("cat", "dog"))
    settings = {**LAZY, "path": str(images), "workers": 0, "conditional": True}
    trainer.train(tiny(tmp_path / "r", data=settings))
    shutil.copytree(images, tmp_path / "copy")
    for path in tmp_path.glob("copy/*/*"):
        os.utime(path, (1, 1))
    resume = ["--cfg", tmp_path / "r" / "config.yml", "--resume"]
    assert run_main(capfd, *resume, f"data.path={tmp_path / 'copy'}", "data.memory_gb=4.0", "train.steps=8")[0] == 0


@pytest.mark.parametrize("facts", ["absent", "None"])
def test_a_checkpoint_from_before_facts_were_kept_goes_on(facts, tmp_path, capfd):
    trainer.train(tiny(tmp_path))
    state = checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")
    assert state["data"]["data"]["count"] == 1797 and len(state["data"]["data"]["fingerprint"]) >= 16
    for name in ("data", "classes"):
        state["data"].pop(name) if facts == "absent" else state["data"].update({name: None})
    state.pop("streak")
    checkpoints.save(state, tmp_path / "checkpoints", 6, 1)
    assert run_main(capfd, "--cfg", tmp_path / "config.yml", "--resume", "train.steps=8")[0] == 0
    assert checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")["data"]["data"]["count"] == 1797


def test_what_a_checkpoint_says_of_its_data_may_be_nonsense(tmp_path, capfd):
    trainer.train(tiny(tmp_path))
    state = checkpoints.load(tmp_path / "checkpoints" / "last.ckpt")
    for nonsense in (5, {"count": 3}, {**state["data"]["data"], "size": 4, "counts": 3}):
        state["data"]["data"] = nonsense
        checkpoints.save(state, tmp_path / "checkpoints", 6, 1)
        code, _, err = run_main(capfd, "--cfg", tmp_path / "config.yml", "--resume")
        assert code == 2 and err.count("\n") == 1 and "Traceback" not in err


def test_vectors_of_another_spread_go_on_in_the_units_of_the_checkpoint(tmp_path, capfd):
    vectors = np.random.default_rng(0).normal(3, 2, (64, 2)).astype(np.float32)
    path = tmp_path / "v.npz"
    np.savez(path, vectors=vectors)
    network = {"name": "mlp", "width": 16, "depth": 1}
    fields = config.MLP.model_fields
    cfg = tiny(tmp_path / "r", data={"name": "npz", "path": str(path)})
    raw = cfg.model_dump()
    raw["network"] = {key: value for key, value in network.items() if key in fields}
    raw["metrics"] = {"at_end": False}
    cfg = config.parse(raw)
    trainer.train(cfg)
    np.savez(path, vectors=10 * vectors)
    resume = ["--cfg", tmp_path / "r" / "config.yml", "--resume", "train.steps=8"]
    code, _, err = run_main(capfd, *resume)
    assert code == 2 and "does not hold the vectors" in err and "other vectors: fingerprint" in err
    old = checkpoints.load(tmp_path / "r" / "checkpoints" / "last.ckpt")["data"]
    assert run_main(capfd, *resume, "--other-data")[0] == 0
    new = checkpoints.load(tmp_path / "r" / "checkpoints" / "last.ckpt")["data"]
    assert new["scaling"] == old["scaling"] and new["data"]["fingerprint"] != old["data"]["fingerprint"]
    assert run_main(capfd, *resume)[0] == 2  # other units: said again, each time


def test_other_data_is_for_a_run_that_goes_on(tmp_path, capfd):
    code, _, err = run_main(capfd, *command(tiny(tmp_path / "r")), "--other-data")
    assert code == 2 and err.startswith("--other-data: ") and not (tmp_path / "r").exists()


def test_grids_and_logs_name_classes(tmp_path, capfd):
    images = pictures(tmp_path / "images", ("cat", "dog", "owl"))
    settings = {**LAZY, "path": str(images), "workers": 0, "conditional": True}
    code, out, _ = run_main(capfd, *command(tiny(tmp_path / "r", data=settings, sample={"grid": 6})))
    assert code == 0 and "step-00000006.png (columns: cat, dog, owl)\n" in out
    entries = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["data"]["classes"] == {"cat": 24, "dog": 24, "owl": 24}
    events = EventAccumulator(str(tmp_path / "r")).Reload()
    assert events.Tags()["images"] == ["samples"]
    assert events.SummaryMetadata("samples").summary_description == "columns: cat, dog, owl"
    ckpt = tmp_path / "r" / "checkpoints" / "last.ckpt"
    assert checkpoints.load(ckpt)["data"]["classes"] == ["cat", "dog", "owl"]
    assert checkpoints.load_model(ckpt).codec.classes == ["cat", "dog", "owl"]
