"""What lies in a folder, no more of it than lists of millions of images need."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from pyarrow import fs

from pipeline.workspace import storage
from pipeline.workspace.patience import patient

Listing = dict[str, str]
"""Names in a folder, in any order, with the `storage.Entry.identity` of files; it is empty for folders."""


@patient
def listing(folder: str) -> Listing:
    """What lies in a folder; links are followed.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such folder, or no access.
    """
    system, place = storage.located(folder)
    if system is None:
        return _local(place)
    return {info.base_name: _remote_identity(info) for info in storage.children(system, place)}


def uris(folder: str, names: Iterable[str]) -> list[str]:
    """What `storage.entries` calls the URIs of names in a folder."""
    system, place = storage.located(folder)
    if system is None:
        base = place if place.endswith("/") else f"{place}/"
        paths = [f"{base}{name}" for name in names]
        return paths if "".join(paths).isascii() else list(map(storage.local_uri, paths))
    base, mark, query = folder.partition("?")
    base = base.rstrip("/")
    return [f"{base}/{quote(os.fsencode(name))}{mark}{query}" for name in names]


def _local(place: str) -> Listing:
    """Entries of a local folder, asked for from inside, so that the way to it is looked up once."""
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(handle) as entries:
            return {
                entry.name: "" if entry.is_dir() else storage.identity(storage.status(entry))
                for entry in entries
            }
    except OSError as error:
        error.filename = str(Path(place, error.filename)) if isinstance(error.filename, str) else place
        raise
    finally:
        os.close(handle)


def _remote_identity(info: fs.FileInfo) -> str:
    return "" if info.type == fs.FileType.Directory else storage.remote_identity(info)
