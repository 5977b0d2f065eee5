"""Which device and arithmetic a process uses, and its place among the processes of torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from config import ConfigError, RunFailed

SILENCE = timedelta(minutes=10)  # within a step: then a rank is taken for dead
PATIENCE = timedelta(
    days=7
)  # while rank 0 works alone: it downloads, decodes, scores; one that dies is noticed at once
_patient: dist.ProcessGroup | None = None


def start_ranks() -> None:
    """Join torchrun's other processes, if it started this one: NCCL on GPUs, gloo on CPUs."""
    global _patient
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        # torchrun keeps the store when it restarts: without a name for each attempt, dead ranks are found in it.
        store, rank, world = next(dist.rendezvous("env://", timeout=SILENCE))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=SILENCE)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunFailed(f"the ranks did not find each other: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def other_ranks() -> Iterator[None]:
    """Talk to the other ranks in the body. Raises RunFailed where one of them has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise RunFailed(
            f"rank {rank_and_world()[0]}: another rank has ended or does not answer ({reason}); see its own message, "
            "and start again with --resume"
        ) from None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask at the same step. Goes over the CPU, not the GPU."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    with other_ranks():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def of_any_rank(finding: str | None) -> str | None:
    """What the first rank that found something found; every rank must ask at the same step."""
    if not dist.is_initialized():
        return finding
    findings: list[str | None] = [None] * dist.get_world_size()
    with other_ranks():
        dist.all_gather_object(findings, finding, group=_patient)
    return next((finding for finding in findings if finding), None)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        with other_ranks():
            dist.broadcast_object_list(box, group=_patient)
    return box[0]


def wait_for_all() -> None:
    """Wait until every rank is here, however long one works alone."""
    if dist.is_initialized():
        with other_ranks():
            dist.barrier(group=_patient)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the body before the others: it downloads, they find the files."""
    rank, world = rank_and_world()
    if world > 1 and rank > 0:
        wait_for_all()
    yield
    if world > 1 and rank == 0:
        wait_for_all()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(name: str) -> torch.device:
    """The device that `run.device` names, one GPU a rank. Raises ConfigError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(f"run.device: {name}: torch sees no CUDA device here; use run.device=cpu or auto")
        device = torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"run.device: {device}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device: mps: torch sees no Apple GPU here; use run.device=cpu or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16, fp16 or fp64; `auto` takes what the device does fast."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere that is slow. Only Linux tells; others are a no."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read(20_000).split())
    except OSError:
        return False


def set_arithmetic(tf32: bool) -> None:
    """Say what float32 means on a GPU: TF32's 10 bits or its own 23. cuDNN may try its algorithms: shapes are fixed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
