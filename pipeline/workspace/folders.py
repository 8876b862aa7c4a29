"""Folders as columns: what `storage.entries` gives, without an object for each of a million files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from pipeline.workspace import storage
from pipeline.workspace.patience import patient

PIECE = 2**12
"""Entries of a folder that are Python objects at once."""

COLUMNS = pa.schema(
    [("name", pa.binary()), ("uri", pa.string()), ("folder", pa.bool_()), ("identity", pa.string())]
)
"""Of each entry what `storage.Entry` calls so.

A name is UTF-8; bytes that are no text stay what Python makes of them (`surrogatepass`), so that names have
the order here that they have in Python."""


@patient
def listing(folder: str) -> pa.Table:
    """What lies in a folder as `COLUMNS`, in the order of the names; links are followed.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such folder, or no access.
    """
    system, place = storage.located(folder)
    found = _local(place) if system is None else _remote(folder, storage.children(system, place))
    listed = pa.concat_tables([COLUMNS.empty_table(), *found]).combine_chunks()
    return listed.take(pc.sort_indices(listed["name"]))


def decoded(name: bytes) -> str:
    """A name of a listing as Python has it."""
    return name.decode(errors="surrogatepass")


def _local(place: str) -> Iterator[pa.Table]:
    """Entries of a local folder, asked for from inside, so that the way to it is looked up once."""
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(handle) as entries:
            while some := list(islice(entries, PIECE)):
                names, folders = [entry.name for entry in some], [entry.is_dir() for entry in some]
                found = [storage.status(entry) for entry in some]
                sizes = pa.array([each and each.st_size for each in found], pa.int64())
                times = pa.array([each and each.st_mtime_ns for each in found], pa.int64())
                identities = pc.binary_join_element_wise(
                    sizes.cast(pa.string()), times.cast(pa.string()), "-"
                )
                columns = [_encoded(names), _local_uris(place, names), folders]
                yield pa.table([*columns, identities.fill_null(storage.MISSING)], schema=COLUMNS)
    except OSError as error:
        error.filename = str(Path(place, error.filename)) if isinstance(error.filename, str) else place
        raise
    finally:
        os.close(handle)


def _local_uris(place: str, names: list[str]) -> pa.Array:
    base = place if place.endswith("/") else f"{place}/"
    paths = [f"{base}{name}" for name in names]
    try:
        return pa.array(paths, pa.string())
    except UnicodeEncodeError:
        return pa.array(map(storage.local_uri, paths), pa.string())


def _remote(folder: str, found: Iterator[fs.FileInfo]) -> Iterator[pa.Table]:
    """Entries of a folder of another file system; URIs as of `storage.join`, which takes longer."""
    base, mark, query = folder.partition("?")
    base = base.rstrip("/")
    while some := list(islice(found, PIECE)):
        names = [info.base_name for info in some]
        uris = [f"{base}/{quote(os.fsencode(name))}{mark}{query}" for name in names]
        folders = [info.type == fs.FileType.Directory for info in some]
        identities = [storage.remote_identity(info) for info in some]
        yield pa.table([_encoded(names), uris, folders, identities], schema=COLUMNS)


def _encoded(names: list[str]) -> pa.Array:
    try:
        return pa.array(names, pa.binary())
    except UnicodeEncodeError:
        return pa.array([name.encode(errors="surrogatepass") for name in names], pa.binary())
