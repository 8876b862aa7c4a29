"""A list of image files: lines `relative/path label`, or a .csv file with the columns `path` and `label`.

The label of a line is its last word, so a path may hold spaces. Several accepted labels are written
`281;282`, no label `-1` (in a .csv file also as nothing).
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.formats import _files
from pipeline.data.labels import Classes
from pipeline.data.notes import Notes
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage
from pipeline.workspace.tables import ROW_GROUP

PLACE = "file"

FOLDERS = 2000
"""Listings of remote folders that are kept while a list is read, and that it may wait for."""

AHEAD = 16
"""Times `ROW_GROUP` lines, at most, whose remote folders are listed before they are needed."""

LOOKED_AT = 32
"""Lines whose files on a disk are looked at one after the other: enough to show whether it waits for answers,
and few, as it then works on many times as many at once."""

Columns = dict[str, list[Any]]
Labels = tuple[int, list[int] | None]
"""Label and accepted labels of a row."""
Identities = dict[str, str]


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """One row per line; the path as it is listed is the key."""
    where = f"datasets.{dataset.name}.path"
    with (
        _files.open_file(dataset.path, where) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        root = located(dataset.root or storage.parent(located(dataset.path)))
        remote = storage.is_remote(root)
        lines = ROW_GROUP if remote else LOOKED_AT
        pieces = _pieces(dataset, root, text, f"{where}: {dataset.path}", lines)
        yield from _files.gathered(_listed(pieces) if remote else _files.looked_up(_looked_at, pieces))


def classes(dataset: Dataset) -> Classes:
    """The meaning of the labels; without `labels` they are class indices."""
    return labels.named(dataset)


def _pieces(dataset: Dataset, root: str, text: io.TextIOWrapper, where: str, lines: int) -> Iterator[Columns]:
    """Columns of so many lines after the other, without the identity of the files."""
    rows = _rows(dataset, text, where)
    while some := list(islice(rows, lines)):
        paths = [path for path, _ in some]
        keys = paths if "".join(paths).isascii() else list(map(_files.spelled, paths))
        uris = [storage.join(root, path) for path in paths]
        label, accepted = map(list, zip(*(meant for _, meant in some), strict=True))
        yield {"key": keys, "uri": uris, "label": label, "accepted": accepted}


def _rows(dataset: Dataset, text: io.TextIOWrapper, where: str) -> Iterator[tuple[str, Labels]]:
    """Path and label of each line; the meaning of a label is looked up once."""
    labelled = classes(dataset) if dataset.labels is None or labels.needed(dataset) else None
    lines = _table if dataset.path.lower().endswith(".csv") else _lines
    known: dict[str, Labels] = {"": (-1, None)}
    for number, path, label in lines(text, where):
        if labelled is not None and label not in known:
            meant = labelled.several(label, f"{where}, line {number}")
            known[label] = meant["label"], meant["accepted"]
        yield path, known["" if labelled is None else label]


def _lines(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, str, str]]:
    """Number, path and label of each line."""
    for number, line in enumerate(text, 1):
        parts = line.strip().rsplit(maxsplit=1)
        if len(parts) == 1:
            raise UserError(
                f"{where}, line {number}: got {_files.spelled(parts[0])!r}; expected `path label`."
            )
        if parts:
            yield number, parts[0], parts[1]


def _table(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, str, str]]:
    """Number, path and label of each row of a .csv file; the label may be empty."""
    rows = csv.DictReader(text)
    names = rows.fieldnames or []
    missing = [name for name in ("path", "label") if name not in names]
    if missing:
        found = ", ".join(names) or "none"
        raise UserError(f"{where}: no column {missing[0]!r}; the columns are: {found}. Expected path,label.")
    try:
        for row in rows:
            if not row["path"] or row["label"] is None or None in row:
                raise UserError(
                    f"{where}, line {rows.line_num}: expected {len(names)} values: {','.join(names)}."
                )
            yield rows.line_num, row["path"], row["label"]
    except csv.Error as error:
        raise UserError(f"{where}, line {rows.line_num}: {error}.") from None


def _looked_at(piece: Columns) -> Columns:
    """Some lines with the identity of each file."""
    return piece | {"identity": storage.local_identities(piece["uri"])}


def _listed(pieces: Iterator[Columns]) -> Iterator[Columns]:
    """Lines with the identity of the files; asks for whole folders, many at once, never for single files."""
    pool = ThreadPoolExecutor(storage.LISTINGS)
    waiting = deque[tuple[Columns, list[Future[Identities]], set[Future[Identities]]]]()

    @lru_cache(FOLDERS)
    def listing(folder: str) -> Future[Identities]:
        return pool.submit(_listing, folder)

    def identified() -> Columns:
        piece, there, _ = waiting.popleft()
        found = [
            each.result().get(uri, storage.MISSING) for each, uri in zip(there, piece["uri"], strict=True)
        ]
        return piece | {"identity": found}

    try:
        for piece in pieces:
            there = [listing(storage.parent(uri)) for uri in piece["uri"]]
            waiting.append((piece, there, set(there)))
            while len(waiting) > AHEAD or len(set().union(*(each for *_, each in waiting))) > FOLDERS:
                yield identified()
        while waiting:
            yield identified()
    finally:
        pool.shutdown(cancel_futures=True)


def _listing(folder: str) -> Identities:
    """Identity of each file of a remote folder, by URI; none where there is no folder."""
    try:
        return {entry.uri: entry.identity for entry in storage.entries(folder)}
    except FileNotFoundError:
        return {}
