"""From manifest rows to bytes: the one place that knows where images may be stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.schema import MAX_IMAGE_MIB
from pipeline.workspace import storage
from pipeline.workspace.patience import Unavailable, is_transient
from pipeline.workspace.storage import TooLarge

THREADS = 16
"""Reads of remote files that are under way at once."""

BATCH = 64
"""Rows that are held at once."""

CONTENT = "sha256-"
"""What identities begin with that are of an image's bytes, rather than of the size and time of its file."""

Content = bytes | Exception


def fetch(table: pa.Table, limit: int = MAX_IMAGE_MIB * 2**20) -> Iterator[Content]:
    """The stored bytes of each row of a manifest, in order, or the exception that reading it raised.

    A file that was changed after it was listed ends it with `storage.Changed`: what comes of it must not be
    kept under the name of what was listed. A store that does not answer ends it with `Unavailable`: nothing
    is known about the image then. An image of more than `limit` bytes is not read: its content is `TooLarge`.

    Streams: holds a few rows and at most one row group of a Parquet file, whatever the size of the table.
    Rows of Parquet files are best asked for in one table, in order: each row group is then read once.
    """
    for (kind, file), rows in groupby(_rows(table), key=_place):
        if kind == "parquet":
            yield from _values(file, list(rows), limit)
        elif kind == "remote":
            yield from storage.ahead(partial(_content, limit=limit), rows, THREADS)
        else:
            yield from (_content(row, limit) for row in rows)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    table = table.select(["uri", "offset", "length", "column", "bytes", "identity"])
    for batch in table.to_batches(max_chunksize=BATCH):
        yield from batch.to_pylist()


def _place(row: dict[str, Any]) -> tuple[str, str]:
    """What rows that are read together have in common: how they are read, and the Parquet file."""
    if row["column"] is not None:
        return "parquet", row["uri"]
    return "remote" if row["uri"] is not None and storage.is_remote(row["uri"]) else "local", ""


def _content(row: dict[str, Any], limit: int) -> Content:
    if row["bytes"] is not None:
        return row["bytes"]  # type: ignore[no-any-return]
    if row["uri"] is None:
        return EOFError("the archive does not hold all of this image")
    try:
        known = None if _content_of(row) else row["identity"]
        return _same(row, storage.read(row["uri"], row["offset"], row["length"], known, limit))
    except Exception as error:
        return _final(error, row)


def _final(error: Exception, row: dict[str, Any]) -> Exception:
    """What reading a row's image raised, as its content: a server may answer anything.

    Raises:
        Changed: it was that; or bytes that were listed cannot be read any more.
        Unavailable: it was that, or it may be gone when the file is read again.
    """
    if isinstance(error, storage.Changed | Unavailable):
        raise error
    if isinstance(error, TooLarge):
        return error
    if is_transient(error):
        raise Unavailable.after(row["uri"], error) from None
    if _content_of(row):
        raise storage.Changed(row["uri"]) from error
    return error


def _same(row: dict[str, Any], content: bytes) -> bytes:
    """The bytes of an image, which must be those that were listed where these are known."""
    listed = _content_of(row)
    if listed and listed != hashlib.sha256(content).hexdigest():
        raise storage.Changed(row["uri"])
    return content


def _content_of(row: dict[str, Any]) -> str:
    """The digest of the bytes that were listed; empty where they are known by their file."""
    identity: str = row["identity"] or ""
    return identity.removeprefix(CONTENT) if identity.startswith(CONTENT) else ""


def _values(path: str, rows: list[dict[str, Any]], limit: int) -> Iterator[Content]:
    """Values of a column of one Parquet file; reads only the row groups that the rows lie in."""
    with ExitStack() as stack:
        try:
            _require_unchanged(rows[0])
            stream = stack.enter_context(storage.open_input(path))
            file = stack.enter_context(pq.ParquetFile(stream))
        except Exception as error:
            yield from [_final(error, rows[0])] * len(rows)
            return
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        numbers = np.array([row["offset"] for row in rows])
        groups = np.searchsorted(starts[1:-1], numbers, side="right")
        for group in np.unique(groups).tolist():
            wanted = [row for row, own in zip(rows, groups.tolist(), strict=True) if own == group]
            yield from _picked(file, group, int(starts[group]), wanted, limit)


def _require_unchanged(row: dict[str, Any]) -> None:
    """Refuse a Parquet file that was changed after it was listed, unless its values tell that themselves."""
    listed, mark, _ = row["identity"].partition("#")
    if mark:
        storage.require_unchanged(row["uri"], listed)


def _picked(
    file: pq.ParquetFile, group: int, start: int, wanted: list[dict[str, Any]], limit: int
) -> Iterator[Content]:
    """Values of some rows (ascending) of a row group that begins at `start`, read in small batches."""
    done, values = 0, pa.array([])
    try:
        batches = file.iter_batches(BATCH, row_groups=[group], columns=[wanted[0]["column"]])
        for row in wanted:
            while row["offset"] >= start + len(values):
                start += len(values)
                values = _bytes(next(batches, None))
                _require_unchanged(row)
            value = values[row["offset"] - start].as_py()
            if value is None:
                yield _final(ValueError("the row has no image bytes"), row)
            elif len(value) > limit:
                yield TooLarge(len(value), limit)
            else:
                yield _same(row, value)
            done += 1
    except Exception as error:  # what follows in the row group is lost with it
        yield from [_final(error, row) for row in wanted[done:]]


def _bytes(batch: pa.RecordBatch | None) -> pa.Array:
    """The one column of a batch, out of the struct it may lie in."""
    if batch is None:
        raise EOFError("the file has fewer rows than when it was listed")
    values = batch.column(0)
    return pc.struct_field(values, [0]) if pa.types.is_struct(values.type) else values
