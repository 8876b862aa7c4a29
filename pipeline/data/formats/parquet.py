"""Parquet files with encoded images: a binary column, or the hub's struct of bytes and path.

The manifest refers to file and row; image bytes are read when they are needed. Keys are the images' paths
(`image.path`, or a column `path`) where each row of the dataset has its own, else `<file>#<row>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.formats import _files
from pipeline.data.formats._files import Source
from pipeline.data.manifest import SCHEMA
from pipeline.data.notes import Notes
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "file or folder"

IMAGES = ("image", "bytes", "img", "image_bytes", "jpg", "jpeg", "png", "webp")
"""Columns that are looked for, in this order, where `images` names none."""


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """One row per row of the files, in the order of their names."""
    files = _files.sources(dataset, (".parquet",), notes.files)
    by_path = _paths_are_unique(dataset, files)
    for name, entry in files:
        yield from _batches(dataset, name, entry, by_path)


@dataclass(frozen=True)
class _Columns:
    """Dotted names of the columns of a file."""

    image: str
    path: str | None
    label: str | None


def _batches(dataset: Dataset, name: str, entry: Source, by_path: bool) -> Iterator[pa.RecordBatch]:
    """Rows of one file, a row group at a time."""
    where, start = f"datasets.{dataset.name}: {_files.spelled(name)}", 0
    with _open(dataset, name, entry) as file:
        columns = _columns(dataset, file.schema_arrow, where)
        identity = f"{entry.identity}#{columns.image}"
        for group in range(file.num_row_groups):
            count = _rows(file, group, columns.image, where)
            numbers = range(start, start + count)
            paths = _values(file, group, columns.path) if by_path else None
            given = _values(file, group, columns.label)
            if any(values is not None and len(values) != count for values in (paths, given)):
                raise UserError(f"{where}: row group {group} is damaged: its columns differ in length.")
            fields: dict[str, Any] = {
                "key": [f"{_files.spelled(name)}#{row}" for row in numbers] if paths is None else paths,
                "uri": [entry.uri] * count,
                "offset": numbers,
                "column": [columns.image] * count,
                "identity": [identity] * count,
                **_labelled(given, count, where, start),
            }
            nothing = dict.fromkeys(SCHEMA.names, [None] * count)
            yield pa.RecordBatch.from_pydict(nothing | fields, SCHEMA)
            start += count


def _rows(file: pq.ParquetFile, group: int, image: str, where: str) -> int:
    """Rows of a row group.

    Raises:
        UserError: the file says another number of it than of its images.
    """
    found = file.metadata.row_group(group)
    columns = [found.column(number) for number in range(found.num_columns)]
    values = next((column.num_values for column in columns if column.path_in_schema == image), None)
    if values != found.num_rows:
        raise UserError(f"{where}: row group {group} is damaged: {found.num_rows} rows and {values} images.")
    return found.num_rows  # type: ignore[no-any-return]


@contextmanager
def _open(dataset: Dataset, name: str, entry: Source) -> Iterator[pq.ParquetFile]:
    with storage.open_input(entry.uri) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            where = f"datasets.{dataset.name}.path: {_files.spelled(name)}"
            raise UserError(f"{where} is not a readable Parquet file: {error}") from None
        yield file


def _columns(dataset: Dataset, schema: pa.Schema, where: str) -> _Columns:
    """The columns that hold images, paths and labels.

    Raises:
        UserError: no column of the name, or none with bytes, naming the columns there are.
    """
    image = dataset.images or next((name for name in IMAGES if name in schema.names), "image")
    known = ", ".join(f"{column.name} ({column.type})" for column in schema)
    if image not in schema.names:
        raise UserError(f"{where}: no column {image!r}. Name one with `images:`; the columns are: {known}.")
    kind, fields = schema.field(image).type, set[str]()
    if pa.types.is_struct(kind):
        fields = {column.name for column in kind}
        kind = kind.field("bytes").type if "bytes" in fields else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{where}: the column {image!r} holds no bytes; the columns are: {known}.")
    label = dataset.labels or "label"
    if labels.needed(dataset) and label not in schema.names:
        raise UserError(f"{where}: no column {label!r}. Name one with `labels:`; the columns are: {known}.")
    path = f"{image}.path" if "path" in fields else "path" if "path" in schema.names else None
    labelled = labels.read(dataset) and label in schema.names
    return _Columns(f"{image}.bytes" if fields else image, path, label if labelled else None)


def _values(file: pq.ParquetFile, group: int, column: str | None) -> pa.Array | None:
    """One column of a row group; of the struct it lies in, no other field is read."""
    if column is None:
        return None
    values = file.read_row_group(group, columns=[column]).column(0).combine_chunks()
    return pc.struct_field(values, [0]) if pa.types.is_struct(values.type) else values


def _paths_are_unique(dataset: Dataset, files: list[tuple[str, Source]]) -> bool:
    """Whether the paths of all rows can be keys."""
    found: list[pa.Array] = []
    for name, entry in files:
        with _open(dataset, name, entry) as file:
            path = _columns(dataset, file.schema_arrow, f"datasets.{dataset.name}: {name}").path
            for group in range(file.num_row_groups):
                values = _values(file, group, path)
                if values is None or values.null_count or not _is_text(values.type):
                    return False
                found.append(values.cast(pa.string()))
    paths = pa.chunked_array(found, pa.string())
    return bool(pc.count_distinct(paths).as_py() == len(paths))


def _labelled(values: pa.Array | None, count: int, where: str, start: int) -> dict[str, Any]:
    """The columns `label` and `accepted` of consecutive rows."""
    if values is None:
        return {"label": [-1] * count}
    if pa.types.is_integer(values.type) and not _too_large(values):
        return {"label": values.cast(pa.int32()).fill_null(-1)}
    found = [labels.of(value, f"{where}, row {row}") for row, value in enumerate(values.to_pylist(), start)]
    return {name: [row[name] for row in found] for name in ("label", "accepted")}


def _too_large(values: pa.Array) -> bool:
    """Whether integers do not fit the manifest; the row is then named as one whose label is wrong."""
    limits = pc.min_max(values).as_py()
    return any(limit is not None and abs(limit) >= 2**31 for limit in limits.values())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
