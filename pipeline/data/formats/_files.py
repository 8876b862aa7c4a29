"""Files as manifest rows: what the formats that refer to files share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data.manifest import SCHEMA
from pipeline.data.notes import Seen
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import folders, storage
from pipeline.workspace.folders import Listing
from pipeline.workspace.storage import Entry
from pipeline.workspace.tables import ROW_GROUP

WAITING = 4.0
"""Times that a listing takes as long as it computes, if it waits for answers, as over a network.

Where it does not, threads only take the interpreter from each other: 1.4 million files on a local disk, in
1,000 folders, took 12 CPU seconds with 16 of them, and 9 with none."""

Item = TypeVar("Item")
Found = TypeVar("Found")

_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")


class Source(NamedTuple):
    """A file of many images."""

    uri: str
    identity: str


class Files(NamedTuple):
    """Some files beside each other."""

    inside: str
    """The folder they lie in, as a relative path that ends with a slash, or empty."""
    keys: list[str]
    """Their relative paths as text."""
    uris: list[str]
    identities: list[str]


def walk(folder: str, endings: tuple[str, ...], seen: Seen) -> Iterator[Files]:
    """Files below a folder, depth first in sorted order.

    Links are followed; hidden files and folders such as `.ipynb_checkpoints` are left out. Over a network
    folders beside each other are listed ahead; no more than these are in memory, as names and identities.

    Args:
        folder: where to begin.
        endings: of the files that are given.
        seen: counts all files, and a hidden folder as one.
    """
    return _walk(folder, folders.listing(folder), endings, seen, "")


def _walk(folder: str, listed: Listing, endings: tuple[str, ...], seen: Seen, inside: str) -> Iterator[Files]:
    """Files among what lies in a folder, which lies `inside` a path that ends with a slash, and below."""
    names = sorted(listed)
    entered = folders.uris(folder, [name for name in names if not listed[name] and not is_hidden(name)])
    below = zip(entered, _listings(entered), strict=True)
    read: list[str] = []
    for name in names:
        hidden = is_hidden(name)
        if not listed[name] and not hidden:
            yield from _pieces(folder, listed, read, seen, inside)
            read = []
            yield from _walk(*next(below), endings, seen, f"{inside}{name}/")
        elif hidden or not name.lower().endswith(endings):
            seen.leave_out(spelled(f"{inside}{name}"))
        else:
            read.append(name)
    yield from _pieces(folder, listed, read, seen, inside)


def _pieces(folder: str, listed: Listing, names: list[str], seen: Seen, inside: str) -> Iterator[Files]:
    """The named files of a folder, no more at once than are written at once."""
    seen.read(len(names))
    for start in range(0, len(names), ROW_GROUP):
        some = names[start : start + ROW_GROUP]
        keys = [f"{inside}{name}" for name in some]
        if not "".join(keys).isascii():
            keys = list(map(spelled, keys))
        yield Files(inside, keys, folders.uris(folder, some), [listed[name] for name in some])


def _listings(uris: list[str]) -> Iterator[Listing]:
    """Folders beside each other."""
    return looked_up(folders.listing, uris, len(uris) > 1 and storage.is_remote(uris[0]))


def looked_up(call: Callable[[Item], Found], items: Iterable[Item], waits: bool = False) -> Iterator[Found]:
    """What a call finds in storage, in order; where one waits for answers, the next ones are under way.

    Args:
        call: for each of the items.
        items: taken as they are needed.
        waits: whether it is known to wait; if not, the first one shows: a local path may be over a network.
    """
    rest = iter(items)
    if not waits:
        for item in islice(rest, 1):
            began, computed = time.perf_counter(), time.thread_time()
            found = call(item)
            took, computed = time.perf_counter() - began, time.thread_time() - computed
            waits = took > WAITING * computed
            yield found
    yield from storage.ahead(call, rest, storage.LISTINGS) if waits else map(call, rest)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of any dataset."""
    return name.startswith(".")


def visible(folder: str) -> list[Entry]:
    """Entries of a folder by name, without hidden ones."""
    return [entry for entry in storage.entries(folder) if not is_hidden(entry.name)]


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
    return [
        (key, Source(*source))
        for files in walk(path, endings, seen)
        for key, *source in zip(files.keys, files.uris, files.identities, strict=True)
    ]


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
        yield _batch({name: [row.get(name) for row in some] for name in given})


def gathered(pieces: Iterable[dict[str, list[Any]]]) -> Iterator[pa.RecordBatch]:
    """Rows, given as pieces of the same columns of `SCHEMA`, in batches.

    However many pieces there are: what becomes Arrow costs as much for one row as for a thousand.
    """
    held: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in piece.items():
            held.setdefault(name, []).extend(values)
        if len(next(iter(held.values()))) >= ROW_GROUP:
            yield _batch(held)
            held = {}
    if held:
        yield _batch(held)


def _batch(given: dict[str, list[Any]]) -> pa.RecordBatch:
    rows = len(next(iter(given.values())))
    columns = [
        pa.array(given[field.name], field.type) if field.name in given else pa.nulls(rows, field.type)
        for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def spelled(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()
