"""Dates of images: of the folders or archives that their keys say they lie in, or of a column beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.manifest import Manifest
from pipeline.errors import UserError, unknown
from pipeline.workspace import storage, tables

Dates = Callable[[Sequence[str]], list[str]]
"""Dates of images, as 2025-01-31, by keys in the order of the manifest; empty where there is none."""

_WHOLE = re.compile(r"(?<!\d)(\d{4})-?(\d{2})-?(\d{2})(?!\d)")
_NESTED = re.compile(r"(?:^|/)(\d{4})/(\d{2})/(\d{2})(?=/|$)")


def date_of(key: str) -> str:
    """The date of the folder `2025-01-31`, `20250131` or `2025/01/31` of a key; empty if there is none.

    The name of a folder may hold more than the date. Of several dates the innermost counts; the name of the
    image itself tells none.
    """
    return _date_of_folder(key.rpartition("/")[0])


@lru_cache(maxsize=2**10)  # many images lie in one
def _date_of_folder(folder: str) -> str:
    for pattern in (_WHOLE, _NESTED):
        for found in reversed(pattern.findall(folder)):
            try:
                return date(*map(int, found)).isoformat()
            except ValueError:
                continue
    return ""


def of_folders(keys: Sequence[str]) -> list[str]:
    """The dates in keys."""
    return [date_of(key) for key in keys]


def of_column(manifest: Manifest, column: str) -> Dates:
    """The dates in a column of the Parquet files that a manifest lists: dates, times, or texts that begin so.

    Raises:
        UserError: images that are not in Parquet files, no such column, or one of another type.
    """
    with tables.parquet(manifest.path) as file:
        first = next(file.iter_batches(1, columns=["uri", "column"])).to_pylist()[0]
    if first["column"] is None:
        raise UserError("--time: only Parquet files have columns. Leave it out, or have folders with dates.")
    _column(first["uri"], column)
    rows = _rows(manifest, column)

    def dates(keys: Sequence[str]) -> list[str]:
        wanted, found = iter(keys), list[str]()
        key = next(wanted, None)
        while key is not None:
            listed, value = next(rows)
            if listed == key:  # others could not be read
                found.append(value)
                key = next(wanted, None)
        return found

    return dates


def _rows(manifest: Manifest, column: str) -> Iterator[tuple[str, str]]:
    """Key and date of every row; the column of one file at a time is in memory."""
    uri, values = "", list[str]()
    with tables.parquet(manifest.path) as file:
        for batch in file.iter_batches(tables.ROW_GROUP, columns=["key", "uri", "offset"]):
            for row in batch.to_pylist():
                if row["uri"] != uri:
                    uri, values = row["uri"], _column(row["uri"], column)
                yield row["key"], values[row["offset"]]


def _column(uri: str, column: str) -> list[str]:
    """The dates of all rows of a Parquet file."""
    with storage.open_input(uri) as stream, pq.ParquetFile(stream) as file:
        if column not in file.schema_arrow.names:
            raise UserError(f"--time: {uri}: {unknown('column', column, file.schema_arrow.names)}")
        values = file.read(columns=[column])[column]
    if pa.types.is_temporal(values.type):
        return pc.strftime(values, "%Y-%m-%d").fill_null("").to_pylist()  # type: ignore[no-any-return]
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        raise UserError(
            f"--time: {uri}: the column {column!r} is {values.type}; expected dates, times, or texts that "
            "begin with a date, as 2025-01-31."
        )
    texts = [(value or "")[:10] for value in values.to_pylist()]
    return [text if _is_date(text) else "" for text in texts]


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == 10
