"""One image file; its name is the key."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data.formats import _files
from pipeline.data.notes import Notes
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "file"


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """The one row, without a label."""
    found = storage.find(located(dataset.path))
    if found is None or found.folder:
        raise UserError(f"datasets.{dataset.name}.path: no such file: {dataset.path}")
    notes.files.read()
    row = {"key": _files.spelled(found.name), "uri": found.uri, "label": -1, "identity": found.identity}
    yield from _files.batched([row])
