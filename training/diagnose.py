"""What went bad in a run, and how many samples fit in a pass."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable

import torch

from config import ConfigError, RunFailed, machine_failure
from training.devices import any_rank
from training.step import TrainingStep


def what_went_bad(run: TrainingStep, step: int, values: torch.Tensor, given: torch.Tensor | None) -> str | None:
    """Repeat step k, counted from 0, of a bad streak with its batch: the weights are still those it had.

    Where its loss is bad (noise levels) and the first layer whose output, or else gradient, is not finite.
    """
    seen: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            if not seen and torch.is_tensor(output) and not output.isfinite().all():
                seen.append(name)

        return hook

    modules = {**dict(run.objective.named_modules(prefix="objective")), **dict(run.model.named_modules())}
    hooks = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    now, run.step = run.step, step
    run.sums.clear()
    try:
        with torch.compiler.set_stance("force_eager"):  # no hook runs inside a compiled network
            run.backward(values, given)
    finally:
        run.step = now
        for hook in hooks:
            hook.remove()
    bad = [name for name, total in run.sums.items() if not math.isfinite(total)]
    run.sums.clear()
    run.counts.clear()
    levels = [name.split("/")[1] for name in bad if name.startswith("loss_by_sigma/")]
    at = f"the loss is not finite at sigma {', '.join(levels)}" if levels else "the loss is finite"
    if seen:
        return f"{at}; the output of layer {seen[0]} is the first that is not"
    names = {id(p): n for m in (run.objective, run.model) for n, p in m.named_parameters()}
    lost = [names[id(p)] for p in run.flat.parameters if not p.grad.isfinite().all()]
    return f"{at}; the gradient of layer {lost[-1].rpartition('.')[0]} is not" if lost else None


def in_words(error: BaseException, run: TrainingStep, trained: bool) -> tuple[type[BaseException] | None, str]:
    """What to raise in place of an exception that ended a run, and one line to say; None where it says all itself.

    So does an unknown one in a run's first step (not trained), as of a new method.
    """
    lines = str(error).split("\n")
    if isinstance(error, torch.OutOfMemoryError) or "CPUAllocator: can't allocate memory" in lines[0]:
        fewer = [n for n in range(run.group_size, run.microbatch, run.group_size) if run.local_batch % n == 0]
        what = f"train.microbatch: {run.device} has no memory for {run.microbatch} images a pass"
        smaller = f"train.microbatch={fewer[-1]}: gradients accumulate, the batch stays" if fewer else ""
        return ConfigError, f"{what}; set {smaller or 'a smaller network'}"
    if isinstance(error, ConfigError):
        return ConfigError, str(error)
    if isinstance(error, RunFailed):
        return RunFailed, str(error)
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt, "stopped at once"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in lines[0]:
        return RunFailed, "a process that decodes images was killed, by want of memory?; set data.workers lower"
    if isinstance(error, OSError | MemoryError) and len(lines) == 1:
        return RunFailed, machine_failure(error)
    if not trained or not isinstance(error, Exception):
        return None, ""
    if "Original Traceback" in str(error):  # of a process that decodes: its last line is the error
        return RunFailed, " ".join(str(error).rstrip().split("\n")[-1].split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return RunFailed, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


Read = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]  # int64 (B,) -> a batch of the dataset


def find_microbatch(run: TrainingStep, read: Read) -> None:
    """Halve the samples of a pass until one fits on every rank's GPU. Raises ConfigError where not even one does."""
    later = [torch.empty_like(run.gradient) for _ in range(3)]  # the optimizer's moments, and room to work
    while not fits(run, read(torch.arange(run.microbatch))):
        halves = range(run.microbatch // 2, 0, -1)
        smaller = next((n for n in halves if run.local_batch % n == 0 and n % run.group_size == 0), None)
        if smaller is None:
            raise ConfigError(
                f"train.microbatch: {run.device} has no memory for {run.microbatch} images a pass; set "
                "train.checkpointing=true, or take a smaller network"
            )
        run.microbatch = smaller
    del later


def fits(run: TrainingStep, batch: tuple[torch.Tensor, torch.Tensor | None]) -> bool:
    """Whether a pass over the batch fits on every rank; nothing moves but the gradient."""
    full = False
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling each try would take minutes
            x, conditions, draws = run.prepare(*batch, 0)
            run.objective(run.model, x, step=run.step, draws=draws, **conditions).loss.mean().backward()
    except torch.OutOfMemoryError:
        full = True
    run.gradient.zero_()
    torch.cuda.empty_cache()
    return not any_rank(full)
