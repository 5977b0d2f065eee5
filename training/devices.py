"""Which device and arithmetic a process uses, and its place among the processes of torchrun."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from config import ConfigError, RunFailed

SILENCE = timedelta(minutes=10)  # within a step: then a rank is taken for dead
PATIENCE = timedelta(days=7)  # while one downloads, decodes, samples or scores; one that dies is noticed at once
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


def restarted_by_torchrun() -> bool:
    """Whether torchrun starts the same command again when it ends badly: it is then the first start and every next."""
    return any(int(os.environ.get(f"TORCHELASTIC_{name}") or 0) > 0 for name in ("RESTART_COUNT", "MAX_RESTARTS"))


def talk(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """A call of torch.distributed, where there are other ranks. Raises RunFailed where one has ended or is silent."""
    try:
        if dist.is_initialized():
            call(*args, **options)
    except RuntimeError as error:
        what = f"another rank has ended or does not answer ({' '.join(str(error).split())[:120]})"
        advice = "see its own message, and start again with --resume"
        raise RunFailed(f"rank {rank_and_world()[0]}: {what}; {advice}") from None


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask at the same step. Goes over the CPU, not the GPU."""
    votes = torch.tensor(int(flag))
    talk(dist.all_reduce, votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def of_any_rank(finding: str | None) -> str | None:
    """What the first rank that found something found; every rank must ask at the same step."""
    findings = [finding] * rank_and_world()[1]
    talk(dist.all_gather_object, findings, finding, group=_patient)
    return next((finding for finding in findings if finding), None)


def gather_batches(rows: torch.Tensor | None, count: int, batch: int) -> None:
    """Fill rank 0's rows (count, ...), on the CPU, with the others': the b-th `batch` of them is of rank b % world."""
    rank, world = rank_and_world()
    for b, start in enumerate(range(0, count, batch)):
        owner = b % world
        if rank == owner != 0:
            talk(dist.send, rows[start : start + batch], 0, group=_patient)
        elif rank == 0 != owner:
            talk(dist.recv, rows[start : start + batch], owner, group=_patient)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    talk(dist.broadcast_object_list, box, group=_patient)
    return box[0]


def wait_for_all() -> None:
    """Wait until every rank is here, however long one works alone."""
    talk(dist.barrier, group=_patient)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the body before the others: it downloads, they find the files."""
    rank, _ = rank_and_world()
    if rank > 0:
        wait_for_all()
    yield
    if rank == 0:
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
    if name == "fp64" and device.type == "mps":
        raise ConfigError("train.precision: fp64: an Apple GPU has no float64; use fp32, or run.device=cpu")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # only Linux tells what is in hardware
        if device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read(20_000).split()):
            return "bf16"
    return "fp32"


def set_arithmetic(tf32: bool) -> None:
    """Say what float32 means on a GPU: TF32's 10 bits or its own 23. cuDNN may try its algorithms: shapes are fixed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
