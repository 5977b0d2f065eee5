"""The notebooks: each runs from top to bottom in a shortened form, and what is committed of its outputs is small."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {"STEPS": "20", "NUM": "100"}


def run(name, folder):
    """The notebook, run with few steps and its run in `folder`; the one in the repository stays as it is."""
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for setting, value in {**SHORT, "RUN": repr(str(folder))}.items():
        settings.source = re.sub(rf"^{setting} = [^#\n]*", f"{setting} = {value}  ", settings.source, flags=re.M)
    assert f"RUN = {str(folder)!r}" in settings.source and "STEPS = 20" in settings.source
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    return notebook


def shown(notebook):
    """The sizes of the PNG pictures that a notebook shows, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [(int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) for png in map(base64.b64decode, pictures)]


def said(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_they_run_from_top_to_bottom(tmp_path, monkeypatch):
    """The second edits with what the first has trained."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trained = run("train_and_sample", tmp_path / "run")
    text = said(trained)
    assert "step 20/20" in text and text.count("score at 1 NFE: fid") == 2 and "steps        fid" in text
    assert len(shown(trained)) == 5  # curves, one step, two, a class, the sweep
    edited = run("edit", tmp_path / "run")
    assert "main.py" not in said(edited)
    assert re.findall(r"^(\w+): \d results", said(edited), re.M) == [
        "inpaint", "inpaint", "superres", "stroke", "interpolate"
    ]  # fmt: skip
    assert len(shown(edited)) == 2 + 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_shows_its_pictures_in_little_room_and_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(shown(notebook)) >= 5 and all(len(str(output)) < 100_000 for output in outputs)
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(tmp|work|root|home|Users)/", path.read_text())
    assert [output for output in outputs if output.output_type == "error"] == []


def test_these_are_all():
    assert [path.stem for path in NOTEBOOKS] == ["edit", "train_and_sample"]
