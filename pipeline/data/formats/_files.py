"""Files as manifest rows: what the formats that refer to files share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data.manifest import SCHEMA
from pipeline.data.notes import Seen
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage
from pipeline.workspace.storage import Entry
from pipeline.workspace.tables import ROW_GROUP

AHEAD = 16
"""Folders beside each other that are listed at once."""

_FIELDS = [(field.name, field.type) for field in SCHEMA]
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")


def walk(folder: str, endings: tuple[str, ...], seen: Seen) -> Iterator[tuple[str, Entry]]:
    """Files below a folder with their relative paths, depth first in sorted order.

    Links are followed; hidden files and folders such as `.ipynb_checkpoints` are left out. Folders beside
    each other are listed ahead, as over a network each takes an answer of a server; no more than these are
    in memory.

    Args:
        folder: where to begin.
        endings: of the files that are given.
        seen: counts all files, and a hidden folder as one.
    """
    return _walk(storage.entries(folder), endings, seen, "")


def _walk(
    listed: list[Entry], endings: tuple[str, ...], seen: Seen, inside: str
) -> Iterator[tuple[str, Entry]]:
    """Files among the entries of a folder, which lies `inside` a path that ends with a slash, and below."""
    folders = [entry.uri for entry in listed if entry.folder and not is_hidden(entry)]
    below = (
        storage.ahead(storage.entries, folders, AHEAD) if len(folders) > 1 else map(storage.entries, folders)
    )
    for entry in listed:
        name = f"{inside}{entry.name}"
        if entry.folder and not is_hidden(entry):
            yield from _walk(next(below), endings, seen, f"{name}/")
        elif is_hidden(entry) or not entry.name.lower().endswith(endings):
            seen.leave_out(spelled(name))
        else:
            seen.read()
            yield name, entry


def is_hidden(entry: Entry) -> bool:
    """Whether a file or folder is no part of any dataset, by its name."""
    return entry.name.startswith(".")


def visible(folder: str) -> list[Entry]:
    """Entries of a folder by name, without hidden ones."""
    return [entry for entry in storage.entries(folder) if not is_hidden(entry)]


def sources(dataset: Dataset, endings: tuple[str, ...], seen: Seen) -> list[tuple[str, Entry]]:
    """The files that `path` means, with their relative paths: one, all below a folder, or those `*` matches.

    A range of numbers in it, as `{000..012}`, means all of them, each of which must be there. `seen` counts
    what lies in a folder.

    Raises:
        UserError: if there are none.
    """
    path, where = located(dataset.path), f"datasets.{dataset.name}.path"
    found = [each for single in _expanded(path) for each in _sources(single, endings, seen, where)]
    if not found:
        raise UserError(f"{where}: no {endings[0]} files in {path}. Check the path.")
    return found


def _sources(path: str, endings: tuple[str, ...], seen: Seen, where: str) -> Iterable[tuple[str, Entry]]:
    """The files that a path without ranges means."""
    pattern = storage.name_of(path)
    if "*" in pattern:
        listed = visible(storage.parent(path))
        return [(entry.name, entry) for entry in listed if _matches(entry, pattern, endings)]
    entry = storage.find(path)
    if entry is None:
        raise UserError(f"{where}: no such file or folder: {path}")
    return walk(path, endings, seen) if entry.folder else [(entry.name, entry)]


def _expanded(path: str) -> Iterator[str]:
    """The paths that one with ranges means: of `a-{08..11}`, `a-08`, `a-09`, `a-10` and `a-11`."""
    found = _RANGE.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{path[: found.start()]}{number:0{len(first)}}{path[found.end() :]}")


def _matches(entry: Entry, pattern: str, endings: tuple[str, ...]) -> bool:
    name = entry.name
    return not entry.folder and name.lower().endswith(endings) and fnmatchcase(name, pattern)


def open_file(path: str, where: str) -> BinaryIO:
    """A file to read.

    Raises:
        UserError: if there is none.
    """
    try:
        return storage.open_input(located(path))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{where}: no such file: {path}") from None


def batched(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Rows, given as what they have of `SCHEMA`, in batches."""
    source = iter(rows)
    while some := list(islice(source, ROW_GROUP)):
        given = set[str]().union(*some)
        yield pa.RecordBatch.from_arrays(
            [
                pa.array([row.get(name) for row in some], kind)
                if name in given
                else pa.nulls(len(some), kind)
                for name, kind in _FIELDS
            ],
            schema=SCHEMA,
        )


def spelled(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()
