"""What benchmarks/gpu.sh has measured so far, in one file and as tables: python benchmarks/gpu_table.py FOLDER

Writes FOLDER/all_gpu.json, which benchmarks/report.py takes, and FOLDER/gpu.md; prints the tables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    folder = Path(sys.argv[1])
    result = collect(folder)
    texts = {"all_gpu.json": json.dumps(result, indent=1) + "\n", "gpu.md": tables(result) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(texts["gpu.md"])
    return 0


def collect(folder: Path) -> dict[str, Any]:
    """The files' contents: {"originals", "rows", "steps"}, each a list."""
    rows = folder / "train" / "results.json"
    kinds = {"originals": folder.glob("original_gpu_*.json"), "steps": folder.glob("step_gpu_*.json")}
    found = {kind: [json.loads(path.read_text()) for path in sorted(paths)] for kind, paths in kinds.items()}
    return {**found, "rows": json.loads(rows.read_text()) if rows.exists() else []}


def tables(r: dict[str, Any]) -> str:
    """Markdown; of what has nothing yet, "not yet measured"."""
    parts = {
        "Beside the originals, in turn in one process (theirs: originals.py)": originals(r["originals"]),
        "Trained for minutes, one-step distance": distances(r["rows"]),
        "A step of every method": steps(r["steps"]),
    }
    return "\n\n".join(f"{title}:\n\n{table or 'Not yet measured.'}" for title, table in parts.items())


def table(head: list[str], body: list[list[str]], found: list[dict]) -> str:
    """Rows under a head, then the machine; "" without rows."""
    if not found:
        return ""
    m = found[0]["machine"] if "machine" in found[0] else found[0]
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
    return "\n".join([*lines, "", f"{m['hardware']}, torch {m['torch']}, commit {m['commit']}, {m['date']}"])


def originals(found: list[dict]) -> str:
    head = ["", "ours, images/s", "theirs, images/s", "times as fast", "MFU ours, theirs", "GiB ours, theirs"]
    body = []
    for r in found:
        sides = [r["ours"], r["theirs"]]
        cells = [f"{s['images_per_second']:,.0f} ({s['precision']})" for s in sides] + [f"{r['ratio']:.2f}"]
        cells += [", ".join(f"{s['share_of_peak']:.0%}" for s in sides)]
        cells += [", ".join(f"{s['peak_memory'] / 2**30:.1f}" for s in sides)]
        body.append([r["what"], *cells])
    return table(head, body, found)


def distances(found: list[dict]) -> str:
    """A row's distance, and beside it, where both are there, what share it is of the original's."""
    head = ["row", "from", "minutes", "images", "features", "evaluations: distance", "share of the original's"]
    by_name = {(r["name"], r["seed"], r["features"]): r for r in found}
    body = []
    for (name, *rest), r in by_name.items():
        other = by_name.get((f"{name}-original", *rest))
        first = next(iter(r["scores"]))
        share = f"{r['scores'][first]['fid'] / other['scores'][first]['fid']:.2f}" if other else ""
        figures = ", ".join(f"{kind}: {values['fid']:.4g}" for kind, values in r["scores"].items())
        cells = [r["starts_from"] or "noise", f"{r['minutes']:.1f}", f"{r['images']:,}", r["features"], figures, share]
        body.append([name, *cells])
    return table(head, body, found)


def steps(found: list[dict]) -> str:
    head = ["", "precision", "compile", "images/s", "MFU", "peak GiB", "not the model", "one-step samples/s"]
    body = [
        [
            r["what"],
            r["precision"],
            str(r["compile"]),
            f"{r['images_per_second']:,.0f}",
            f"{r['share_of_peak']:.0%}",
            f"{r['peak_memory'] / 2**30:.1f}",
            f"{r['not_the_model']:.1%}",
            ", ".join(f"{s['images_per_second']:,.0f} ({s['precision']})" for s in r["samples"]),
        ]
        for r in found
    ]
    return table(head, body, found)


if __name__ == "__main__":
    sys.exit(main())
