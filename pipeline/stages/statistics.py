"""Statistics of cached rows: tasks write the sums of pieces of the rows, and merge these in order.

The driver knows the files by name and holds none of the arrays; it only looks at what a later pass builds on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import imports
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import FEATURE, LABEL, LOGITS, PREDICTION, Batch
from pipeline.learned import statistics
from pipeline.learned.statistics import Head, Part, Statistic, Statistics
from pipeline.stages import memory
from pipeline.stages.progress import SILENT, Stage
from pipeline.workspace import tables
from pipeline.workspace.artifacts import (
    ARRAYS,
    Artifact,
    File,
    Kept,
    Store,
    mapped,
    opened,
    saved,
    write_part,
)

SLICE = 8192
"""Rows that are measured at once, fewer where they are wide (`slice_of`).

Fixed, so that sums are added in the same order however the rows lie in parts.
"""


EVERY = 8
"""Slices whose sums are merged where they are measured, and kept: what is interrupted goes on from there.

Fixed, too: the sums of such pieces are merged in their order, whoever made them.
"""

_WIDEST = 2**28
"""Bytes of columns that are measured at once, at most."""

_TIMES = 10
"""What measuring a slice takes over the bytes of its columns: at most 9.1, with all detectors."""

Width = Callable[[Iterable[str]], int]
"""How many values a row of some columns has."""

FORMAT = "statistic 2"
"""Kind and version: the number goes up when sums are merged in another order; each statistic has its own."""


@dataclass(frozen=True)
class Rows:
    """Feature tables one after the other, and the names of the artifacts they are."""

    tables: Sequence[tables.Table]
    names: Sequence[str]

    def width(self, columns: Iterable[str]) -> int:
        """Values of 4 bytes that a row of some columns has."""
        return self.tables[0].row_bytes(columns) // 4

    def contents(self, columns: Iterable[str]) -> dict[str, str]:
        """Content digests of the artifacts that some columns lie in."""
        found: dict[str, str] = {}
        for table, name in zip(self.tables, self.names, strict=True):
            found |= table.contents(name, columns)
        return found


def fit_statistics(
    engine: Engine,
    store: Store,
    rows: Rows,
    wanted: Iterable[Statistic[Any]],
    head: Head,
    stage: Stage = SILENT,
) -> Stored:
    """Statistics of all rows, merged in a fixed order; only those not in the workspace are computed.

    They are read when they are looked at. The stage is told how many slices of rows are summed.

    Raises:
        UserError: if one is not there and this command may not compute it.
    """
    found: dict[Statistic[Any], Kept] = {}
    for group in statistics.in_passes(wanted):
        made = {
            each: store.artifact(
                f"{FORMAT}.{each.version}",
                {
                    "features": list(rows.names),
                    **each.identity,
                    **imports.foreign(type(each)),
                    **_cut(each, head),
                },
                rows.contents(each.columns) | Stored(found).contents(each.after()),
            )
            for each in group
        }

        known = Statistics(Stored(dict(found)))  # of the passes before this one

        def make(
            names: set[str],
            made: Mapping[Statistic[Any], Artifact] = made,
            known: Statistics = known,
        ) -> None:
            lacking = {each: artifact for each, artifact in made.items() if artifact.name in names}
            _sweep(engine, rows, lacking, head, known, stage)

        records = store.shared(list(made.values()), make)
        kept = (Kept(*each) for each in zip(made.values(), records, strict=True))
        found |= zip(made, kept, strict=True)
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
            self.read[wanted] = wanted.part(**self.found[wanted].pages())
        return self.read[wanted]

    def __iter__(self) -> Iterator[Statistic[Any]]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def size_of(known: Statistics, wanted: Iterable[Statistic[Any]]) -> int:
    """Bytes of some statistics; those in the workspace are not read for it."""
    if isinstance(known.found, Stored):
        return sum(known.found.found[each].size for each in wanted)
    return sum(array.nbytes for each in wanted for array in known[each].arrays().values())


def _sweep(
    engine: Engine,
    rows: Rows,
    wanted: Mapping[Statistic[Any], Artifact],
    head: Head,
    known: Statistics,
    stage: Stage,
) -> None:
    """Make some statistics in one pass over the rows: sums of pieces, and of each the sum of these."""
    done = {each: artifact.begin() for each, artifact in wanted.items()}
    measures = {each: engine.share(each.measure(head, known)) for each in wanted}
    width = rows.width
    groups = [(some, _pieces(rows, slice_of(some[0], head))) for some in together(wanted, head, width)]
    names = {each: list(pieces) for some, pieces in groups for each in some}
    todo = [
        (name, piece, lacking)
        for some, pieces in groups
        for name, piece in pieces.items()
        if (lacking := [each for each in some if not {name, ARRAYS} & done[each].keys()])
    ]
    arguments = (
        (piece, [(each, measures[each], wanted[each]) for each in lacking], name)
        for name, piece, lacking in todo
    )

    def held(piece: Sequence[tuple[tables.Table, int, int]], some: Sequence[tuple[Any, ...]], _: str) -> int:
        return _held(piece[0], [each for each, *_ in some], head)

    slices = sum(len(piece) for _, piece, _ in todo)
    whole_pass = sum(len(piece) for _, pieces in groups for piece in pieces.values())
    stage.count("slices summed", slices, whole_pass - slices)
    for (name, piece, lacking), made in zip(todo, engine.in_order(_sums, arguments, held), strict=True):
        for each, file in zip(lacking, made, strict=True):
            done[each][name] = file
        stage.advance(len(piece))
    stage.doing("adds the sums up")
    whole = {each: files[ARRAYS] for each, files in done.items() if ARRAYS in files}
    sums = [
        (each, artifact, {name: done[each][name] for name in names[each]})
        for each, artifact in wanted.items()
        if each not in whole
    ]

    def merged(statistic: Statistic[Any], _: Artifact, pieces: Mapping[str, File]) -> int:
        return _merged(statistic, pieces, _sum_bytes(statistic, head, width))

    made_whole = engine.in_order(_whole, sums, merged)
    whole |= {each: file for (each, *_), file in zip(sums, made_whole, strict=True)}
    for each, artifact in wanted.items():
        artifact.finish({ARRAYS: whole[each]})


def slice_of(statistic: Statistic[Any], head: Head) -> int:
    """Rows that it measures at once; of its columns these two alone can be too wide for `SLICE`."""
    widths = {FEATURE: head.weight.shape[1], LOGITS: len(head.bias)}
    width = sum(width for column, width in widths.items() if column in statistic.columns)
    return memory.narrowed(SLICE, 4 * width, _WIDEST)


def _cut(statistic: Statistic[Any], head: Head) -> dict[str, int]:
    """What its bits depend on if it measures fewer rows at once than others."""
    rows = slice_of(statistic, head)
    return {} if rows == SLICE else {"slice": rows}


def _pieces(rows: Rows, size: int) -> dict[str, list[tuple[tables.Table, int, int]]]:
    """Slices of the rows that are summed in one task, by name of the file of their sum."""
    slices = [(table, start, stop) for table in rows.tables for start, stop in table.slices(size)]
    if len(slices) <= EVERY:
        return {ARRAYS: slices}
    pieces = [slices[first : first + EVERY] for first in range(0, len(slices), EVERY)]
    return {f"piece-{number:05d}.safetensors": piece for number, piece in enumerate(pieces)}


def _sum_bytes(statistic: Statistic[Any], head: Head, width: Width) -> int:
    """Bytes of the sums of a statistic, at most."""
    return 8 * statistic.numbers(width(statistic.columns), len(head.bias))


def together(wanted: Iterable[Statistic[Any]], head: Head, width: Width) -> list[list[Statistic[Any]]]:
    """Statistics that read the same wide columns, as many as may sum at once: a task does no others."""
    found: dict[frozenset[str], list[Statistic[Any]]] = {}
    for each in wanted:
        found.setdefault(frozenset(each.columns) - {LABEL, PREDICTION}, []).append(each)
    groups = []
    for some in found.values():
        most = max(_sum_bytes(each, head, width) for each in some)
        count = max(memory.MOST // 4 // max(most, 1), 1)
        groups += [some[first : first + count] for first in range(0, len(some), count)]
    return groups


def _held(cut: tuple[tables.Table, int, int], wanted: Sequence[Statistic[Any]], head: Head) -> int:
    """Bytes that a task may hold."""
    table, start, stop = cut
    columns = {column for statistic in wanted for column in statistic.columns}
    sums = [_sum_bytes(each, head, lambda some: table.row_bytes(some) // 4) for each in wanted]
    merging = max((_piece(each).merging - 1) * own for each, own in zip(wanted, sums, strict=True))
    return memory.of_rows(table, columns, stop - start, _TIMES) + sum(sums) + merging


def _merged(statistic: Statistic[Any], pieces: Mapping[str, File], most: int) -> int:
    """Bytes that a task may hold: the sum so far, the next piece, and their sum if that is another."""
    sizes = [piece.size for piece in pieces.values()]
    return memory.PROCESS + _piece(statistic).merging * max(*sizes, min(sum(sizes), most))


def _piece(statistic: Statistic[Any]) -> type[Part]:
    """What it gives of some rows."""
    return statistic.piece or statistic.part


def _sums(
    slices: Sequence[tuple[tables.Table, int, int]],
    wanted: Sequence[tuple[Statistic[Any], Shared[Callable[[Batch], Part]], Artifact]],
    name: str,
) -> list[File]:
    """Write sums of a piece of the rows, merged slice by slice in order."""
    columns = sorted({column for statistic, _, _ in wanted for column in statistic.columns})
    sums: dict[Statistic[Any], Part] = {}

    def add(table: tables.Table, start: int, stop: int) -> None:  # what it reads and measures ends with it
        batch = table.read(start, stop, columns)
        pa.default_memory_pool().release_unused()  # it keeps some times the bytes of wide rows
        for statistic, measure, _ in wanted:
            part = measure.get()(batch)
            sums[statistic] = sums[statistic].merge(part) if statistic in sums else part

    for cut in slices:
        add(*cut)
    written = []
    for statistic, _, artifact in wanted:
        total = sums.pop(statistic)
        if name == ARRAYS:
            total = total.whole()
        written.append(write_part(artifact.folder / name, saved(total.arrays())))
    return written


def _whole(statistic: Statistic[Any], artifact: Artifact, pieces: Mapping[str, File]) -> File:
    """Write the sum of the pieces of a statistic, merged in order."""
    total: Part | None = None
    for name, piece in pieces.items():
        with opened(artifact.folder / name, piece.sha256) as file:
            part = _piece(statistic)(**mapped(file))
        total = part.roomy() if total is None else total.merge(part)
    assert total is not None
    total = total.whole()
    return write_part(artifact.folder / ARRAYS, saved(total.arrays()))
