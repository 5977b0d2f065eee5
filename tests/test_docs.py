"""The API page is made from the sources as they are, and every public name says what it is and takes."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in (".", "objectives", "networks") for p in (ROOT / folder).glob("*.py"))


def test_the_api_page_is_current():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "python docs/make_api.py"
    listed = {ROOT / name for name in make_api.FILES}
    assert {p for p in SOURCES if p.parent.name == "objectives"} <= listed <= set(SOURCES)


def test_the_library_page_shows_the_example_as_it_is():
    page, code = ((ROOT / name).read_text() for name in ("docs/library.md", "examples/own_network.py"))
    assert f"```python\n{code}```" in page


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
            found += lacking(node.body, f"{name}.")
            continue
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        found += [f"{name}: {x.arg}" for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
        if node.returns is None and node.name != "__init__":
            found.append(f"{name}: result")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings_and_types(path):
    assert lacking(ast.parse(path.read_text()).body) == []


def test_what_is_lacking_is_seen():
    text = "def f(x, y: int): pass\nclass C:\n    def g(self) -> int:\n        'ok'\n    def _h(self): pass"
    assert lacking(ast.parse(text).body) == ["f: docstring", "f: x", "f: result", "C: docstring"]
