"""Bytes that work on rows may hold, so that a node gets no more of it at once than it has memory for."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.workspace.tables import Table

PROCESS = 256 * 2**20
"""Of a worker before it has rows: the interpreter and libraries."""


def of_rows(table: Table, columns: Iterable[str], rows: int, times: float) -> int:
    """Bytes of a process that reads some rows and holds their columns `times` over, results included."""
    return PROCESS + int(times * rows * table.row_bytes(columns))
