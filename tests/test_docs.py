"""Every public name says what it is and takes, pages are true of the files, and imports go down, never in a circle."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    *sorted(ROOT.glob("*.py")),
    *sorted(p for init in ROOT.glob("*/__init__.py") for p in init.parent.glob("*.py")),
]
LIBRARY = ("objectives", "networks", "sampler", "ema")
# A room imports from those after it; the library's from each other, and never from config, which is all others' too
ROOMS = ("checkpoint", "demo", "studio", "main", "generate", "edit", "encode", "convert", "training", "sampling")
ROOMS += ("metrics", "data", "checkpoints", "sources", *LIBRARY)


# Pages ----------------------------------------------------------------------------------------------------------------


def test_the_library_page_shows_the_example_as_it_is():
    page, code = ((ROOT / name).read_text() for name in ("docs/library.md", "examples/own_network.py"))
    assert f"```python\n{code}```" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_files_and_modules_named_in_a_page_are_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named = re.findall(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))\b", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = re.findall(r"python -m (?:pydoc )?([\w.]+)", text)
    assert [m for m in modules if m not in ("pytest", "pip") and not importlib.util.find_spec(m)] == []


def test_no_page_and_no_result_holds_a_path_of_the_machine_that_measured():
    place = re.compile(
        r"(?<![\w.:/])(~|/(tmp|work|root|home|Users|mnt|opt|var|srv|data|scratch|workspace|private))/[\w.]"
    )
    files = [*PAGES, *(ROOT / "benchmarks" / "results").glob("*.json")]
    assert {
        f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if place.search(line)
    } == set()
    assert place.search("--original /work/x/edm") and not place.search("https://github.com/home/x, a/tmp/b, 1/s")


def test_results_are_written_without_such_paths(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    common = importlib.import_module("common")
    common.save(
        {"command": f"a.py --original /work/x/edm --out {ROOT}/benchmarks/a.json ~/b run.dir=/tmp/c/d"}, tmp_path / "r"
    )
    told = '"a.py --original PATH/edm --out benchmarks/a.json PATH/b run.dir=PATH/d"'
    assert told in (tmp_path / "r").read_text()


# Docstrings -----------------------------------------------------------------------------------------------------------


def lacking(body: list[ast.stmt], prefix: str = "") -> list[str]:
    """Public functions and classes without a docstring, arguments and results without a type."""
    found = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or (node.name[0] == "_" and node.name != "__init__"):
            continue
        name = prefix + node.name
        if not ast.get_docstring(node) and node.name not in ("__init__", "forward"):  # the class's says it
            found.append(f"{name}: docstring")
        if isinstance(node, ast.ClassDef):
            twin = "Methods are those of" in (ast.get_docstring(node) or "")  # whose docstrings hold here too
            inside = lacking(node.body, f"{name}.")
            found += [fault for fault in inside if not (twin and fault.endswith(": docstring"))]
            continue
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        found += [f"{name}: {x.arg}" for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
        if node.returns is None and node.name != "__init__":
            found.append(f"{name}: result")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings_and_types(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) and lacking(tree.body) == []


def test_what_is_lacking_is_seen():
    text = "def f(x, y: int): pass\nclass C:\n    def g(self) -> int:\n        'ok'\n    def _h(self): pass"
    assert lacking(ast.parse(text).body) == ["f: docstring", "f: x", "f: result", "C: docstring"]


# Imports --------------------------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Every module of ours -> the modules of ours that it imports, anywhere in it."""
    ours = {module_of(path): path for path in SOURCES}
    graph = {}
    for name, path in ours.items():
        found = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                start = ".".join(filter(None, (package if node.level else "", node.module)))
                found += [f"{start}.{a.name}" if f"{start}.{a.name}" in ours else start for a in node.names]
        graph[name] = {other for other in found if other in ours}
    return graph


def test_no_file_imports_itself_by_way_of_others():
    list(graphlib.TopologicalSorter(imports()).static_order())  # CycleError names the circle


def test_no_room_imports_from_one_above_it():
    for name, others in imports().items():
        room = name.split(".")[0]
        below = {"config", *ROOMS[ROOMS.index(room) :]} if room != "config" else {"config"}
        if room in LIBRARY:
            below = set(LIBRARY)
        assert {other for other in others if other.split(".")[0] not in below} == set(), name
    assert imports()["checkpoints.disk"] <= {"config.errors"}


def test_the_library_loads_no_settings_and_no_yaml():
    code = "import sys, sampler, objectives, networks, ema; print({'pydantic', 'yaml', 'config'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
