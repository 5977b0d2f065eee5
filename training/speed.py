"""How fast a run is, in the field's terms: the operations of a step, this machine's measured peak, and memory."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from objectives.draws import Draws
from training.step import HALF, TrainingStep

_aten = torch.ops.aten
FORMULAS = {  # torch's own, and of the CPU's fused attention, which it lacks
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Count(TorchDispatchMode):
    """Adds up operations by FORMULAS; torch's FlopCounterMode, which also tells modules apart, takes twice as long."""

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it counts, and its guard is slow

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's convolutions, matrix products and attention (a multiplication counts 2)."""
    with torch.compiler.set_stance("force_eager"), Count() as count:
        call()
    return count.total


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, its device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


@functools.lru_cache(maxsize=8)  # once a process
def matmul_peak(device: torch.device, precision: str, limit: float | None = None) -> float:
    """FLOP/s of a square matrix product in this precision, the fastest of those that `limit` seconds have room for.

    Sides double up to 4096, on a CPU to 1024, while there is time for the next. None: half a second, on a CPU 20 ms.
    """
    most, repeats = (1024, 1) if device.type == "cpu" else (4096, 10)
    dtype = HALF.get(precision, torch.float64 if precision == "fp64" else torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # the global one is not moved
    end = time.perf_counter() + (limit or (0.02 if device.type == "cpu" else 0.5))
    side, best = 64, 0.0
    while side < most:
        side *= 2
        a = torch.randn(side, side, device=device, generator=generator).to(dtype)
        out = torch.empty_like(a)
        torch.mm(a, a, out=out)  # the first looks for its kernel
        took = 0.0
        while took == 0 or (side == most and time.perf_counter() + took < end):
            took = seconds(lambda: [torch.mm(a, a, out=out) for _ in range(repeats)], device)  # noqa: B023
            best = max(best, 2 * side**3 * repeats / took)
        if time.perf_counter() + 20 * took > end:  # the next takes eight times as long, and comes twice
            break
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took since reset_peak_memory_stats, on a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none: not known
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Speedometer:
    """What images/s are measured against: the images/s at which all devices would compute at their measured peak.

    MFU is the share of it. It counts the products of all passes of a step: student, target and teacher, derivatives,
    backward, what train.checkpointing computes again, and the products with the weights' zero tangents that torch's
    forward mode computes; not the optimizer, averages and what is done element by element. The peak is that of one
    product in the run's precision, also for the steps that half precision would get wrong.
    """

    def __init__(self, step: TrainingStep):
        self.step = step
        self.counted: tuple[float | None, float | None] | None = None  # the stage of the last count, and its bound
        self.counted_at = 0.0

    def flops_per_image(self, values: torch.Tensor, given: torch.Tensor | None) -> float:
        """Of the step just done, from a pass over the first rows of its batch: nothing moves but the gradient."""
        run, rows = self.step, self.step.group_size
        if differ := getattr(run.objective, "rows_differ", False):
            rows = run.microbatch
        now, run.step = run.step, max(run.step - 1, 0)
        try:
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                x, conditions, draws = run.prepare(values[:rows], None if given is None else given[:rows], 0)
                if differ:  # in the shares of a whole batch
                    draws = Draws(0, rows, device=run.device)
                what = {"step": run.step, "draws": draws, **conditions}
                return flops(lambda: run.objective(run.model, x, **what).loss.mean().backward()) / rows
        finally:
            run.step = now
            run.gradient.zero_()

    def bound(self, batch: tuple[torch.Tensor, torch.Tensor | None], stage: float | None = None) -> float | None:
        """images/s at the peak, or None where that fails; counted anew, at most every ten seconds, in another stage."""
        if self.counted and (stage == self.counted[0] or time.perf_counter() - self.counted_at < 10):
            return self.counted[1]
        try:
            peak = matmul_peak(self.step.device, self.step.precision) * self.step.world
            self.counted = stage, peak / self.flops_per_image(*batch)
        except Exception:  # what only shows how fast a run is must not end it
            self.counted = stage, None
        self.counted_at = time.perf_counter()
        return self.counted[1]
