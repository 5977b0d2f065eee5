"""Weights & Biases, offline: what a run writes is read back from its file."""

import json
import os
import struct
import time

import pytest
from conftest import tiny
from PIL import Image

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2  # noqa: E402

from config import ConfigError  # noqa: E402
from training import trainer  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # what it has kept of another test's environment


def written(folder):
    """For each process, in order: the records in the .wandb file that it wrote, which another process writes for it."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))  # they have the time in their names
    for _ in range(300):
        found = [list(records(path.read_bytes())) for path in files]
        if all(any(record.WhichOneof("record_type") == "exit" for record in process) for process in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no end of the run in {files}")


def records(content):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after 7 bytes, with protobufs in it."""
    at, part = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # filled with zeros
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def curves(found):
    """{name: {step: value}} of the history records; a picture's value is what is said of it."""
    got = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for name, value in values.items():
                got.setdefault(name, {})[int(values["_step"])] = value
    return got


def run_record(found):
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    return run


def test_curves_grids_and_config_go_on_in_a_resumed_run(tmp_path):
    folder, grid = tmp_path / "r", {"every": 4}
    trainer.train(tiny(folder, train={"wandb": "small", "steps": 4}, sample=grid))
    cfg = tiny(folder, train={"wandb": "small"}, sample=grid)
    trainer.train(cfg, resume=True)
    first, second = written(folder)
    runs = [run_record(found) for found in (first, second)]
    assert runs[0].run_id == runs[1].run_id == (folder / "wandb-id").read_text()
    assert runs[0].project == runs[1].project == "small" and runs[0].display_name == "digits"
    settings = {item.key: json.loads(item.value_json) for item in runs[1].config.update}
    assert {section: settings[section] for section in cfg.model_dump()} == json.loads(cfg.model_dump_json())
    got = [curves(found) for found in (first, second)]
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        own = got[0] if entry["step"] <= 4 else got[1]
        assert {name: own[name][entry["step"]] for name in entry if name != "step"} == pytest.approx(
            {name: value for name, value in entry.items() if name != "step"}
        )
    assert list(got[0]["samples.path"]) == [4] and list(got[1]["samples.path"]) == [6]
    shown = next((folder / "wandb").glob("*/files/" + got[1]["samples.path"][6]))
    with Image.open(shown) as picture, Image.open(folder / "samples" / "step-00000006.png") as own:
        assert picture.convert("RGB").tobytes() == own.convert("RGB").tobytes()


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^train.wandb: .*pip install wandb"):
        trainer.train(tiny(tmp_path / "r", train={"wandb": "small"}))
    assert not (tmp_path / "r").exists()


def test_where_it_cannot_start_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers
    trainer.train(tiny(tmp_path / "r", train={"wandb": "small"}))
    said = capsys.readouterr().out
    assert said.count("warning: train.wandb: Weights & Biases failed") == 1 and "done; sample" in said
    assert (tmp_path / "r" / "checkpoints" / "last.ckpt").exists()


def test_where_it_fails_later_that_is_said_once(tmp_path, monkeypatch, capsys):
    begin = trainer.weights_and_biases.WandbRun.__init__

    def broken(self, cfg, say):
        begin(self, cfg, say)
        run = self.run
        monkeypatch.setattr(run, "log", lambda *args, **kwargs: run.no_such_thing)  # raises
        self.ended = run

    monkeypatch.setattr(trainer.weights_and_biases.WandbRun, "__init__", broken)
    trainer.train(tiny(tmp_path / "r", train={"wandb": "small"}, metrics={"at_end": False}))
    said = capsys.readouterr().out
    assert said.count("Weights & Biases failed") == 1 and "done; sample" in said


def test_off_it_is_not_even_loaded(tmp_path):
    trainer.train(tiny(tmp_path / "r"))
    assert not {"wandb", "wandb-id"} & set(os.listdir(tmp_path / "r"))
