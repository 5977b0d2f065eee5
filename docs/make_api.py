"""Writes docs/api.md from the docstrings and signatures of the library: python docs/make_api.py

The sources are parsed, not imported; a signature is shown as it stands there, with its comments.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a script of one's own imports, in the order of use
FILES = [
    *("objectives/common.py", "objectives/edm.py", "objectives/ct.py", "objectives/ict.py", "objectives/ect.py"),
    *("objectives/tcm.py", "objectives/scm.py", "objectives/cd.py", "objectives/cmt.py", "objectives/pd.py"),
    *("objectives/__init__.py", "losses.py", "schedules.py", "sampler.py", "editing.py", "ema.py", "draws.py"),
    *("networks/preconditioning.py", "networks/mlp.py", "networks/unet.py", "networks/__init__.py"),
    *("vectors.py", "drawing.py", "data.py", "augment.py", "metrics.py", "checkpoint.py", "formats.py", "config.py"),
    "trainer.py",
]
HEAD = """# API

Made by `python docs/make_api.py` from the sources; do not edit. `B` is the batch, `(B, ...)` any shape, sigma the noise
level in units of the data, four digits and five an arXiv number. An example from end to end: [library.md](library.md).

"""

Public = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> Iterator[Public]:
    """The functions and classes of a module or class whose names have no underscore."""
    return (n for n in body if isinstance(n, Public) and not n.name.startswith("_"))


def head(node: Public, lines: list[str]) -> list[str]:
    """A definition's lines from its decorators to the end of its docstring, or to its body where it has none."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    first = node.body[0]
    stop = first.end_lineno if ast.get_docstring(node) else max(first.lineno - 1, node.lineno)
    return [line for line in lines[start:stop] if not line.strip().startswith("#")]


def entry(node: Public, lines: list[str]) -> str:
    """A function; or a class with its docstring, a dataclass's fields, and its public methods: as in a stub file."""
    shown = head(node, lines)
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)] if node.decorator_list else []
        shown += ["", *(lines[n.lineno - 1] for n in fields)] if fields else []
        inside = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        for method in inside:
            if method.name == "__init__" or not method.name.startswith("_"):
                shown += ["", *head(method, lines)]
    return f"### {node.name}\n\n```python\n" + textwrap.dedent("\n".join(shown)) + "\n```"


def module(name: str) -> str:
    """A file's part of the page; empty without public names."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    entries = [entry(node, text.split("\n")) for node in public(tree.body)]
    if not entries:
        return ""
    path = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    doc = inspect.cleandoc(ast.get_docstring(tree) or "")
    return "\n\n".join([f"## {path}", f"```text\n{doc}\n```", *entries])


def page() -> str:
    """The whole of docs/api.md."""
    return HEAD + "\n\n".join(filter(None, map(module, FILES))) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
