"""A folder tree of image files, at any depth.

Without `labels`, first-level folders are the classes, numbered in the order of their names as text, as
torchvision's `ImageFolder` does: 0, 1, 10, 2. With `labels`, the class of an image is the name of the folder
it lies in; `labels: index` takes that name for the number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.decode import EXTENSIONS
from pipeline.data.formats import _files
from pipeline.data.labels import Classes
from pipeline.data.notes import Notes
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "folder"


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """One row per image file, ordered by relative path, which is the key."""
    root, where = located(dataset.path), f"datasets.{dataset.name}.path"
    found = storage.find(root)
    if found is None or not found.folder:
        raise UserError(f"{where}: no such folder: {root}")
    labelled = classes(dataset) if labels.read(dataset) else None
    if labelled is not None and labelled.index == {} and labels.needed(dataset):
        raise UserError(f"{where}: {root} has no class folders; role {dataset.role!r} needs one per class.")
    if labelled is not None and dataset.labels is None and (order := labels.order_note(labelled.index or {})):
        notes.said.append(order)
    yield from _files.gathered(_columns(dataset, root, labelled, notes))


def classes(dataset: Dataset) -> Classes:
    """The meaning of folder names."""
    if dataset.labels is not None:
        return labels.named(dataset)
    names = [entry.name for entry in _files.visible(located(dataset.path)) if entry.folder]
    return Classes("the class folders", labels.numbered(names))


def _columns(
    dataset: Dataset, root: str, labelled: Classes | None, notes: Notes
) -> Iterator[dict[str, list[Any]]]:
    """The images that lie beside each other, with their label."""
    part = 0 if dataset.labels is None else -1
    for inside, keys, uris, identities in _files.walk(root, EXTENSIONS, notes.files):
        label = -1
        if labelled is not None and inside:
            where = f"datasets.{dataset.name}.labels: {keys[0]}"
            label = labelled.of(inside.removesuffix("/").split("/")[part], where)
        yield {"key": keys, "uri": uris, "label": [label] * len(keys), "identity": identities}
