"""A folder tree of image files; where the role has labels, first-level folders are the classes, sorted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.config import LABELLED_ROLES, Dataset, resolve
from pipeline.datasets import ROW_GROUP, SCHEMA
from pipeline.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
"""Files with other endings are not images of the dataset; case does not matter."""


def read(dataset: Dataset) -> Iterator[pa.RecordBatch]:
    """One row per image file, ordered by relative path, which is the key."""
    root, where = resolve(dataset.path), f"datasets.{dataset.name}.path"
    if not root.is_dir():
        raise UserError(f"{where}: no such folder: {root}")
    try:
        classes = _classes(root) if dataset.role in LABELLED_ROLES else {}
        if not classes and dataset.role in LABELLED_ROLES:
            raise UserError(
                f"{where}: {root} has no class folders; role {dataset.role!r} needs one per class."
            )
        rows: list[dict[str, object]] = []
        for path in _files(root):
            rows.append(_row(root, path, classes))
            if len(rows) == ROW_GROUP:
                yield pa.RecordBatch.from_pylist(rows, SCHEMA)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, SCHEMA)
    except OSError as error:  # no permission, or links that go round in circles
        raise UserError(f"{where}: cannot list {error.filename}: {error.strerror}.") from None


def _classes(root: Path) -> dict[str, int]:
    """Class index by folder name."""
    names = [entry.name for entry in _visible(root) if entry.is_dir()]
    return {name: index for index, name in enumerate(names)}


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Image files below a folder, depth first in sorted order; links are followed."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder by name, without hidden ones such as `.ipynb_checkpoints`."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)


def _row(root: Path, entry: os.DirEntry[str], classes: dict[str, int]) -> dict[str, object]:
    key = Path(entry.path).relative_to(root).as_posix()
    try:
        stat = entry.stat()
        identity = f"{stat.st_size}-{stat.st_mtime_ns}"
    except OSError:  # a dangling link is a row that fails when it is read
        identity = "missing"
    return {
        "key": _text(key),
        "uri": _text(str(Path(entry.path).absolute())),
        "bytes": None,
        "shape": None,
        "label": classes.get(key.partition("/")[0], -1),
        "identity": identity,
    }


def _text(path: str) -> str:
    """A file name as text; bytes that are no UTF-8 are spelled out."""
    return path.encode("utf-8", "backslashreplace").decode()
