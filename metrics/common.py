"""What all scores share: images read by batches, and the error that a user can mend."""

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

Images = Any  # uint8 (N, C, H, W), or anything with a length and batch(int64 indices (B,)) -> uint8 (B, C, H, W)
ImageSet = Any  # Images with name, channels, resolution, num_classes and labels (int64 (N,), or None)
Log = Callable[[str], None]  # takes a line for the user


class ScoreError(RuntimeError):
    """A score that cannot be had for a reason the user can mend; the message is one line and says how."""


def fetch(images: Images, indices: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, C, H, W) on the CPU."""
    if isinstance(images, torch.Tensor):
        return images[indices.to(images.device)].cpu()
    return images.batch(indices).cpu()


def progress(what: str, total: int, unit: str = "image", shown: bool = True) -> tqdm:
    """A bar with the time left for what takes over two seconds; on a terminal only, and gone when it is closed."""
    settings = {"disable": None if shown else True, "delay": 2, "leave": False, "miniters": 1, "dynamic_ncols": True}
    return tqdm(desc=what, total=total, unit=unit, **settings)


def class_name(number: int, names: list[str] | None) -> str:
    """'class 3', and its name where that is another: 'class 3 (owl)'."""
    named = bool(names) and number < len(names) and names[number] != str(number)
    return f"class {number} ({names[number]})" if named else f"class {number}"


def spread(count: int, most: int) -> torch.Tensor:
    """Up to `most` int64 indices spread evenly over 0..count - 1, both ends included."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
