"""The model card of a finished run: what it says is true, it hides nothing of a user's, and no name breaks it."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny
from PIL import Image

import config
import generate
from training import model_card, trainer

ROOT = Path(__file__).parent.parent


def parts(folder):
    """(the front matter's values, the rest) of a card."""
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", (folder / "README.md").read_text(), re.S).groups()
    return yaml.safe_load(head), body


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "r"
    cfg = tiny(folder, metrics={"at_end": True}, data={"conditional": True})
    trainer.train(cfg)
    return folder, cfg


def test_it_says_what_the_run_was(run):
    folder, _ = run
    head, body = parts(folder)
    assert head == {
        "license": None,
        "library_name": "pytorch",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["consistency-model", "ect", "song_unet"],
    }
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (fid,) = [entry["fid"] for entry in entries if "fid" in entry]
    assert f"- Score at 1 NFE: fid {fid:.4g} (classifier features, 100 samples; against the 1,797 images" in body
    assert "Easy consistency tuning (Geng et al. 2024, 2406.14548)." in body
    assert "6 steps of 16, 96 images, in " in body and f"torch {torch.__version__}".replace("_", "\\_") in body
    assert "- Data: 1,797 images of 8x8 grey from digits, 10 classes: 0 178" in body
    commit = re.search(r"- Trainer: commit ([0-9a-f]{12})( and changes)?\n", body)
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (commit and asked.stdout.startswith(commit[1])) or asked.returncode or not (ROOT / ".git").exists()
    links = re.findall(r"\]\((.*?)\)", body)
    assert links == ["samples/step-00000006.png", "config.yml"] and all((folder / link).exists() for link in links)


def test_its_settings_make_the_runs_config_again(run):
    folder, cfg = run
    block = re.search(r"config\.yml\)\):\n\n((?:    .*\n)+)", parts(folder)[1])[1]
    text = re.sub("^    ", "", block, flags=re.M)
    assert config.parse({"run": cfg.run.model_dump(), **yaml.safe_load(text)}) == cfg
    assert list(yaml.safe_load(text))[:3] == ["data", "network", "objective"]


def test_its_command_samples(run):
    folder, _ = run
    command = re.search(r"^Sample and score with\n\n    (.*)\n", parts(folder)[1], re.M)[1]
    _, script, *words = shlex.split(command)
    assert (Path.cwd() / script).samefile(ROOT / "generate.py") and words.pop() == "--calc_fid"
    assert generate.main([*words, "--num", "4", "--out", str(folder.parent / "out")]) == 0
    assert (folder.parent / "out" / "grid.png").exists()


def test_it_is_written_again_when_the_run_goes_on_and_a_changed_one_is_kept(tmp_path):
    folder = tmp_path / "r"
    trainer.train(tiny(folder, train={"steps": 4}))
    assert "4 steps of 16, 64 images" in parts(folder)[1]
    trainer.train(tiny(folder), resume=True)
    assert "6 steps of 16, 96 images" in parts(folder)[1] and "step-00000006.png" in parts(folder)[1]
    there = (folder / "README.md").read_text().replace("license: #", "license: mit #")
    (folder / "README.md").write_text(there)
    trainer.train(tiny(folder, train={"steps": 8}), resume=True)
    assert (folder / "README.md").read_text() == there
    assert "8 steps of 16" in (folder / "README.new.md").read_text()


def test_a_stopped_run_has_none(tmp_path, monkeypatch):
    step = trainer.TrainingStep.__call__

    def stopping(self, *batch):
        step(self, *batch)
        if self.step == 3:
            raise RuntimeError("stopped")

    monkeypatch.setattr(trainer.TrainingStep, "__call__", stopping)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train(tiny(tmp_path / "r"))
    assert not (tmp_path / "r" / "README.md").exists()


def test_of_vectors_it_has_no_picture(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    np.savez(tmp_path / "v.npz", vectors=values)
    data = {"name": "npz", "path": str(tmp_path / "v.npz")}
    raw = tiny(tmp_path / "r").model_dump(exclude_defaults=True)
    trainer.train(config.parse({**raw, "data": data, "network": {"name": "mlp", "width": 16}}))
    head, body = parts(tmp_path / "r")
    assert "pipeline_tag" not in head and "![" not in body
    assert "64 vectors of 3" in body and "generate.py --cfg" in body


HOSTILE = "a|b `c` <img src=x onerror=alert(1)> [d](e) # *f* _g_ & $h$ @i --> \n---\n# j \x1b[31m"


def test_no_name_breaks_it(tmp_path):
    """A path and a class hold anything: as text they are all there, and none is a tag, a link, a heading or a line."""
    markdown_it = pytest.importorskip("markdown_it")
    folder, photos = tmp_path / "r", tmp_path / HOSTILE
    (photos / HOSTILE).mkdir(parents=True)
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(photos / HOSTILE / f"{i}.png")
    trainer.train(tiny(folder, data={"name": "folder", "path": str(photos), "conditional": True}))
    _, body = parts(folder)
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(body)
    inner = [child for token in tokens for child in token.children or []]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert [child.attrs["href"] for child in inner if child.type == "link_open"] == ["config.yml"]
    assert {child.type for child in inner if child.type in ("html_inline", "code_inline", "em_open")} == set()
    (comment,) = [token.content for token in tokens if token.type == "html_block"]
    assert comment.startswith("<!-- main.py writes")
    shown = "".join(child.content for child in inner)
    assert shown.count(HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b")) == 2


def test_escaped_text_and_code_hold_on_one_line_each():
    assert model_card.escaped("a_b\n<i>") == "a\\_b\\\\n\\<i\\>"
    assert model_card.indented("x\n\n```\n# y") == "    x\n    \n    ```\n    # y"


def test_training_time_is_that_of_all_its_processes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"images": 100, "images_per_second": 10}, {"fid": 1.0}, {"images": 300, "images_per_second": 100}]
    path.write_text("".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines)))
    assert model_card.training_seconds(path) == 12
    path.write_text("broken")
    assert model_card.training_seconds(path) == 0
