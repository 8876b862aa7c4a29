"""Bytes that work on rows may hold, so that a node gets no more of it at once than it has memory for."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.workspace.tables import ROW_GROUP, Table

PROCESS = 256 * 2**20
"""Of a worker before it has rows: the interpreter and libraries."""

MOST = 2**31
"""Bytes that a task may hold: a detector with a larger array is refused."""

_ROWS = 8 * ROW_GROUP
"""Rows that are read at once, unless they are wide."""

_BYTES = 2**27
"""Bytes of columns that are read at once, if a row group is no more: a row of 21,843 logits takes 87 kB."""


def narrowed(rows: int, row_bytes: int, most: int = _BYTES) -> int:
    """So many rows, halved until they take no more than `most` bytes or are a row group."""
    while rows % 2 == 0 and rows > ROW_GROUP and rows * row_bytes > most:
        rows //= 2
    return rows


def cuts(table: Table, columns: Iterable[str], start: int, stop: int) -> list[tuple[int, int]]:
    """Rows of a task in ranges that it reads one after the other; all but the last are whole batches."""
    rows = narrowed(_ROWS, table.row_bytes(columns))
    return [(first, min(first + rows, stop)) for first in range(start, stop, rows)]


def of_rows(table: Table, columns: Iterable[str], rows: int, times: float) -> int:
    """Bytes of a process that reads some rows and holds their columns `times` over, results included."""
    return PROCESS + int(times * rows * table.row_bytes(columns))
