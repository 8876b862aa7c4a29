"""A list of image files: lines `relative/path label`, or a .csv file with the columns `path` and `label`.

The label of a line is its last word, so a path may hold spaces. Several accepted labels are written
`281;282`, no label `-1` (in a .csv file also as nothing).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from functools import lru_cache

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.formats import _files
from pipeline.data.labels import Classes
from pipeline.data.notes import Notes
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "file"

FOLDERS = 2000
"""Listings of remote folders that are kept while a list is read."""


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """One row per line; the path as it is listed is the key."""
    where = f"datasets.{dataset.name}.path"
    with (
        _files.open_file(dataset.path, where) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        yield from _files.batched(_rows(dataset, text, f"{where}: {dataset.path}"))


def classes(dataset: Dataset) -> Classes:
    """The meaning of the labels; without `labels` they are class indices."""
    return labels.named(dataset)


def _rows(dataset: Dataset, text: io.TextIOWrapper, where: str) -> Iterator[dict[str, object]]:
    root = located(dataset.root or storage.parent(located(dataset.path)))
    labelled = classes(dataset) if dataset.labels is None or labels.needed(dataset) else None
    lines = _table if dataset.path.lower().endswith(".csv") else _lines
    identity = _identities()
    for number, path, label in lines(text, where):
        uri = storage.join(root, path)
        columns: dict[str, object] = {"label": -1}
        if labelled is not None and label:
            columns = labelled.several(label, f"{where}, line {number}")
        yield {"key": _files.spelled(path), "uri": uri, "identity": identity(uri), **columns}


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


def _identities() -> Callable[[str], str]:
    """Gives the identity of a file; asks a remote storage for whole folders, never for single files."""

    @lru_cache(FOLDERS)
    def listing(folder: str) -> dict[str, str]:
        try:
            return {entry.uri: entry.identity for entry in storage.entries(folder)}
        except FileNotFoundError:
            return {}

    def identity(uri: str) -> str:
        if storage.is_remote(uri):
            return listing(storage.parent(uri)).get(uri, storage.MISSING)
        return storage.local_identity(uri)

    return identity
