"""Which device and arithmetic a process uses, and its place among the processes of torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from config import ConfigError


def start_ranks() -> None:
    """Join torchrun's other processes, if it started this one: NCCL on GPUs, gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask at the same step. Goes over the CPU, not the GPU."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the body before the others: it downloads, they find the files."""
    rank, world = place()
    if world > 1 and rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def place() -> tuple[int, int]:
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
