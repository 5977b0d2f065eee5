"""Labels of images as other people keep them: numbers, one-hot rows, EDM's dataset.json; made class numbers."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from config import ConfigError
from sources.files import reason, show

MAX_CLASSES = 100_000  # labels are given to the network one-hot


def class_numbers(where: str, labels: Any, row: Callable[[int], str] = "row {}".format) -> tuple[np.ndarray, int]:
    """Labels as int64 (N,) and the number of classes: the largest plus one, or the columns of one-hot rows.

    labels: (N,) or (N, 1) of whole numbers from 0, or one-hot (N, K); row: names the sample of a bad value.
    Raises ConfigError.
    """
    try:
        array = np.asarray(labels)
    except (ValueError, OverflowError):  # rows of unlike lengths
        array = np.empty(len(labels), object)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 1 and not len(array):
        raise ConfigError(f"{where}: there are no labels in it; give one a sample")
    flags = array.ndim == 2 and array.dtype.kind in "biuf" and ((array == 0) | (array == 1)).all()
    if flags and (array.sum(1) == 1).all() and array.shape[1] <= MAX_CLASSES:
        return array.argmax(1).astype(np.int64), array.shape[1]
    if array.ndim != 1:
        raise ConfigError(
            f"{where}: labels are {array.dtype} {array.shape}; they must be whole numbers, (N,) or (N, 1), or one-hot "
            "(N, K)"
        )
    if array.dtype.kind in "iuf" and not (isinstance(labels, list) and bool in map(type, labels)):
        bad = (array < 0) | (array >= MAX_CLASSES) | (array != np.floor(array))
        if not bad.any():
            return array.astype(np.int64), int(array.max()) + 1
        first = int(bad.argmax())
    else:  # text, true and false, numbers without end
        first = next((i for i, label in enumerate(labels) if not _whole(label)), 0)
    value = array[first].item() if isinstance(labels, np.ndarray) and array.dtype.kind in "iuf" else labels[first]
    raise ConfigError(
        f"{where}: labels must be whole numbers 0 to {MAX_CLASSES - 1}, not {repr(value)[:50]} ({row(first)})"
    )


def _whole(label: Any) -> bool:
    return type(label) is int and 0 <= label < MAX_CLASSES


def unused(error: ConfigError) -> str:
    """How labels are counted that are no classes, where they are not used."""
    return f"set of labels, which are not used ({str(error).removeprefix('data.path: ')})"


def in_json(where: str, text: bytes, names: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Labels int64 (N,) of `names`, and the classes' names, as EDM's dataset.json says; (None, []) where it has none.

    Classes are called "0", "1", ... unless the file has a list `classes` of their names. Raises ConfigError.
    """
    try:
        data = json.loads(text)
    except Exception as error:  # RecursionError included: brackets in brackets without end
        raise ConfigError(f"{where} cannot be read ({reason(error)})") from error
    pairs: Any = data.get("labels") if isinstance(data, dict) else 0
    if pairs is None:
        return None, []
    by_name: dict[str, Any] = {}
    two = None
    try:
        for name, label in pairs:
            if by_name.setdefault(str(name), label) != label:
                two = two or (str(name), label)
    except (TypeError, ValueError):
        raise ConfigError(f'{where} must read {{"labels": [["name.png", 3], ...]}} or {{"labels": null}}') from None
    if two:
        both = f"{repr(by_name[two[0]])[:50]} and {repr(two[1])[:50]}"
        raise ConfigError(f"{where} gives {show(two[0])} two labels, {both}; keep one of them")
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise ConfigError(f"{where} gives no label for {show(missing)}; add it, or write null for all labels")
    numbers, count = class_numbers(where, [by_name[name] for name in names], lambda i: show(names[i]))
    called = data.get("classes")
    if isinstance(called, list) and len(called) >= count and all(isinstance(name, str) for name in called):
        return numbers, called
    return numbers, [str(i) for i in range(count)]
