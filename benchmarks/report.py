"""Writes the measured figures of benchmarks/results/ into docs/performance.md, between its markers, and the plot.

    python benchmarks/report.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, made from benchmarks/results/NAME.json; where the file is
not there, "not yet measured" is what stands.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import gpu_table
from common import RESULTS, ROOT
from scaling import AXES, plot
from step import SECTIONS

PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- (\w+) -->", text):
        path = RESULTS / f"{name}.json"
        kind = TABLES[name.split("_")[0]]
        table = kind(json.loads(path.read_text())) if path.exists() else "Not yet measured."
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, table=table: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.S,
        )
        if path.exists() and name == "scaling_cpu":
            plot(json.loads(path.read_text())["rows"], ROOT / "docs" / "scaling.png")
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(m: dict[str, Any], command: str) -> str:
    where = f"{m['hardware']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    return f"\n\n{where}; `python benchmarks/{command}`"


def step(r: dict[str, Any]) -> str:
    body = [
        [name, f"{r['sections'][name] * 1e3:.1f}", f"{r['sections'][name] / r['seconds']:.1%}"] for name in SECTIONS
    ]
    body.append(["whole step", f"{r['seconds'] * 1e3:.1f}", "100%"])
    lines = [
        f"{r['what']}, {r['parameters'] / 1e6:.2f}M parameters, {r['precision']}:",
        f"{r['images_per_second']:.1f} images/s; {r['flops_per_image'] / 1e9:.1f} GFLOP an image;",
        f"{r['share_of_peak']:.0%} of a measured {r['matmul_peak'] / 1e12:.2f} TFLOP/s;",
        f"peak memory {r['peak_memory'] / 2**30:.2f} GiB.",
        f"Data, optimizer, EMA and logging: {r['not_the_model']:.1%} of the step.",
        *(f"One-step samples in {s['precision']}: {s['images_per_second']:.1f} images/s." for s in r["samples"]),
    ]
    return " ".join(lines) + "\n\n" + rows(["part", "ms", "share"], body) + measured(r["machine"], r["command"])


def compare(r: dict[str, Any]) -> str:
    body = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['flops_per_image'] / 1e9:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['times_ours']:.2f}",
            f"{row['times_our_network']:.2f}" if "times_our_network" in row else "",
        ]
        for row in r["rows"]
    ]
    head = ["", "parameters", "GFLOP an image", "s a step", "x our whole step", "x our network, same arithmetic"]
    return rows(head, body) + measured(r["machine"], r["command"])


def scaling(r: dict[str, Any]) -> str:
    body = [
        [
            AXES[row["axis"]],
            str(row["value"]),
            f"{row['seconds']:.3f}",
            f"{row['images_per_second']:.1f}",
            f"{row['peak_memory'] / 2**30:.2f}",
            f"{row['flops_per_image'] / 1e9:.2f}",
        ]
        for row in r["rows"]
    ]
    head = ["varied", "", "s a step", "images/s", "peak memory, GiB", "GFLOP an image"]
    return rows(head, body) + measured(r["rows"][0]["machine"], r["command"])


def loading(r: dict[str, Any]) -> str:
    where = f"{r['machine']['hardware']}, {r['machine']['date']}"
    return (
        f"An image costs {r['cost'] * 1e6:.0f} us of one core's time. {r['workers']} workers decode "
        f"{r['images_per_second']:,.0f} images/s; a loop that takes {r['speed']:,.0f} "
        f"images/s in batches of {r['batch']} waits {r['waited']:.1%} of its time ({where}; "
        "`python benchmarks/loading.py`)."
    )


TABLES = {"step": step, "compare": compare, "scaling": scaling, "loading": loading, "all": gpu_table.tables}

if __name__ == "__main__":
    sys.exit(main())
