"""A run from its config to its last step: what is done when. How each thing is done lies in the rooms beside this."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import checkpoints
import config
import data
from config import Config, ConfigError, RunFailed, in_steps
from sampling import decoding
from sources.codecs import codec_from
from training import model_card, own_images, weights_and_biases
from training.build import build_model, build_objective, compile_networks, load_teacher, say_what_attends_nowhere
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
from training.diagnose import find_microbatch, in_words, what_went_bad
from training.evaluate import Evaluation, Share
from training.logs import RunLog
from training.reconstructions import Reconstructions
from training.run_folder import RunFolder, other_data
from training.speed import Speedometer, peak_memory
from training.step import TrainingStep
from training.threads import Threads


def train(cfg: Config, resume: bool = False, on_other_data: bool = False) -> None:
    """Train as `cfg` says, in its run folder; `resume` goes on from the newest good checkpoint there.

    on_other_data: also where the data are not those of the checkpoint. Raises ConfigError for what the user must
    change, RunFailed where the machine or the numbers end it; what was trained is saved first.
    """
    RunFolder(cfg).check(resume)
    weights_and_biases.check(cfg)
    cfg, chosen = own_images.settle(cfg, resume)
    if rank_and_world()[0] == 0:
        print(*chosen, sep="\n", end="\n" if chosen else "", flush=True)
    try:
        run = Trainer(cfg)
        run.to_time = bool(chosen)
        if resume:
            run.resume(on_other_data)
        elif run.rank == 0:
            say_what_attends_nowhere(cfg, run.train_step.model)
            if run.train_step.model.started:
                print(run.train_step.model.started)
        mine = (config.dump(cfg), run.train_step.step)
        if from_rank_0(mine) != mine:
            raise ConfigError(
                f"rank {run.rank}: its config or checkpoint is not rank 0's; give all ranks the same files"
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(f"network: {cfg.run.device} has no memory for this network, its gradient and EMAs") from None
    run.open_autoencoder()
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
            self.dataset = self.shown = data.load(cfg.data)
            self.rows = None  # of the dataset that are trained on; None: all
            if cfg.objective.name == "autoencoder":
                self.shown, self.held_out, self.rows = data.held_out(cfg.data, cfg.objective.held_out, self.dataset)
        codec = self.dataset.codec(cfg).to(self.device)
        model = build_model(cfg, codec, self.device, precision)
        objective = build_objective(cfg, model, load_teacher(cfg, model)).to(self.device)
        self.train_step = TrainingStep(cfg, codec, model, objective, precision)
        self.speed = Speedometer(self.train_step)
        self.threads = Threads(self.device)
        sampled = [self.train_step.emas[0].module] if self.device.type == "cuda" else []
        used = torch.nn.ModuleList([objective, *sampled])
        compile_networks(cfg.train.compile, model, used, shown=self.rank == 0)
        self.unseen: str | None = None  # why latents cannot be made images
        self.to_time = False  # whether to say, before the first step, how long the run will take
        self.stopping = self.interruptible = False
        self.unread: Exception | None = None  # why the next batch cannot be had
        self.mending = False  # for bad data, of this rank or another: a file will be mended, and then is another

    def state(self) -> dict[str, object]:
        """What a checkpoint holds: all that the run needs to go on, and how to make its model."""
        known = self.train_step.codec.state()
        if self.mending and known["data"]:
            known["data"] = {**known["data"], "fingerprint": None}
        return {**self.train_step.state(), "config": self.cfg.model_dump(), "data": known}

    def resume(self, on_other_data: bool = False) -> None:
        """Take the state of the newest whole checkpoint of the run folder; stay at step 0 where torchrun restarts a run
        that has saved none yet. Raises ConfigError, also where the data are not the checkpoint's, unless so meant."""
        shares = (self.cfg.train.lr_warmup, *(getattr(self.cfg.objective, name, None) for name in ("stage", "warmup")))
        falls = self.cfg.train.lr_decay in ("linear", "cosine")
        scheduled = falls or getattr(self.train_step.objective, "scheduled", False)
        found = self.folder.newest(scheduled or any(isinstance(share, float) for share in shares))
        if found is None:
            return
        path, state = found
        try:
            codec = self.train_step.codec
            different = other_data(state["data"], codec.state(), codec.kind)
        except (AttributeError, KeyError, TypeError, ValueError, StopIteration):  # a file made by hand
            raise checkpoints.CheckpointError(f"{path}: what it says of its data cannot be read") from None
        if different:
            self.take_other_data(path, state["data"], different, on_other_data)
        if self.train_step.codec.kind == "latents":
            self.train_step.codec.remember(state["data"]["autoencoder"])
        try:
            self.train_step.load_state(state)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoints.CheckpointError(f"{path}: does not fit this run ({reason})") from None

    def take_other_data(self, path: Path, trained: dict[str, Any], different: str, meant: bool) -> None:
        """Go on with other data than the checkpoint's, `trained`, where they are meant; else raise ConfigError."""
        d, step = self.cfg.data, self.train_step
        where = f"data.path: {d.path}" if d.path else f"data.name: {d.name}"
        what = f"{where} does not hold the {step.codec.kind} that {path} was trained on: {different}"
        if not meant:
            raise ConfigError(f"{what}; give those back, or add --other-data to go on with these")
        if self.rank == 0:
            print(f"warning: {what}; going on with these (--other-data)", file=sys.stderr)
        if trained["scaling"]:  # the network knows vectors in the units that it was trained in
            codec = codec_from(trained).to(self.device)
            codec.facts = step.codec.facts
            codec.flip = getattr(step.codec, "flip", False)
            step.codec = step.model.codec = codec
            for ema in step.emas:
                ema.module.codec = codec

    def open_autoencoder(self) -> None:
        """Load what makes images of latents. Where it is not to be had, say now that the run will show none.

        Raises ConfigError where it is another than the latents', or data.autoencoder names one that cannot be read.
        """
        step, asked = self.train_step, self.cfg.data.autoencoder
        if step.codec.kind != "latents":
            return
        missing = None
        try:
            decoding.attach([step.codec, *(ema.module.codec for ema in step.emas)], asked, self.device)
        except decoding.Missing as error:
            if asked:
                raise
            missing = str(error)
        self.unseen = of_any_rank(missing)
        if self.unseen and self.rank == 0:
            print(f"warning: {self.unseen}; the run goes on without sample grids and scores", file=sys.stderr)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """With the run folder and its logs open and the signals that end a run taken over.

        Whatever ends it, the last whole step is saved first, and the reason put in one line.
        """
        cfg, step = self.cfg, self.train_step
        if self.rank == 0:
            self.folder.open()
        before = {number: signal.signal(number, self.on_signal) for number in data.ENDING if not hung_up(number)}
        began = step.step
        self.log = RunLog(self.folder.path, step.step, cfg.train.steps, cfg.train.batch_size, shown=self.rank == 0)
        self.folder.say = self.log.say
        try:
            if cfg.train.wandb and self.rank == 0:
                self.log.wandb = weights_and_biases.WandbRun(cfg, self.log.say)
            yield
        except BaseException as error:
            self.log.close()
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                traceback.clear_frames(error.__traceback__)  # they hold what the pass that did not fit had made
            self.save_last_step(error)
            kind, words = in_words(error, step, step.step > began)
            if kind is None:
                raise
            if self.folder.saved and not (kind is RunFailed and "newest" in words):  # which says it all itself
                saved = f"step {self.folder.saved:,} is saved; " if self.rank == 0 else ""
                words += f"; {saved}continue with: {self.folder.resume_command}"
            raise kind(words) from error
        finally:
            self.log.close()
            if self.log.wandb:
                self.log.wandb.finish(failed=sys.exc_info()[0] is not None)
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
        began = step.step
        for line in self.dataset.said() if self.rank == 0 else ():
            self.log.say(line)
        self.log.say(self.first_line())
        self.log.data(step.step, self.dataset.facts())
        resident = self.on_device()
        if cfg.train.microbatch == "auto" and self.device.type == "cuda" and step.step == 0:
            find_microbatch(step, lambda rows: self.dataset.read(rows % len(self.dataset)))
            self.log.say(f"train.microbatch: {step.microbatch} of {step.local_batch} images a pass")
        if self.to_time and step.step == 0:
            self.log.say(own_images.how_long(step, self.dataset))
        room = cfg.train.batch_size if cfg.train.microbatch is None else step.microbatch
        shown = (step.emas[0].module, self.folder.path, self.log, room)
        if cfg.objective.name == "autoencoder":
            evaluation = Reconstructions(cfg, self.shown, self.held_out, *shown)
        else:
            evaluation = Evaluation(cfg, self.dataset, *shown)
        rows = (self.rank * step.local_batch, (self.rank + 1) * step.local_batch)
        order = (cfg.run.seed, cfg.train.batch_size, step.step, rows)
        batches = data.batches(resident, *order, cfg.data.workers, self.rows)
        upcoming = self.read(batches)
        stop = any_rank(self.unread is not None)
        self.choose_threads()
        while step.step < total and not stop:
            batch = upcoming
            step(*batch)
            last = step.step == total
            upcoming = None if last else self.read(batches)  # before the vote: all ranks stop where one cannot go on
            stop = any_rank(self.stopping or self.unread is not None)
            if stop:
                self.mending = any_rank(isinstance(self.unread, ConfigError))
            due = {
                what: not stop and every > 0 and step.step % in_steps(every, total) == 0
                for what, every in (("grid", cfg.sample.every), ("score", cfg.metrics.every))
            }
            every = cfg.ema.snapshot_every if cfg.ema.std else 0
            if self.rank == 0 and every and (last or step.step % in_steps(every, total) == 0):
                self.folder.keep_snapshot(self.state())  # before the checkpoint: a run that goes on from it lacks none
            if last or step.step % in_steps(cfg.train.log_every, total) == 0:
                self.write_log(batch)
                self.choose_threads()
            saving = last or stop or step.step % in_steps(cfg.train.save_every, total) == 0
            if saving:
                self.save()
            showing: list[Callable[[int], Share | None]] = []
            if due["grid"] or (last and not stop):
                showing.append(evaluation.write_grid)
            if due["score"] or (last and not stop and cfg.metrics.at_end):
                showing.append(evaluation.score)
            showing = [] if self.unseen else showing
            with self.log.untimed():
                for work in showing:
                    scores = self.best_effort(work)
                    if scores and cfg.metrics.every:
                        self.folder.keep_best(self.state(), scores)
            if saving or showing:
                wait_for_all()  # while rank 0 works alone; within a step ten minutes are all
        self.log.close()
        if self.unread is not None:
            raise self.unread
        few = 16 if step.scaler.is_enabled() else 1  # as fp16 may take to find its scale
        if step.step == total and (streak := int(step.streak)) > few:
            self.stop_at_bad_steps(streak, "the last ones")
        if self.rank == 0:
            labelled = step.codec.kind == "vectors" or self.dataset.labels is not None  # vectors need no classifier
            next_step = self.folder.next_command(step.step, labelled)
            if step.step == total and (began < total or not (self.folder.path / "README.md").exists()):
                self.write_card(next_step)
            self.log.say(next_step)

    def choose_threads(self) -> None:
        """As many CPU threads as are fastest now; said where they change. Ranks have shared out the cores."""
        if self.world == 1:
            with self.log.untimed():
                if said := self.threads.choose():
                    self.log.say(said)

    def read(self, batches: Iterator[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The next batch; None, and why in self.unread, where it cannot be had."""
        try:
            return next(batches)
        except Exception as error:
            self.unread = error
            return None

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

    def write_card(self, next_step: str) -> None:
        """The README.md of a finished run; where it fails that is said."""
        how = (self.dataset.said()[0], model_card.hardware(self.device, self.world), self.log.scored)
        try:
            text = model_card.card(self.cfg, self.train_step.model, *how, next_step.removeprefix("done; "))
            self.log.say(f"model card: {model_card.write(self.folder.path, text)}")
        except OSError as error:
            self.log.say(f"warning: the model card could not be written ({error.strerror})")

    def save(self) -> None:
        """Write a checkpoint; while steps are bad no older one is removed."""
        if self.rank == 0:
            keep = 2**62 if self.train_step.streak else self.cfg.train.keep
            self.folder.save(self.state(), keep)

    def save_last_step(self, error: BaseException) -> None:
        """Save what was trained since the last checkpoint, before `error` ends the run.

        Not where it ends the run because nothing can be saved, or where it came in the middle of the step's update.
        """
        step, refused = self.train_step, isinstance(error, RunFailed) and self.folder.problem
        if self.rank == 0 and not refused and step.whole and step.step > self.folder.saved:
            with contextlib.suppress(RunFailed):
                self.save()

    def write_log(self, batch: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Log the means over the steps since the last entry; stop where all of many were bad. batch: the last one."""
        means = self.train_step.means()
        with self.log.untimed():
            bound = self.speed.bound(batch, means.get("stage", means.get("N"))) if self.rank == 0 else None
        self.log.progress(self.train_step.step, means, bound, peak_memory(self.device))
        streak = int(self.train_step.streak)
        if 0 < self.cfg.train.max_bad_steps <= streak:
            self.stop_at_bad_steps(streak, "train.max_bad_steps")

    def stop_at_bad_steps(self, streak: int, why: str) -> None:
        """Save the weights, which no bad step has moved, and raise RunFailed with what went bad first, and where."""
        step, cfg = self.train_step, self.cfg
        first = step.step - streak
        rows = (self.rank * step.local_batch, (self.rank + 1) * step.local_batch)
        batch = next(data.batches(self.dataset, cfg.run.seed, cfg.train.batch_size, first, rows, among=self.rows))
        found = of_any_rank(what_went_bad(step, first, *batch))
        found = found or "the step is finite when it is repeated: suspect the machine"
        if self.folder.saved < step.step:
            self.save()
        wait_for_all()
        raise RunFailed(
            f"{self.folder.path}: stopped: loss or gradient not finite in {streak:,} steps in a row "
            f"({why}), from step {first + 1:,} on. Objective {cfg.objective.name}; {found}. The newest "
            f"checkpoint is of step {self.folder.saved:,}, with the weights of step {min(first, self.folder.saved):,}; "
            "try a lower train.lr, train.grad_clip or train.precision=fp32 in a new run with train.init_from"
        )


def hung_up(number: int) -> bool:
    """Whether a signal is the end of the terminal, and nohup or its like has had it ignored."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class Interrupted(BaseException):
    """A signal came while samples were drawn or scored; no `except Exception` on the way may take it."""
