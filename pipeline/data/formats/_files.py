"""Files as manifest rows: what the formats that refer to files share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.config.loading import resolve
from pipeline.config.schema import Dataset
from pipeline.data.manifest import SCHEMA
from pipeline.errors import UserError
from pipeline.workspace import storage
from pipeline.workspace.storage import Entry
from pipeline.workspace.tables import ROW_GROUP

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
"""Files with other endings are not images of a dataset; case does not matter."""


def located(path: str) -> str:
    """A configured path as one of `storage`: a URI, or an absolute local path."""
    if "://" in path and not path.startswith("package://"):
        return path
    return str(resolve(path).absolute())


def walk(folder: str, endings: tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
    """Files below a folder with their relative paths, depth first in sorted order, one folder in memory.

    Links are followed; hidden files and folders such as `.ipynb_checkpoints` are left out.
    """
    for entry in visible(folder):
        if entry.folder:
            for name, found in walk(entry.uri, endings):
                yield f"{entry.name}/{name}", found
        elif entry.name.lower().endswith(endings):
            yield entry.name, entry


def visible(folder: str) -> list[Entry]:
    """Entries of a folder by name, without hidden ones."""
    return [entry for entry in storage.entries(folder) if not entry.name.startswith(".")]


def sources(dataset: Dataset, endings: tuple[str, ...]) -> list[tuple[str, Entry]]:
    """The files that `path` means, with their relative paths: one, all below a folder, or those `*` matches.

    Raises:
        UserError: if there are none.
    """
    path, where = located(dataset.path), f"datasets.{dataset.name}.path"
    pattern = storage.name_of(path)
    if "*" in pattern:
        listed = visible(storage.parent(path))
        found = [(entry.name, entry) for entry in listed if _matches(entry, pattern, endings)]
    else:
        entry = storage.find(path)
        if entry is None:
            raise UserError(f"{where}: no such file or folder: {path}")
        found = list(walk(path, endings)) if entry.folder else [(entry.name, entry)]
    if not found:
        raise UserError(f"{where}: no {endings[0]} files in {path}. Check the path.")
    return found


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
        yield pa.RecordBatch.from_pylist(some, SCHEMA)


def spelled(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()
