"""The training loop: precision, accumulation, ranks, and when to log, sample, score and save. No method's equations."""

from __future__ import annotations

import math
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import one_hot

import checkpoints
import config
import data
import networks
from config import Config, ConfigError, RunFailed
from ema import EMA, decay_from_half_life
from metrics import pictures, scores
from objectives.draws import Draws, key
from objectives.losses import WeightsMissing
from sampling import plan
from sampling.drawing import Drawing
from sources import vectors
from sources.augment import AUGMENT_DIM, augment
from training import build
from training.devices import (
    any_rank,
    from_rank_0,
    of_any_rank,
    other_ranks,
    pick_device,
    pick_precision,
    place,
    rank_0_first,
    wait_for_all,
)
from training.flat import FlatParameters
from training.logs import RunLog

# Settings that a resumed run may change: they decide where and how fast it runs, not what it computes.
FREE = frozenset(
    [f"run.{k}" for k in ("name", "dir", "device")]
    + [f"data.{k}" for k in ("dir", "path", "workers", "memory_gb")]
    + [f"train.{k}" for k in ("microbatch", "checkpointing", "compile", "log_every", "save_every", "keep", "init_from")]
    + [f"train.{k}" for k in ("on_save_error", "max_bad_steps")]
    + ["objective.teacher", "objective.lpips_weights"]  # where they lie; the teacher's weights are in the checkpoint
    + [f"sample.{k}" for k in config.Sample.model_fields]
    + [f"metrics.{k}" for k in config.Metrics.model_fields]
)


def train(cfg: Config, resume: bool = False) -> None:
    """Train as `cfg` says, in its run folder; `resume` goes on from the newest good checkpoint there.

    Raises ConfigError for what the user must change, RunFailed where the machine or the numbers end it.
    """
    folder = cfg.run.folder
    if not resume and (folder / "config.yml").exists():
        raise ConfigError(
            f"run.dir: {folder} already holds a run; add --resume to continue it, or name another folder: "
            f"run.dir={folder}-2"
        )
    checkpoints.refuse_links(folder)
    try:
        run = Trainer(cfg)
        if resume:
            run.resume()
        mine = (config.dump(cfg), run.step)
        if from_rank_0(mine) != mine:
            raise ConfigError(
                f"rank {run.rank}: its config or checkpoint is not rank 0's; give all ranks the same files"
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(f"network: {cfg.run.device} has no memory for this network, its gradient and EMAs") from None
    run.open_folder()
    try:
        run.loop()
    except torch.OutOfMemoryError:
        fewer = [n for n in range(run.unit, run.microbatch, run.unit) if run.local_batch % n == 0]
        advice = (
            f"train.microbatch={fewer[-1]}: gradients accumulate, the batch stays" if fewer else "a smaller network"
        )
        raise ConfigError(
            f"train.microbatch: {run.device} has no memory for {run.microbatch} images a pass; set {advice}"
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailed(
            f"{folder}: a process that decodes images was killed, by want of memory?; the newest checkpoint is of step "
            f"{run.saved:,}; set data.workers lower, and continue with --resume"
        ) from None
    finally:
        run.close()


def learning_rate(step: int, cfg: config.Train) -> float:
    """Learning rate of step k, counted from 0: a linear rise, then held, or falling to 0 at the end."""
    rise = min((step + 1) / cfg.lr_warmup, 1.0) if cfg.lr_warmup else 1.0
    done = min(step / cfg.steps, 1.0)
    fall = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.lr_decay]
    return cfg.lr * rise * fall


class Trainer:
    """One run on this process's device; `loop` goes on from `self.step` to the last."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder, self.step = cfg, cfg.run.folder, 0
        self.rank, self.world = place()
        self.device = pick_device(cfg.run.device)
        self.precision = pick_precision(cfg.train.precision, self.device)
        # Tensor cores read channels_last; a CPU's group norm is slower in it.
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        asked = None if cfg.train.microbatch == "auto" else cfg.train.microbatch  # `loop` finds out
        self.local_batch, self.microbatch = split_batch(cfg.train.batch_size, asked, self.world)
        with rank_0_first():
            self.dataset = data.load(cfg.data)
        self.scaling = None  # of vectors; images have none
        if isinstance(self.dataset, vectors.Vectors):
            self.shape = {"shape": self.dataset.shape, "condition_dim": self.dataset.condition_dim}
            self.scaling = vectors.Scaling.fit(self.dataset, cfg.network.sigma_data, cfg.data.bounds).to(self.device)
        else:
            self.shape = {
                "resolution": self.dataset.resolution,
                "channels": self.dataset.channels,
                "label_dim": self.dataset.num_classes if cfg.data.conditional else 0,
                "augment_dim": AUGMENT_DIM if cfg.data.augment else 0,
            }
        self.model = self._build_model()
        try:
            self.objective = build.build(cfg, self.model, self._load_teacher()).to(self.device)
        except WeightsMissing as error:
            raise ConfigError(str(error)) from None
        self.unit = getattr(self.objective, "unit", 1)  # images that belong together in a pass
        if self.microbatch % self.unit:
            raise ConfigError(
                f"train.batch_size: a pass of {self.microbatch} images on each of {self.world} devices is no multiple "
                f"of the {self.unit} that objective {cfg.objective.name} takes together"
            )
        self.emas = [EMA(self.model, decay, cfg.ema.warmup) for decay in self._decays()]
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._compile()
        self.sums: dict[str, Any] = defaultdict(float)  # since the last log; tensors stay on the device
        self.counts: dict[str, Any] = defaultdict(float)  # of the sums that are not over steps
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)  # steps with a non-finite gradient
        self.streak = torch.zeros_like(self.skipped)  # of them, those in a row up to now
        self.saved = 0  # the step of the newest checkpoint
        self.problem = ""  # why the last one could not be written
        self.best: dict[str, Any] | None = None  # the scores in best.ckpt, and the metric they are by
        self.stopping = self.interruptible = False

    # Building ---------------------------------------------------------------------------------------------------------

    def _build_model(self) -> networks.Preconditioner:
        torch.manual_seed(key(self.cfg.run.seed, "weights"))  # the same on every rank: nothing to broadcast
        try:
            model = networks.build(self.cfg.network, **self.shape)
        except ValueError as error:
            raise ConfigError(f"network: {error}") from None
        model.scaling = self.scaling
        start = self.cfg.train.init_from or self._teacher_path()
        if start:
            checkpoints.initialise(model, start)
        model = model.to(self.device, memory_format=self.layout).train()
        for block in model.modules():
            if hasattr(block, "checkpointing"):
                block.checkpointing = self.cfg.train.checkpointing
        if self.precision == "fp64":
            model.double()
        elif self.precision != "fp32":
            model.autocast = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return model

    def _teacher_path(self) -> str | None:
        return getattr(self.cfg.objective, "teacher", None)

    def _load_teacher(self) -> networks.Preconditioner | None:
        path = self._teacher_path()
        if path is None:
            return None
        teacher = checkpoints.load_model(path, self.device)
        for name, here in self.shape.items():
            there = getattr(teacher, {"resolution": "img_resolution", "channels": "img_channels"}.get(name, name))
            if there != here and (name != "augment_dim" or here):
                raise ConfigError(f"objective.teacher: {path}: its {name} is {there}, this run's {here}")
        if self.scaling is not None and teacher.scaling.values() != self.scaling.values():
            raise ConfigError(f"objective.teacher: {path}: was trained on vectors of another mean, spread or bounds")
        if self.precision == "fp64":
            teacher.double()
        teacher.autocast = self.model.autocast
        return teacher.to(memory_format=self.layout)

    def _decays(self) -> list[float]:
        if self.cfg.ema.half_life_kimg:
            batch = self.cfg.train.batch_size
            return [decay_from_half_life(kimg * 1000, batch) for kimg in self.cfg.ema.half_life_kimg]
        return self.cfg.ema.decay

    def _build_optimizer(self) -> torch.optim.Optimizer:
        cfg, on_gpu = self.cfg.train, self.device.type == "cuda"
        parameters = [p for m in (self.model, self.objective) for p in m.parameters() if p.requires_grad]
        self.flat = FlatParameters(parameters)
        self.gradient, parameters = self.flat.gradient, [self.flat.vector]
        # On a GPU the rate is a tensor, so that a bad step can be masked there without waiting for the result.
        lr = torch.tensor(cfg.lr, device=self.device) if on_gpu else cfg.lr
        options = {"lr": lr, "betas": tuple(cfg.betas)}
        if cfg.optimizer == "radam":
            return torch.optim.RAdam(parameters, **options, foreach=True, capturable=on_gpu)
        adam = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
        return adam(parameters, **options, fused=True)

    def _compile(self) -> None:
        how = self.cfg.train.compile
        if how is False or (how == "auto" and self.device.type != "cuda"):
            return
        import torch._inductor.config as inductor

        inductor.fallback_random = True  # dropout then draws as in eager mode, so that two passes can share a mask
        try:
            torch.compile(torch.nn.SiLU())(torch.ones(8, device=self.device))
        except Exception as error:  # no C++ compiler, no Triton, no support: each raises its own
            if self.rank == 0:
                reason = " ".join(str(error).split())[:150]
                print(
                    f"warning: train.compile: nothing compiles here, training goes on without: {reason}",
                    file=sys.stderr,
                )
            return
        for module in [self.model, *self.objective.modules()]:
            if isinstance(module, networks.Preconditioner):
                module.model.compile(dynamic=False, mode=how if how == "reduce-overhead" else None)

    # The run folder and its checkpoints -------------------------------------------------------------------------------

    def open_folder(self) -> None:
        """Make the run folder with its config and log files, and take over the signals that end a run."""
        cfg = self.cfg
        if self.rank == 0:
            try:
                self.write_config()
                checkpoints.sweep(self.folder)
            except OSError as error:
                raise ConfigError(f"run.dir: {self.folder} cannot be written: {error.strerror}") from None
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.log = RunLog(self.folder, self.step, cfg.train.steps, cfg.train.batch_size, shown=self.rank == 0)
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        kind = "images" if self.scaling is None else "vectors"
        self.log.say(
            f"{self.folder}: {cfg.objective.name} on {len(self.dataset):,} {kind} of {cfg.data.name}, "
            f"{'x'.join(map(str, self.model.shape))}; {cfg.network.name} of {size:.2f}M "
            f"parameters; {self.world} x {self.device}, {self.precision}; step {self.step:,} of {cfg.train.steps:,}"
        )

    def write_config(self) -> None:
        """config.yml of the run folder: every setting of this run."""
        text = config.dump(self.cfg).encode()
        checkpoints.write_atomically(self.folder / "config.yml", lambda file: file.write(text))

    def close(self) -> None:
        """Close the logs and give the signals back."""
        self.log.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.stopping and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True  # the loop finishes its step and saves
        if self.interruptible:
            raise Interrupted("stopped before its end")

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on. Draws and data order are functions of (seed, step): no generator is here."""
        return {
            "step": self.step,
            "microbatch": self.microbatch,
            "config": self.cfg.model_dump(),
            "data": {
                "shape": self.shape,
                "class_counts": self.class_counts(),
                "scaling": self.scaling and self.scaling.values(),
            },
            "model": self.model.state_dict(),
            "ema": [ema.module.state_dict() for ema in self.emas],
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer_state(),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
        }

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's moments as one tensor a parameter, and its scalars."""
        own = self.optimizer.state[self.flat.vector]
        return {name: self.flat.split(v) if v.shape == self.gradient.shape else v for name, v in own.items()}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Only the state: how the optimizer works (fused, capturable) is this device's choice, not the checkpoint's."""
        own = {name: self.flat.join(v) if isinstance(v, list) else v for name, v in state.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})

    def class_counts(self) -> list[int] | None:
        """Training images of each class; None for an unconditional network."""
        if not self.shape.get("label_dim"):
            return None
        return torch.bincount(self.dataset.labels, minlength=self.dataset.num_classes).tolist()

    def save(self) -> None:
        """Write a checkpoint; while steps are bad no older one is removed."""
        if self.rank != 0:
            return
        keep = sys.maxsize if self.streak else self.cfg.train.keep
        if self.write_checkpoint(lambda: checkpoints.save(self.state(), self.folder / "checkpoints", self.step, keep)):
            self.saved = self.step

    def write_checkpoint(self, write: Callable[[], Any]) -> bool:
        """Whether it could be written; where the disk refuses, say so: the previous one stays good.

        Weights that are not finite are not written.
        """
        folder = self.folder / "checkpoints"
        try:
            parts = (self.model, self.objective, *(ema.module for ema in self.emas))
            if not all(value.isfinite().all() for part in parts for value in part.state_dict().values()):
                raise RuntimeError("the weights are not finite")
            if not (self.folder / "config.yml").exists():  # someone removed the folder: --resume will ask for it
                self.write_config()
            write()
            return True
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.problem = reason = " ".join(str(error).split())[:200]
            before = f"the one of step {self.saved:,} is the newest" if self.saved else "there is none yet"
            message = f"step {self.step:,}: no checkpoint could be written in {folder} ({reason}); {before}"
            if self.cfg.train.on_save_error == "stop":
                raise RunFailed(f"{message}; stopped as train.on_save_error says") from None
            self.log.say(f"warning: {message}")
            return False

    def resume(self) -> None:
        """Take the state of the newest whole checkpoint of the run folder; stay at step 0 where none was saved yet."""
        folder = self.folder / "checkpoints"
        if not checkpoints.saved(folder):
            print(f"{self.folder}: nothing is saved there yet: starting at step 0", file=sys.stderr)
            return
        path, state, problems = checkpoints.newest_good(folder)
        for problem in problems:
            print(f"warning: {problem}; going on from {path}", file=sys.stderr)
        self._check_same(checkpoints.config_of(state, path), path)
        if self.scaling is not None and state["data"]["scaling"] != self.scaling.values():
            raise ConfigError(f"data.path: {self.cfg.data.path} does not hold the vectors that {path} was trained on")
        try:
            self.model.load_state_dict(state["model"])
            for ema, weights in zip(self.emas, state["ema"], strict=True):
                ema.module.load_state_dict(weights)
            self.objective.load_state_dict(state["objective"])
            self.load_optimizer_state(state["optimizer"])
            if state["scaler"]:  # none where another device, which needed none, wrote it
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoints.CheckpointError(f"{path}: does not fit this run ({reason})") from None
        self.skipped.fill_(state.get("skipped", 0))
        self.step = self.saved = state["step"]
        if self.cfg.train.microbatch == "auto":  # what was found holds: the sums' order is part of a run's numbers
            self.microbatch = math.gcd(self.local_batch, state.get("microbatch", self.local_batch))
        best = folder / "best.ckpt"
        if best.exists():
            try:
                self.best = checkpoints.load(best)["best"]
            except (checkpoints.CheckpointError, KeyError) as error:
                print(f"warning: {error}; the next score makes a new one", file=sys.stderr)

    def _check_same(self, saved: Config, path: Path) -> None:
        scheduled = getattr(self.objective, "scheduled", False) or self.cfg.train.lr_decay != "none"
        different = config.first_difference(saved, self.cfg, FREE if scheduled else FREE | {"train.steps"})
        if different:
            raise ConfigError(
                f"{path}: was trained with another config: {different}; set it back to resume, or start anew in "
                "another run.dir (train.init_from takes the weights)"
            )

    # The loop ---------------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """Train to the last step, logging, sampling, scoring and saving on the way."""
        cfg, total = self.cfg, self.cfg.train.steps
        rows = (self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        try:
            resident = self.dataset.to(self.device)
        except torch.OutOfMemoryError:
            self.log.say(f"the images do not fit in {self.device}'s memory: they stay in this machine's")
            resident = self.dataset
        if cfg.train.microbatch == "auto" and self.device.type == "cuda" and self.step == 0:
            self.find_microbatch()
        batches = data.batches(resident, cfg.run.seed, cfg.train.batch_size, self.step, rows, cfg.data.workers)
        stop = False
        while self.step < total and not stop:
            self.train_step(*next(batches))
            self.step += 1
            last, stop = self.step == total, any_rank(self.stopping)
            if self.step % cfg.train.log_every == 0 or last:
                self.write_log()
            saving = self.step % cfg.train.save_every == 0 or last or stop
            if saving:
                self.save()
            showing = [] if stop else [self.write_grid] * (due(self.step, cfg.sample.every) or last)
            if not stop and (due(self.step, cfg.metrics.every) or (last and cfg.metrics.at_end)):
                showing.append(self.score)
            with self.log.untimed():
                for work in showing:
                    self.aside(work)
            if saving or showing:
                wait_for_all()  # while rank 0 works alone; within a step ten minutes are all
        self.log.close()
        self.say_next()

    def aside(self, work: Callable[[], None]) -> None:
        """Do what only shows how the run does: a signal cuts it short, and where it fails that is said, and no more."""
        try:
            self.interruptible = not self.stopping
            if self.interruptible:
                work()
        except RunFailed:
            raise
        except (Interrupted, Exception) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.log.say(f"warning: step {self.step:,}: {work.__name__} failed ({reason})")
        finally:
            self.interruptible = False

    def find_microbatch(self) -> None:
        """Halve the images of a pass until one fits on every rank's GPU."""
        later = [torch.empty_like(self.gradient) for _ in range(3)]  # the optimizer's moments, and room to work
        while not self.fits(self.microbatch):
            halves = range(self.microbatch // 2, 0, -1)
            smaller = next((n for n in halves if self.local_batch % n == 0 and n % self.unit == 0), None)
            if smaller is None:
                raise ConfigError(
                    f"train.microbatch: {self.device} has no memory for {self.microbatch} images a pass; set "
                    "train.checkpointing=true, or take a smaller network"
                )
            self.microbatch = smaller
        del later
        self.log.say(f"train.microbatch: {self.microbatch} of {self.local_batch} images a pass")

    def fits(self, count: int) -> bool:
        """Whether a pass over so many images fits on every rank; nothing moves but the gradient."""
        images, labels = self.dataset.read(torch.arange(count) % len(self.dataset))
        full = False
        try:
            with torch.compiler.set_stance("force_eager"):  # compiling each try would take minutes
                x, conditions, draws = self.prepare(images, labels, 0)
                self.objective(self.model, x, step=self.step, draws=draws, **conditions).loss.backward()
        except torch.OutOfMemoryError:
            full = True
        self.gradient.zero_()
        torch.cuda.empty_cache()
        return not any_rank(full)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """One optimizer step on this rank's uint8 images (B, C, H, W) and labels (B,), or vectors and conditions."""
        self.backward(images, labels)
        if self.world > 1:
            with other_ranks():
                dist.all_reduce(self.gradient)
            self.gradient /= self.world
        self.update(learning_rate(self.step, self.cfg.train))
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(self.model, step=self.step)
        for ema in self.emas:
            ema.update(self.model, self.step + 1)

    def backward(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """The gradient of this rank's batch, in microbatches."""
        starts = range(0, self.local_batch, self.microbatch)
        self.gradient.zero_()
        for start in starts:
            part = slice(start, start + self.microbatch)
            x, conditions, draws = self.prepare(images[part], labels if labels is None else labels[part], start)
            torch.manual_seed(key(self.cfg.run.seed, "dropout", self.step, self.rank, start))
            if self.cfg.train.compile == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()  # no output of the pass before is needed any more
            out = self.objective(self.model, x, step=self.step, draws=draws, **conditions)
            self.scaler.scale(out.loss / len(starts)).backward()
            self.gradient[0] += 0 * out.loss.detach()  # a bad loss makes a bad step, whatever its gradient
            self.add_to_log({"loss": out.loss, **out.log}, 1 / len(starts))

    def prepare(
        self, images: torch.Tensor, labels: torch.Tensor | None, start: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Draws]:
        """What the model sees, conditions and draws for rows `start`... of this rank's batch, on the device."""
        rows = {
            "start": self.rank * self.local_batch + start,
            "total": self.cfg.train.batch_size,
            "device": self.device,
        }
        draws = Draws(key(self.cfg.run.seed, "objective", self.step), len(images), **rows)
        looks = Draws(key(self.cfg.run.seed, "augment", self.step), len(images), **rows)
        images = images.to(self.device, non_blocking=True)
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        if self.scaling is not None:
            given = {} if labels is None else {"condition": self.scaling.condition(labels.to(self.device, dtype))}
            return self.scaling.normalise(images.to(dtype)), given, draws
        if self.cfg.data.flip:
            images = data.flip(images, looks.integers(2, (len(images),)).bool())
        x = data.to_float(images, dtype)
        x = x.contiguous(memory_format=self.layout)
        conditions = {}
        if self.cfg.data.augment:
            x, conditions["augment_labels"] = augment(x, self.cfg.data.augment, looks)
        if self.shape["label_dim"]:
            classes = labels.to(self.device, non_blocking=True)
            conditions["class_labels"] = one_hot(classes, self.shape["label_dim"]).to(x.dtype)
        return x, conditions, draws

    def update(self, lr: float) -> None:
        """Clip and step the optimizer. A non-finite gradient is counted and moves no weight, without a wait for it."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite()
        self.skipped += ~finite
        self.streak += 1
        self.streak *= ~finite
        self.add_to_log({"grad_norm": norm, "lr": lr})
        if self.cfg.train.grad_clip:
            self.gradient *= (self.cfg.train.grad_clip / norm).clamp(max=1)
        self.gradient.masked_fill_(~finite, 0)
        for group in self.optimizer.param_groups:  # a rate of 0 holds the weights still
            if torch.is_tensor(group["lr"]):
                group["lr"].copy_(lr * finite)
            else:
                group["lr"] = lr * float(finite)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    # What the user sees -----------------------------------------------------------------------------------------------

    def add_to_log(self, values: dict[str, Any], weight: float = 1.0) -> None:
        """Add to the sums that the next log entry averages; tensors are not read here."""
        for name, value in values.items():
            if isinstance(value, tuple):  # (sum, count) of a part of the batch
                value, count = value
                self.counts[name] += count
            else:
                value = weight * value
            self.sums[name] += value.detach() if torch.is_tensor(value) else value

    def write_log(self) -> None:
        """Log the means over the steps since the last entry."""
        steps = self.step - self.log.step
        means = {name: float(total) / max(float(self.counts.get(name, steps)), 1) for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        self.log.progress(self.step, {**means, "skipped_steps": int(self.skipped)})
        if 0 < self.cfg.train.max_bad_steps <= int(self.streak):
            self.stop_at_bad_steps(int(self.streak))

    def stop_at_bad_steps(self, streak: int) -> None:
        """Save the weights, which no bad step has moved, and raise RunFailed with what went bad first, and where."""
        first = self.step - streak
        found = of_any_rank(self.what_went_bad(first)) or "the step is finite when it is repeated: suspect the machine"
        self.save()
        wait_for_all()
        raise RunFailed(
            f"{self.folder}: stopped: loss or gradient not finite in {streak:,} steps in a row (train.max_bad_steps), "
            f"from step {first + 1:,} on. Objective {self.cfg.objective.name}; {found}. The newest checkpoint is of "
            f"step {self.saved:,}, with the weights of step {min(first, self.saved):,}; try a lower train.lr, "
            "train.grad_clip or train.precision=fp32 in a new run with train.init_from"
        )

    def what_went_bad(self, step: int) -> str | None:
        """Repeat step k, counted from 0, of a bad streak with this rank's batch: the weights are still those it had.

        Where its loss is bad (noise levels) and the first layer whose output, or else gradient, is not finite.
        """
        seen: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
                if not seen and torch.is_tensor(output) and not output.isfinite().all():
                    seen.append(name)

            return hook

        modules = {**dict(self.objective.named_modules(prefix="objective")), **dict(self.model.named_modules())}
        hooks = [module.register_forward_hook(look(name)) for name, module in modules.items()]
        rows = (self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        now, self.step = self.step, step
        self.sums.clear()
        try:
            with torch.compiler.set_stance("force_eager"):  # no hook runs inside a compiled network
                self.backward(
                    *next(data.batches(self.dataset, self.cfg.run.seed, self.cfg.train.batch_size, step, rows))
                )
        finally:
            self.step = now
            for hook in hooks:
                hook.remove()
        bad = [name for name, total in self.sums.items() if not math.isfinite(total)]
        self.sums.clear()
        self.counts.clear()
        levels = [name.split("/")[1] for name in bad if name.startswith("loss_by_sigma/")]
        at = f"the loss is not finite at sigma {', '.join(levels)}" if levels else "the loss is finite"
        if seen:
            return f"{at}; the output of layer {seen[0]} is the first that is not"
        names = {id(p): n for m in (self.objective, self.model) for n, p in m.named_parameters()}
        lost = [names[id(p)] for p in self.flat.parameters if not p.grad.isfinite().all()]
        return f"{at}; the gradient of layer {lost[-1].rpartition('.')[0]} is not" if lost else None

    def samples(
        self, count: int, labels: torch.Tensor | None = None, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The first `count` samples of the run's seed from the EMA weights, on the CPU.

        uint8 images (count, C, H, W), or float32 vectors (count, ...) in their own units.
        """
        sigmas, solver = plan.plan(self.cfg)
        batch = min(256, self.microbatch)  # what training has memory for
        what = (self.emas[0].module, self.cfg.run.seed, count, sigmas, solver, labels, batch)
        return Drawing(*what, self.cfg.sample.guidance, conditions).draw(0, count)

    def write_grid(self) -> None:
        """A grid of samples as a PNG and in TensorBoard; a column for each class of a conditional network.

        Vectors are written as an npz.
        """
        if self.rank != 0:
            return
        if self.scaling is not None:
            self.write_vectors()
            return
        count, classes = self.cfg.sample.grid, self.shape["label_dim"]
        columns = classes if 1 < classes <= 20 else None
        image = pictures.grid(self.samples(count, torch.arange(count) % classes if classes else None), columns)
        path = self.folder / "samples" / f"step-{self.step:08d}.png"
        pictures.write_png(image, path)
        self.log.picture(self.step, image)
        self.log.say(f"samples: {path}")

    def write_vectors(self) -> None:
        """Sampled vectors as an npz, each with a condition of the training set."""
        count, path = self.cfg.sample.grid, self.folder / "samples" / f"step-{self.step:08d}.npz"
        conditions = self.dataset.draw_conditions(self.cfg.run.seed, range(count))
        drawn = self.samples(count, conditions=conditions)
        checkpoints.write_atomically(path, lambda file: vectors.write(drawn, conditions, file))
        self.log.say(f"samples: {path}")

    def score_vectors(self) -> None:
        """Their distance to the training set."""
        count = min(self.cfg.metrics.num, vectors.SCORED)
        conditions = self.dataset.draw_conditions(self.cfg.run.seed, range(count))
        drawn = self.samples(count, conditions=conditions)
        scores, num = vectors.score(drawn, conditions, self.dataset, self.scaling)
        self.log.curves(self.step, scores)
        self.log.say(f"score: {vectors.describe(scores, num)}")
        if self.cfg.metrics.every:
            self.keep_best(scores)

    def score(self) -> None:
        """Score samples from the EMA weights; a score that cannot be had is said, and loses nothing."""
        if self.rank != 0:
            return
        if self.scaling is not None:
            self.score_vectors()
            return
        cfg, counts = self.cfg.metrics, self.class_counts()
        labels = plan.draw_labels(self.cfg.run.seed, range(cfg.num), counts) if counts else None
        try:
            images = self.samples(cfg.num, labels)
            found = scores.score(images, self.dataset, cfg, self.cfg.data.dir, self.device, log=self.log.say)
        except scores.ScoreError as error:
            self.log.say(f"no score: {error}")
            return
        self.log.curves(self.step, found)
        self.log.say(f"score: {scores.describe(found, cfg, cfg.num)}")
        if cfg.every:
            self.keep_best(found)

    def keep_best(self, scores: dict[str, float]) -> None:
        """Keep this step as best.ckpt if it scores better, by the same metric, than the one there."""
        metric = self.cfg.metrics.model_dump(exclude={"every", "at_end"})
        if self.best is None or self.best["metric"] != metric or scores.better(scores, self.best["scores"]):
            best, path = {"metric": metric, "scores": scores}, self.folder / "checkpoints" / "best.ckpt"
            if self.write_checkpoint(lambda: checkpoints.write_state(path, {**self.state(), "best": best})):
                self.best = best

    def say_next(self) -> None:
        """The command that comes next."""
        name, last = self.folder / "config.yml", self.folder / "checkpoints" / "last.ckpt"
        if self.rank == 0 and self.saved < self.step:
            raise RunFailed(
                f"{last.parent}: step {self.step:,} could not be saved ({self.problem}); the newest checkpoint is of "
                f"step {self.saved:,}; mend that, and continue with\n  python main.py --cfg {name} --resume"
            )
        if self.step < self.cfg.train.steps:
            self.log.say(f"stopped at step {self.step:,}; continue with\n  python main.py --cfg {name} --resume")
        else:
            self.log.say(f"done; sample and score with\n  python generate.py --cfg {name} --ckpt {last} --calc_fid")


class Interrupted(BaseException):
    """A signal came while rank 0 was drawing samples or scoring; no `except Exception` on the way may take it."""


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


def split_batch(batch_size: int, microbatch: int | None, ranks: int) -> tuple[int, int]:
    """(images per rank, images per pass) of a global batch. Raises ConfigError where it does not divide."""
    if batch_size % ranks:
        raise ConfigError(f"train.batch_size: {batch_size} does not divide over {ranks} devices")
    local = batch_size // ranks
    part = min(microbatch or local, local)
    if local % part:
        raise ConfigError(f"train.microbatch: {part} does not divide the {local} images of each device")
    return local, part
