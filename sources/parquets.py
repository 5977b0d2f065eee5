"""Parquet shards in the Hub's layout: a column of encoded images, and one of labels."""

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError
from sources.files import reason, show
from sources.shards import Index, as_array

ENDING = ".parquet"
ROWS = 1024  # unpacked at a time
LABELS = ("label", "labels", "class", "target")  # columns that are labels where the file does not say which are


def store(part: str, cache: Path) -> str:
    """A copy of the shard's images, one after another: in the shard, any one costs unpacking its whole row group."""
    return str(cache.with_suffix(".images"))


def name_in(part: str, number: int, start: int) -> str:
    """Rows have no names of their own that are sure to tell them apart."""
    return f"row {number}"


def index(part: str, cfg: Any, cache: Path) -> Index:
    """Unpack a shard's images, as they are encoded, into store(part, cache), row after row; where they are there, and
    their labels. Raises ConfigError, also where data.dir has no room for them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(part)
    except (OSError, pa.ArrowException) as error:
        return Index(np.empty((0, 2), np.int64), np.empty(0, np.int64), cut=f"cannot be read ({reason(error)})")
    with file:
        image = _image_column(part, file.schema_arrow, cfg.image_column)
        label, classes, unusable = _label_column(part, file.schema_arrow, cfg.label_column)
        columns = [f"{image}.bytes" if pa.types.is_struct(file.schema_arrow.field(image).type) else image]
        sizes, labels, cut = _unpack(file, [*columns, label] if label else columns, Path(store(part, cache)))
    ends = sizes.cumsum()
    array, bad = as_array(labels)
    places = np.column_stack([ends - sizes, sizes])
    if len(sizes) and not sizes.any():
        raise ConfigError(f"data.path: column {show(image)} of {show(part)} holds no bytes, only paths or nothing")
    return Index(places, array, classes, unusable=unusable or bad, cut=cut)


def _unpack(file: Any, columns: list[str], store: Path) -> tuple[np.ndarray, list[Any], str]:
    """Write the images of an open file to `store`; bytes of each int64 (N,), the labels, and where it is damaged."""
    import pyarrow as pa

    sizes, labels, cut = [np.empty(0, np.int64)], [], ""
    partial = store.with_name(f"{store.name}.{os.getpid()}.partial")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            groups = (file.iter_batches(ROWS, [group], columns) for group in range(file.num_row_groups))
            batches = itertools.chain.from_iterable(groups)
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pa.ArrowException) as error:
                    cut = f"is damaged after its first {len(labels):,} rows ({reason(error)})"
                    break
                if batch is None:
                    break
                images = batch.column(columns[0].removesuffix(".bytes"))
                lengths, values = _bytes_of(images.field("bytes") if pa.types.is_struct(images.type) else images)
                out.write(values)
                sizes.append(lengths)
                labels += batch.column(columns[1]).to_pylist() if len(columns) > 1 else [None] * len(lengths)
        os.replace(partial, store)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(
            f"data.dir: the images of a parquet file could not be unpacked into {store.parent} ({reason(error)}); they "
            "are read from there, in any order: set data.dir to a folder with room for them"
        ) from error
    return np.concatenate(sizes), labels, cut


def _bytes_of(images: Any) -> tuple[np.ndarray, memoryview]:
    """Lengths int64 (N,) of binary values, 0 for a null, and all their bytes, in order."""
    import pyarrow as pa

    images = images.fill_null(b"").cast(pa.large_binary())
    _, offsets, values = images.buffers()
    ends = np.frombuffer(offsets, np.int64)[images.offset : images.offset + len(images) + 1]
    return np.diff(ends), memoryview(values or b"")[ends[0] : ends[-1]]


# Which columns --------------------------------------------------------------------------------------------------------


def _features(schema: Any) -> dict[str, Any]:
    """What the `datasets` library says of the columns that it has written: {name: {"_type": "ClassLabel", ...}}."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return {}


def _listed(schema: Any) -> str:
    return ", ".join(f"{show(column.name)} ({str(column.type)[:40]})" for column in schema)


def _image_column(part: str, schema: Any, wanted: str | None) -> str:
    """The column `wanted`; else the one that is said to be images, else a struct with `bytes`, else of bytes."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    plain = [column.name for column in schema if binary(column.type)]
    structs = [column for column in schema if pa.types.is_struct(column.type)]
    structs = [s.name for s in structs if any(inner.name == "bytes" and binary(inner.type) for inner in s.type)]
    said = [n for n, feature in _features(schema).items() if feature.get("_type") == "Image" and n in plain + structs]
    found = [wanted] if wanted in plain + structs else [] if wanted else said or structs or plain
    if len(found) == 1:
        return found[0]
    if found:
        several = " and ".join(map(show, found))
        raise ConfigError(f"data.image_column: {show(part)} has several columns of images, {several}; set it to one")
    key, what = ("image_column", f"column {show(wanted)}") if wanted else ("path", "column")
    raise ConfigError(
        f"data.{key}: {show(part)} has no {what} of images (bytes, or a struct with bytes); its columns: "
        f"{_listed(schema)}"
    )


def _label_column(part: str, schema: Any, wanted: str | None) -> tuple[str | None, list[str], str]:
    """The column of labels, its classes' names, and why it cannot be said which column it is; (None, [], "") without.

    The column `wanted`; else those said to be classes, else those of whole numbers or text that are called as LABELS.
    """
    import pyarrow as pa

    def fits(kind: Any) -> bool:
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return text or pa.types.is_integer(kind) or (pa.types.is_dictionary(kind) and fits(kind.value_type))

    known = _features(schema)
    columns = [column.name for column in schema if fits(column.type)]
    if wanted and wanted not in columns:
        raise ConfigError(
            f"data.label_column: {show(part)} has no column {show(wanted)} of numbers or text; its columns: "
            f"{_listed(schema)}"
        )
    said = [name for name in columns if known.get(name, {}).get("_type") == "ClassLabel"]
    found = [wanted] if wanted else said or [name for name in columns if name in LABELS]
    if len(found) > 1 and "label" not in found:
        return (
            None,
            [],
            f"has several columns of labels, {' and '.join(map(show, found))}; set data.label_column to one",
        )
    if not found:
        return None, [], ""
    column = "label" if "label" in found else found[0]
    names = known.get(column, {}).get("names")
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return column, [show(name) for name in names] if good else [], ""
