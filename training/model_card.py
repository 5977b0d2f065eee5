"""The README.md of a finished run's folder: the model card that the Hugging Face Hub shows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from checkpoints.disk import write_atomically
from config import Config, printable
from config.errors import ROOT

MARK = "<!-- main.py writes this card again when the run goes on, unless it was changed: {} -->\n"


def write(folder: Path, text: str) -> Path:
    """Put the card in a run's folder; its path. Beside a README.md that is not as main.py left it: README.new.md."""
    path, content = folder / "README.md", text + MARK.format(_digest(text))
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        own = there[: there.rfind("<!--")]
        if there != own + MARK.format(_digest(own)):
            path = folder / "README.new.md"
    write_atomically(path, lambda file: file.write(content.encode()))
    return path


def card(
    cfg: Config,
    model: torch.nn.Module,  # networks.Preconditioner or the like, with its codec
    data: str,  # what the training set holds, as its `said()` has it
    hardware: str,
    score: str | None,  # what is said of the last score
    next_step: str,  # what to do with the run, and under that the command
) -> str:
    """The card, in Markdown, of a run that is at its end. What users name may hold anything: it is shown as it is."""
    folder, steps, kind = cfg.run.folder, cfg.train.steps, model.codec.kind
    method = (type(cfg.objective).__doc__ or cfg.objective.name).split("\n")[0]
    grid = f"samples/step-{steps:08d}.png"
    picture = f"![Samples]({grid})\n\n" if (folder / grid).exists() else ""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    network = f"{cfg.network.name} of {size:.2f}M parameters, for {kind} of {'x'.join(map(str, model.shape))}"
    trained = f"{steps:,} steps of {cfg.train.batch_size:,}, {steps * cfg.train.batch_size:,} {kind}"
    if minutes := training_seconds(folder / "metrics.jsonl") / 60:
        took = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.1f} minutes"
        trained += f", in {took} without sampling and scoring"
    facts = [score] if score else []
    facts += [f"network: {network}", f"training: {trained}, on {hardware}", data, f"trainer: {commit()}"]
    listed = "\n".join(f"- {escaped(fact[0].upper() + fact[1:])}" for fact in facts)
    what, _, command = next_step.partition("\n")
    other = cfg.model_dump(mode="json", exclude_defaults=True, exclude={"run"})
    for section in ("objective", "network", "data"):
        other = {section: {"name": getattr(cfg, section).name, **other.pop(section, {})}, **other}
    settings = yaml.safe_dump(other, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    return f"""{front_matter(cfg, kind)}

# {escaped(cfg.run.name)}

{picture}{escaped(method)}

{listed}

{what[0].upper() + what[1:]}

{indented(command)}

Settings that are not the defaults, with seed {cfg.run.seed} (all are in [config.yml](config.yml)):

{indented(settings)}

"""


def front_matter(cfg: Config, kind: str) -> str:
    """What the Hub reads: tags, library, and a licence for the user to fill in."""
    images = {"pipeline_tag": "unconditional-image-generation"} if kind != "vectors" else {}
    tags = ["consistency-model", cfg.objective.name, cfg.network.name]
    known = yaml.safe_dump({"library_name": "pytorch", **images, "tags": tags}, sort_keys=False)
    return f"---\nlicense: # yours to choose, as mit or cc-by-4.0\n{known}---"


def escaped(text: str) -> str:
    """Text as Markdown and HTML show it, whatever is in it, on one line."""
    return re.sub(r"([\\`*_\[\]<>&|~#$@!])", r"\\\1", printable(text))


def indented(text: str) -> str:
    """Text as a block of code, which no content can end."""
    return "\n".join(f"    {printable(line)}" for line in text.strip().splitlines())


def training_seconds(path: Path) -> float:
    """Seconds that the steps in metrics.jsonl took, those of stopped and resumed processes together; 0: not known."""
    images, seconds = 0.0, 0.0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if entry.get("images_per_second"):
                seconds += (entry["images"] - images) / entry["images_per_second"]
                images = entry["images"]
    return seconds


def hardware(device: torch.device, world: int) -> str:
    """The devices of a run and torch's version, for people."""
    name = platform.processor() or device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name += f" ({torch.get_num_threads()} threads)"
    return f"{world} x {name}, torch {torch.__version__}"


def commit() -> str:
    """This repository's commit, where git knows it."""
    asked: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
    git = ["git", "--no-optional-locks"]
    try:
        if not (ROOT / ".git").exists():  # of another repository that this one lies in
            raise OSError
        known = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **asked).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **asked).stdout
    except (OSError, subprocess.SubprocessError):
        return "its commit is not known"
    return f"commit {known}{' and changes' if changes else ''}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
