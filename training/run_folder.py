"""The folder of a run: its config, which checkpoints it keeps, and whether it may go on from one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import config
from checkpoints.averages import save_snapshot
from checkpoints.disk import refuse_links, sweep, write_atomically
from config import Config, ConfigError, RunFailed
from metrics.scores import better
from training.devices import restarted_by_torchrun

# Settings that a resumed run may change: they decide where and how fast it runs, not what it computes.
FREE = frozenset(
    [f"run.{k}" for k in ("name", "dir", "device")]
    + [f"data.{k}" for k in ("dir", "path", "workers", "memory_gb", "on_broken", "autoencoder")]
    + [f"train.{k}" for k in ("microbatch", "checkpointing", "compile", "log_every", "save_every", "keep", "init_from")]
    + [f"train.{k}" for k in ("on_save_error", "max_bad_steps", "wandb")]
    + ["ema.snapshot_every"]
    + ["objective.teacher", "objective.lpips_weights"]  # where they lie; the teacher's weights are in the checkpoint
    + [f"sample.{k}" for k in config.Sample.model_fields]
    + [f"metrics.{k}" for k in config.Metrics.model_fields]
)


class RunFolder:
    """What a run keeps on disk. Only rank 0 writes."""

    def __init__(self, cfg: Config, say: Callable[[str], None] = print):
        self.cfg, self.path, self.say = cfg, cfg.run.folder, say
        self.checkpoints = self.path / "checkpoints"
        self.saved = 0  # the step of the newest checkpoint
        self.problem = ""  # why the last one could not be written
        self.best: dict[str, Any] | None = None  # the scores in best.ckpt, and the metric they are by

    def check(self, resume: bool) -> None:
        """Raise ConfigError for a folder that holds a run already, or none to resume, or leads out of itself."""
        refuse_links(self.path)
        begun = (self.path / "config.yml").exists()
        if resume and not checkpoints.saved(self.checkpoints) and not restarted_by_torchrun():
            advice = "remove the folder, and start" if begun else "give the config.yml of a run, or start one"
            raise ConfigError(
                f"--resume: {self.path}: no checkpoint is saved there to go on from; {advice} without --resume"
            )
        if not resume and begun:
            raise ConfigError(
                f"run.dir: {self.path} already holds a run; add --resume to continue it, or name another folder: "
                + shlex.quote(f"run.dir={self.path}-2")
            )

    def open(self) -> None:
        """Make the folder with its config; remove what killed processes left half written. Raises ConfigError."""
        try:
            self.write_config()
            sweep(self.path)
        except OSError as error:
            raise ConfigError(f"run.dir: {self.path} cannot be written: {error.strerror}") from None

    def write_config(self) -> None:
        """config.yml: every setting of this run."""
        text = config.dump(self.cfg).encode()
        write_atomically(self.path / "config.yml", lambda file: file.write(text))

    def newest(self, scheduled: bool) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state, checked against this run's config; None where none was saved, as
        where torchrun restarts a run that ended before.

        scheduled: whether what a step computes depends on the run's length, which then must be the same.
        """
        if not checkpoints.saved(self.checkpoints):
            print(f"{self.path}: nothing is saved there yet: starting at step 0", file=sys.stderr)
            return None
        path, state, problems = checkpoints.newest_good(self.checkpoints)
        for problem in problems:
            print(f"warning: {problem}; going on from {path}", file=sys.stderr)
        free = FREE if scheduled else FREE | {"train.steps"}
        if different := config.first_difference(checkpoints.config_of(state, path), self.cfg, free):
            raise ConfigError(
                f"{path}: was trained with another config: {different}; set it back to resume, or start anew in "
                "another run.dir (train.init_from takes the weights)"
            )
        self.saved = state["step"]
        if (best := self.checkpoints / "best.ckpt").exists():
            try:
                self.best = checkpoints.load(best)["best"]
            except (checkpoints.CheckpointError, KeyError) as error:
                print(f"warning: {error}; the next score makes a new one", file=sys.stderr)
        return path, state

    def save(self, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint, and remove all but the newest `keep`."""
        step = state["step"]
        if self.write(state, lambda: checkpoints.save(state, self.checkpoints, step, keep)):
            self.saved = step

    def keep_snapshot(self, state: dict[str, Any]) -> None:
        """Keep the averages of ema.std as they are at this step, for `python ema.py rebuild`."""
        self.write(state, lambda: save_snapshot(state, self.path / "snapshots"))

    def keep_best(self, state: dict[str, Any], scores: dict[str, float]) -> None:
        """Keep a state as best.ckpt if it scores better, by the same metric, than the one there."""
        metric = self.cfg.metrics.model_dump(exclude={"every", "at_end"})
        if self.best is None or self.best["metric"] != metric or better(scores, self.best["scores"]):
            best, path = {"metric": metric, "scores": scores}, self.checkpoints / "best.ckpt"
            if self.write(state, lambda: checkpoints.write_state(path, {**state, "best": best})):
                self.best = best

    def write(self, state: dict[str, Any], write: Callable[[], Any]) -> bool:
        """Whether write() could write the state; where the disk refuses, say so: the previous one stays good.

        Weights that are not finite are not written.
        """
        self.problem = ""
        try:
            parts = (state["model"], state["objective"], *state["ema"])
            if not all(value.isfinite().all() for part in parts for value in part.values()):
                raise RuntimeError("the weights are not finite")
            if not (self.path / "config.yml").exists():  # someone removed the folder: --resume will ask for it
                self.write_config()
            write()
            return True
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.problem = reason = " ".join(str(error).split())[:200]
            before = f"the one of step {self.saved:,} is the newest" if self.saved else "there is none yet"
            message = (
                f"step {state['step']:,}: no checkpoint could be written in {self.checkpoints} ({reason}); {before}"
            )
            if self.cfg.train.on_save_error == "stop":
                raise RunFailed(f"{message}; stopped as train.on_save_error says") from None
            self.say(f"warning: {message}")
            return False

    @property
    def resume_command(self) -> str:
        """What goes on with this run."""
        return config.command("main.py", "--cfg", self.path / "config.yml", "--resume")

    def next_command(self, step: int, labelled: bool) -> str:
        """What a run that ended at `step` says. Raises RunFailed where that step is not saved.

        labelled: whether the training set has labels, which the classifier behind metrics.features needs.
        """
        name, last, resume = self.path / "config.yml", self.checkpoints / "last.ckpt", self.resume_command
        if self.saved < step:
            raise RunFailed(
                f"{self.checkpoints}: step {step:,} could not be saved ({self.problem}); the newest checkpoint is of "
                f"step {self.saved:,}; mend that, and continue with\n  {resume}"
            )
        if step < self.cfg.train.steps:
            return f"stopped at step {step:,}; continue with\n  {resume}"
        if self.cfg.objective.name == "autoencoder":
            out = self.path / "latents.safetensors"
            encode = config.command("encode.py", "--cfg", name, "--autoencoder", last, "--out", out)
            return f"done; make latents of the images with\n  {encode}"
        sample = config.command("generate.py", "--cfg", name, "--ckpt", last)
        if self.cfg.metrics.features == "classifier" and not labelled:
            return f"done; sample with\n  {sample}"
        return f"done; sample and score with\n  {sample} --calc_fid"


def other_data(there: dict[str, Any], here: dict[str, Any], kind: str) -> str | None:
    """How a run's data differ from its checkpoint's, by their codecs' state(); None where they are the same.

    kind: images, latents or vectors. What one of the two does not know, as an older checkpoint, is not compared.
    """
    old, new = there.get("data") or {}, here.get("data") or {}
    found = []
    if (was := there.get("classes")) and (now := here.get("classes")) and was != now:
        i = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), None)
        if i is not None:
            found.append(f"class {i} was {was[i]!r}, is {now[i]!r}")
        if len(was) != len(now):
            found.append(f"{len(now):,} classes, were {len(was):,}")
    if old and new:
        a, b = ("x".join(map(str, [*data["size"], *filter(None, [data["channels"]])])) for data in (old, new))
        if a != b:
            found.append(f"{kind} of {b}, were of {a}")
        if old["count"] != new["count"]:
            found.append(f"{new['count']:,} {kind}, were {old['count']:,}")
        elif was and was == now and old["counts"] != new["counts"]:
            i = next(i for i, (a, b) in enumerate(zip(old["counts"], new["counts"], strict=True)) if a != b)
            found.append(f"class {i} ({was[i]!r}) has {new['counts'][i]:,} {kind}, had {old['counts'][i]:,}")
        if None not in (a := old["fingerprint"], b := new["fingerprint"]) and a != b:
            found.append(f"other {kind}: fingerprint {b}, was {a}")
    hashes = [(data.get("autoencoder") or {}).get("hash") for data in (there, here)]
    if None not in hashes and hashes[0] != hashes[1]:
        found.append("latents of another autoencoder")
    if not found and there["scaling"] != here["scaling"]:
        found.append("their mean, spread or bounds are others")
    return "; ".join(found) or None
