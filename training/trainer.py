"""A run from its config to its last step: what is done when. How each thing is done lies in the rooms beside this."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

import checkpoints
import config
import data
from config import Config, ConfigError, RunFailed, in_steps
from training.build import build_model, build_objective, compile_networks, load_teacher
from training.devices import (
    any_rank,
    from_rank_0,
    gather_batches,
    of_any_rank,
    pick_device,
    pick_precision,
    rank_0_first,
    rank_and_world,
    set_arithmetic,
    wait_for_all,
)
from training.diagnose import find_microbatch, what_went_bad
from training.evaluate import Evaluation, Share
from training.logs import RunLog
from training.run_folder import RunFolder
from training.speed import Speedometer, peak_memory
from training.step import TrainingStep


def train(cfg: Config, resume: bool = False) -> None:
    """Train as `cfg` says, in its run folder; `resume` goes on from the newest good checkpoint there.

    Raises ConfigError for what the user must change, RunFailed where the machine or the numbers end it.
    """
    RunFolder(cfg).check(resume)
    try:
        run = Trainer(cfg)
        if resume:
            run.resume()
        mine = (config.dump(cfg), run.train_step.step)
        if from_rank_0(mine) != mine:
            raise ConfigError(
                f"rank {run.rank}: its config or checkpoint is not rank 0's; give all ranks the same files"
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(f"network: {cfg.run.device} has no memory for this network, its gradient and EMAs") from None
    with run.opened():
        run.loop()


class Trainer:
    """One run on this process's device; `loop` goes on from the step that it has reached to the last."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder = cfg, RunFolder(cfg)
        self.rank, self.world = rank_and_world()
        self.device = pick_device(cfg.run.device)
        set_arithmetic(cfg.train.tf32)
        precision = pick_precision(cfg.train.precision, self.device)
        with rank_0_first():
            self.dataset = data.load(cfg.data)
        codec = self.dataset.codec(cfg).to(self.device)
        model = build_model(cfg, codec, self.device, precision)
        objective = build_objective(cfg, model, load_teacher(cfg, model)).to(self.device)
        self.train_step = TrainingStep(cfg, codec, model, objective, precision)
        self.speed = Speedometer(self.train_step)
        sampled = [self.train_step.emas[0].module] if self.device.type == "cuda" else []
        used = torch.nn.ModuleList([objective, *sampled])
        compile_networks(cfg.train.compile, model, used, shown=self.rank == 0)
        self.stopping = self.interruptible = False

    def state(self) -> dict[str, object]:
        """What a checkpoint holds: all that the run needs to go on, and how to make its model."""
        return {**self.train_step.state(), "config": self.cfg.model_dump(), "data": self.train_step.codec.state()}

    def resume(self) -> None:
        """Take the state of the newest whole checkpoint of the run folder; stay at step 0 where none was saved yet."""
        shares = (self.cfg.train.lr_warmup, *(getattr(self.cfg.objective, name, None) for name in ("stage", "warmup")))
        scheduled = getattr(self.train_step.objective, "scheduled", False) or self.cfg.train.lr_decay != "none"
        found = self.folder.newest(scheduled or any(isinstance(share, float) for share in shares))
        if found is None:
            return
        path, state = found
        if state["data"]["scaling"] != self.train_step.codec.state()["scaling"]:
            raise ConfigError(f"data.path: {self.cfg.data.path} does not hold the vectors that {path} was trained on")
        try:
            self.train_step.load_state(state)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoints.CheckpointError(f"{path}: does not fit this run ({reason})") from None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """With the run folder and its logs open, the signals that end a run taken over, and failures put in words."""
        cfg, step = self.cfg, self.train_step
        if self.rank == 0:
            self.folder.open()
        before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.log = RunLog(self.folder.path, step.step, cfg.train.steps, cfg.train.batch_size, shown=self.rank == 0)
        self.folder.say = self.log.say
        try:
            yield
        except torch.OutOfMemoryError:
            fewer = [n for n in range(step.group_size, step.microbatch, step.group_size) if step.local_batch % n == 0]
            advice = (
                f"train.microbatch={fewer[-1]}: gradients accumulate, the batch stays" if fewer else "a smaller network"
            )
            raise ConfigError(
                f"train.microbatch: {self.device} has no memory for {step.microbatch} images a pass; set {advice}"
            ) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFailed(
                f"{self.folder.path}: a process that decodes images was killed, by want of memory?; the newest "
                f"checkpoint is of step {self.folder.saved:,}; set data.workers lower, and continue with --resume"
            ) from None
        finally:
            self.log.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_signal(self, signum: int, frame: object) -> None:
        """The loop finishes its step and saves; a second Ctrl-C ends it at once."""
        if self.stopping and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True
        if self.interruptible:
            self.interruptible = False  # once: what the first one breaks off must get as far as `best_effort`'s vote
            raise Interrupted("stopped before its end")

    def loop(self) -> None:
        """Train to the last step, logging, sampling, scoring and saving on the way."""
        cfg, step, total = self.cfg, self.train_step, self.cfg.train.steps
        self.log.say(self.first_line())
        resident = self.on_device()
        if cfg.train.microbatch == "auto" and self.device.type == "cuda" and step.step == 0:
            find_microbatch(step, lambda rows: self.dataset.read(rows % len(self.dataset)))
            self.log.say(f"train.microbatch: {step.microbatch} of {step.local_batch} images a pass")
        room = cfg.train.batch_size if cfg.train.microbatch is None else step.microbatch
        evaluation = Evaluation(cfg, self.dataset, step.emas[0].module, self.folder.path, self.log, room)
        rows = (self.rank * step.local_batch, (self.rank + 1) * step.local_batch)
        batches = data.batches(resident, cfg.run.seed, cfg.train.batch_size, step.step, rows, cfg.data.workers)
        stop = False
        while step.step < total and not stop:
            batch = next(batches)
            step(*batch)
            last, stop = step.step == total, any_rank(self.stopping)
            due = {
                what: not stop and every > 0 and step.step % in_steps(every, total) == 0
                for what, every in (("grid", cfg.sample.every), ("score", cfg.metrics.every))
            }
            if last or step.step % in_steps(cfg.train.log_every, total) == 0:
                self.write_log(batch)
            saving = last or stop or step.step % in_steps(cfg.train.save_every, total) == 0
            if saving:
                self.save()
            showing = []
            if due["grid"] or (last and not stop):
                showing.append(evaluation.write_grid)
            if due["score"] or (last and not stop and cfg.metrics.at_end):
                showing.append(evaluation.score)
            with self.log.untimed():
                for work in showing:
                    scores = self.best_effort(work)
                    if scores and cfg.metrics.every:
                        self.folder.keep_best(self.state(), scores)
            if saving or showing:
                wait_for_all()  # while rank 0 works alone; within a step ten minutes are all
        self.log.close()
        if self.rank == 0:
            self.log.say(self.folder.next_command(step.step))

    def first_line(self) -> str:
        """What is trained, on what, from which step."""
        cfg, model = self.cfg, self.train_step.model
        size = sum(p.numel() for p in model.parameters()) / 1e6
        return (
            f"{self.folder.path}: {cfg.objective.name} on {len(self.dataset):,} {model.codec.kind} of {cfg.data.name}, "
            f"{'x'.join(map(str, model.shape))}; {cfg.network.name} of {size:.2f}M parameters; {self.world} x "
            f"{self.device}, {self.train_step.precision}; step {self.train_step.step:,} of {cfg.train.steps:,}"
        )

    def on_device(self) -> object:
        """The dataset on the device, where it fits there."""
        try:
            return self.dataset.to(self.device)
        except torch.OutOfMemoryError:
            self.log.say(f"the images do not fit in {self.device}'s memory: they stay in this machine's")
            return self.dataset

    def best_effort(self, work: Callable[[int], Share | None]) -> Any:
        """Do what only shows how the run does: a signal cuts it short, and where it fails that is said, and no more.

        Every rank draws its share of the samples; where all could, rank 0 gathers and shows them.
        """
        step, shown = self.train_step.step, None
        share, failure = self.attempt(work, step)
        failure = of_any_rank(failure)  # none may wait for samples of one that has none
        if share and not failure:
            gather_batches(share.samples, share.count, share.batch)
            if self.rank == 0:
                shown, failure = self.attempt(share.show, share.samples)
        if failure:
            self.log.say(f"warning: step {step:,}: {work.__name__} failed ({failure})")
        return shown

    def attempt(self, work: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
        """(what work(*args) gives, None), or (None, why it failed); a signal makes it fail."""
        try:
            try:
                self.interruptible = True
                if self.stopping:
                    raise Interrupted("stopped before its end")
                return work(*args), None
            finally:
                self.interruptible = False
        except (Interrupted, Exception) as error:
            return None, " ".join(str(error).split())[:200] or type(error).__name__

    def save(self) -> None:
        """Write a checkpoint; while steps are bad no older one is removed."""
        if self.rank == 0:
            keep = 2**62 if self.train_step.streak else self.cfg.train.keep
            self.folder.save(self.state(), keep)

    def write_log(self, batch: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Log the means over the steps since the last entry; stop where all of many were bad. batch: the last one."""
        means = self.train_step.means()
        with self.log.untimed():
            bound = self.speed.bound(batch, means.get("stage", means.get("N"))) if self.rank == 0 else None
        self.log.progress(self.train_step.step, means, bound, peak_memory(self.device))
        streak = int(self.train_step.streak)
        if 0 < self.cfg.train.max_bad_steps <= streak:
            self.stop_at_bad_steps(streak)

    def stop_at_bad_steps(self, streak: int) -> None:
        """Save the weights, which no bad step has moved, and raise RunFailed with what went bad first, and where."""
        step, cfg = self.train_step, self.cfg
        first = step.step - streak
        rows = (self.rank * step.local_batch, (self.rank + 1) * step.local_batch)
        batch = next(data.batches(self.dataset, cfg.run.seed, cfg.train.batch_size, first, rows))
        found = of_any_rank(what_went_bad(step, first, *batch))
        found = found or "the step is finite when it is repeated: suspect the machine"
        self.save()
        wait_for_all()
        raise RunFailed(
            f"{self.folder.path}: stopped: loss or gradient not finite in {streak:,} steps in a row "
            f"(train.max_bad_steps), from step {first + 1:,} on. Objective {cfg.objective.name}; {found}. The newest "
            f"checkpoint is of step {self.folder.saved:,}, with the weights of step {min(first, self.folder.saved):,}; "
            "try a lower train.lr, train.grad_clip or train.precision=fp32 in a new run with train.init_from"
        )


class Interrupted(BaseException):
    """A signal came while samples were drawn or scored; no `except Exception` on the way may take it."""
