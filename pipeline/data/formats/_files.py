"""Files as manifest rows: what the formats that refer to files share."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.schema import Dataset
from pipeline.data.manifest import SCHEMA
from pipeline.data.notes import Seen
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import folders, storage
from pipeline.workspace.storage import Entry
from pipeline.workspace.tables import ROW_GROUP

WAITING = 4.0
"""Times that a listing takes as long as it computes, if it waits for answers, as over a network.

Where it does not, threads only take the interpreter from each other: 1.4 million files on a local disk, in
1,000 folders, took 12 CPU seconds with 16 of them, and 9 with none."""

_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")


class Source(NamedTuple):
    """A file of many images."""

    uri: str
    identity: str


def walk(folder: str, endings: tuple[str, ...], seen: Seen) -> Iterator[tuple[str, pa.Table]]:
    """Files below a folder, depth first in sorted order.

    Links are followed; hidden files and folders such as `.ipynb_checkpoints` are left out. Over a network
    folders beside each other are listed ahead; no more than these are in memory, and as columns.

    Args:
        folder: where to begin.
        endings: of the files that are given.
        seen: counts all files, and a hidden folder as one.

    Yields:
        The folder that some files lie in, as a relative path that ends with a slash, or empty; and the files
        in columns: `key` (the relative path as text), `uri` and `identity`.
    """
    return _walk(folders.listing(folder), endings, seen, "")


def _walk(
    listed: pa.Table, endings: tuple[str, ...], seen: Seen, inside: str
) -> Iterator[tuple[str, pa.Table]]:
    """Files among the entries of a folder, which lies `inside` a path that ends with a slash, and below."""
    entered = pc.and_not(listed["folder"], _hidden(listed))
    below = _listings(listed["uri"].filter(entered).to_pylist())
    start = 0
    for place in np.flatnonzero(entered.to_numpy()).tolist():
        yield from _among(listed.slice(start, place - start), endings, seen, inside)
        name = folders.decoded(listed["name"][place].as_py())
        yield from _walk(next(below), endings, seen, f"{inside}{name}/")
        start = place + 1
    yield from _among(listed.slice(start), endings, seen, inside)


def _listings(uris: list[str]) -> Iterator[pa.Table]:
    """Folders beside each other; where the first one waits for answers, the next ones are listed ahead."""
    for first in uris[:1]:
        began, computed = time.perf_counter(), time.thread_time()
        listed = folders.listing(first)
        took, computed = time.perf_counter() - began, time.thread_time() - computed
        yield listed
        if storage.is_remote(first) or took > WAITING * computed:
            yield from storage.ahead(folders.listing, uris[1:], storage.LISTINGS)
        else:
            yield from map(folders.listing, uris[1:])


def _among(
    listed: pa.Table, endings: tuple[str, ...], seen: Seen, inside: str
) -> Iterator[tuple[str, pa.Table]]:
    """The files among entries that are not entered."""
    if not len(listed):
        return
    ending = f"(?i)(?:{'|'.join(map(re.escape, endings))})$"
    named = pc.match_substring_regex(listed["name"], ending)
    read = pc.and_not(named, pc.or_(listed["folder"], _hidden(listed)))
    for name in listed["name"].filter(pc.invert(read)).to_pylist():
        seen.leave_out(spelled(f"{inside}{folders.decoded(name)}"))
    found = listed.filter(read)
    seen.read(len(found))
    if len(found):
        keys = pc.binary_join_element_wise(spelled(inside), _texts(found["name"]), "")
        yield inside, pa.table([keys, found["uri"], found["identity"]], ["key", "uri", "identity"])


def _hidden(listed: pa.Table) -> pa.ChunkedArray:
    return pc.starts_with(listed["name"], ".")


def _texts(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names of a listing as keys have them."""
    try:
        return names.cast(pa.string())
    except pa.ArrowInvalid:  # bytes that are no UTF-8
        return pa.chunked_array([[spelled(folders.decoded(name)) for name in names.to_pylist()]])


def is_hidden(entry: Entry) -> bool:
    """Whether a file or folder is no part of any dataset, by its name."""
    return entry.name.startswith(".")


def visible(folder: str) -> list[Entry]:
    """Entries of a folder by name, without hidden ones."""
    return [entry for entry in storage.entries(folder) if not is_hidden(entry)]


def sources(dataset: Dataset, endings: tuple[str, ...], seen: Seen) -> list[tuple[str, Source]]:
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


def _sources(path: str, endings: tuple[str, ...], seen: Seen, where: str) -> Iterable[tuple[str, Source]]:
    """The files that a path without ranges means."""
    pattern = storage.name_of(path)
    if "*" in pattern:
        listed = visible(storage.parent(path))
        return [_source(entry) for entry in listed if _matches(entry, pattern, endings)]
    entry = storage.find(path)
    if entry is None:
        raise UserError(f"{where}: no such file or folder: {path}")
    if not entry.folder:
        return [_source(entry)]
    found = (zip(*table.to_pydict().values(), strict=True) for _, table in walk(path, endings, seen))
    return [(key, Source(uri, identity)) for key, uri, identity in chain.from_iterable(found)]


def _source(entry: Entry) -> tuple[str, Source]:
    return entry.name, Source(entry.uri, entry.identity)


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
        columns = {name: pa.array([row.get(name) for row in some], SCHEMA.field(name).type) for name in given}
        yield from batches(pa.table(columns))


def batches(table: pa.Table) -> list[pa.RecordBatch]:
    """Rows, given as some columns of `SCHEMA`, in batches of all columns."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in SCHEMA
    ]
    found: list[pa.RecordBatch] = pa.table(columns, schema=SCHEMA).to_batches()
    return found


def spelled(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()
