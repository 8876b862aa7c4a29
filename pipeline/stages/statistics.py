"""Statistics of cached rows: slices go out as tasks, and what comes back is merged in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors.numpy import load_file

from pipeline import imports
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import Batch
from pipeline.learned import statistics
from pipeline.learned.statistics import Head, Part, Statistic, Statistics
from pipeline.workspace import tables
from pipeline.workspace.artifacts import (
    Arrays,
    Artifact,
    Damaged,
    Kept,
    Store,
    opened,
    saved,
    write_part,
)

SLICE = 8192
"""Rows per task. Fixed, so that sums are added in the same order however the rows lie in parts."""


EVERY = 16
"""Slices after which the sums so far are noted: what is interrupted goes on from there."""

_SO_FAR = "so-far.safetensors"


@dataclass(frozen=True)
class Rows:
    """Feature tables one after the other, and the names of the artifacts they are."""

    tables: Sequence[tables.Table]
    names: Sequence[str]

    def contents(self, columns: Iterable[str]) -> dict[str, str]:
        """Content digests of the artifacts that some columns lie in."""
        found: dict[str, str] = {}
        for table, name in zip(self.tables, self.names, strict=True):
            found |= table.contents(name, columns)
        return found


def fit_statistics(
    engine: Engine, store: Store, rows: Rows, wanted: Iterable[Statistic[Any]], head: Head
) -> Stored:
    """Statistics of all rows, merged slice by slice in order; only those not in the workspace are computed.

    They are read when they are looked at.

    Raises:
        UserError: if one is not there and this command may not compute it.
    """
    found: dict[Statistic[Any], Kept] = {}
    for group in statistics.in_passes(wanted):
        made = [
            store.artifact(
                f"statistic {each.version}",
                {"features": list(rows.names), **each.identity, **imports.foreign(type(each))},
                rows.contents(each.columns) | Stored(found).contents(each.after()),
            )
            for each in group
        ]

        known = Statistics(Stored(dict(found)))  # of the passes before this one

        def compute(
            lacking: list[int],
            group: Sequence[Statistic[Any]] = group,
            made: Sequence[Artifact] = made,
            known: Statistics = known,
        ) -> list[Arrays]:
            some = [Sum(group[number], made[number]) for number in lacking]
            return _sweep(engine, rows, some, head, known)

        found |= zip(group, store.kept(made, compute), strict=True)
    return Stored(found)


@dataclass
class Stored(Mapping[Statistic[Any], Part]):
    """Statistics in the workspace, each read when it is first looked at.

    Looking raises `Damaged` where other bytes lie than were written.
    """

    found: Mapping[Statistic[Any], Kept]
    read: dict[Statistic[Any], Part] = field(default_factory=dict)

    def contents(self, wanted: Iterable[Statistic[Any]]) -> dict[str, str]:
        """Content digests of some of them, by name of their artifacts."""
        return {name: content for each in wanted for name, content in self.found[each].content.items()}

    def __getitem__(self, wanted: Statistic[Any]) -> Part:
        if wanted not in self.read:
            self.read[wanted] = wanted.part(**self.found[wanted].arrays())
        return self.read[wanted]

    def __iter__(self) -> Iterator[Statistic[Any]]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


@dataclass
class Sum:
    """A statistic in the making."""

    statistic: Statistic[Any]
    artifact: Artifact
    slices: int = 0
    """How many, from the first on, are in `part`."""
    part: Part | None = None

    def __post_init__(self) -> None:
        """Go on with what an interrupted run has noted."""
        noted = self.artifact.begin().get(_SO_FAR)
        if noted is not None:
            try:
                with opened(self.artifact.folder / _SO_FAR, noted.sha256) as file:
                    self.part = self.statistic.part(**load_file(file))
                self.slices = int(noted.facts["slices"])
            except Damaged:
                return

    def add(self, number: int, part: Part) -> None:
        """Add the part of a slice, if it is not in the sum."""
        if number == self.slices:
            self.part = part if self.part is None else self.part.merge(part)
            self.slices += 1
            if self.slices % EVERY == 0:
                arrays = saved(self.part.arrays())
                write_part(self.artifact.folder / _SO_FAR, arrays, slices=self.slices)

    def total(self) -> Arrays:
        """The arrays of the whole."""
        assert self.part is not None
        return self.part.arrays()


def _sweep(engine: Engine, rows: Rows, sums: Sequence[Sum], head: Head, known: Statistics) -> list[Arrays]:
    """Arrays of some statistics, from one pass over the columns they read."""
    columns = sorted({name for each in sums for name in each.statistic.columns})
    measures = engine.share([each.statistic.measure(head, known) for each in sums])
    slices = [
        (table, start, stop, columns, measures)
        for table in rows.tables
        for start, stop in table.slices(SLICE)
    ]
    first = min(each.slices for each in sums)
    for number, parts in enumerate(engine.in_order(_slice_statistics, slices[first:]), first):
        for each, part in zip(sums, parts, strict=True):
            each.add(number, part)
    return [each.total() for each in sums]


def _slice_statistics(
    table: tables.Table,
    start: int,
    stop: int,
    columns: list[str],
    measures: Shared[list[Callable[[Batch], Part]]],
) -> list[Part]:
    batch = table.read(start, stop, columns)
    return [measure(batch) for measure in measures.get()]
