"""Which format a path has, where that is plain."""

from __future__ import annotations

import re

from pipeline.data import formats
from pipeline.data.decode import EXTENSIONS
from pipeline.data.formats import _files
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage

_ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    "parquet": (".parquet",),
    "npz": (".npz",),
    "imagelist": (".csv", ".txt", ".lst"),
    "image": EXTENSIONS,
}
_IDX = re.compile(r"idx3|-ubyte(\.gz)?$")


def guessed(path: str, field: str) -> str:
    """The format of images: of a file by its name, of a folder by the names in it.

    Args:
        path: file or folder, local or a URI; `*` and ranges in its last part are of that part's ending.
        field: what the format is called where it can be given.

    Raises:
        UserError: there is nothing, or it cannot be told.
    """
    place = located(path)
    if not set(path) & set("*{"):
        found = storage.find(place)
        if found is None:
            raise UserError(f"{path}: no such file or folder. Name the images.")
        if found.folder:
            return _of_folder(place)
    name = storage.name_of(place)
    known = next((kind for kind, endings in _ENDINGS.items() if name.lower().endswith(endings)), None)
    if known is None and not _IDX.search(name):
        raise UserError(f"{path}: its format cannot be told from its name. Give {field}: {_told()}.")
    return known or "idx"


def _of_folder(place: str) -> str:
    """Tars or Parquet files, if nothing else lies in it that could be images."""
    entries = _files.visible(place)
    images = any(entry.folder or entry.name.lower().endswith(EXTENSIONS) for entry in entries)
    for kind in ("webdataset", "parquet"):
        if not images and any(entry.name.lower().endswith(_ENDINGS[kind]) for entry in entries):
            return kind
    return "imagefolder"


def _told() -> str:
    return ", ".join(name for name in formats.names() if name != "python")
