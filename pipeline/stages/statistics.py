"""Statistics of cached rows: slices go out as tasks, and what comes back is merged in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipeline import imports
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import Batch
from pipeline.learned import statistics
from pipeline.learned.statistics import Head, Part, Statistic, Statistics
from pipeline.workspace import tables
from pipeline.workspace.artifacts import Cache

SLICE = 8192
"""Rows per task. Fixed, so that sums are added in the same order however the rows lie in parts."""


@dataclass(frozen=True)
class Rows:
    """Feature tables one after the other, and what they hold."""

    tables: Sequence[tables.Table]
    identities: Sequence[Mapping[str, Any]]


def fit_statistics(
    engine: Engine, cache: Cache, rows: Rows, wanted: Iterable[Statistic[Any]], head: Head
) -> Statistics:
    """Statistics of all rows, merged slice by slice in order; only those not in the cache are computed.

    Raises:
        UserError: if one is not there and the cache is frozen.
    """

    def sweep(group: Sequence[Statistic[Any]], known: Statistics) -> list[Part]:
        identities = [
            {"features": rows.identities, **each.identity, **imports.foreign(type(each))} for each in group
        ]
        found = cache.get_all(
            "statistics",
            identities,
            lambda missing: _sweep(engine, rows, [group[n] for n in missing], head, known),
        )
        return [each.part(**arrays) for each, arrays in zip(group, found, strict=True)]

    return statistics.compute(wanted, sweep)


def _sweep(
    engine: Engine, rows: Rows, group: Sequence[Statistic[Any]], head: Head, known: Statistics
) -> list[dict[str, NDArray[Any]]]:
    """Arrays of some statistics, from one pass over the columns they read."""
    columns = sorted({name for each in group for name in each.columns})
    measures = engine.share([each.measure(head, known) for each in group])
    slices = [
        (table, start, stop, columns, measures)
        for table in rows.tables
        for start, stop in table.slices(SLICE)
    ]
    found = engine.in_order(_slice_statistics, slices)
    total = next(found)
    for parts in found:
        total = [one.merge(other) for one, other in zip(total, parts, strict=True)]
    return [each.arrays() for each in total]


def _slice_statistics(
    table: tables.Table,
    start: int,
    stop: int,
    columns: list[str],
    measures: Shared[list[Callable[[Batch], Part]]],
) -> list[Part]:
    batch = table.read(start, stop, columns)
    return [measure(batch) for measure in measures.get()]
