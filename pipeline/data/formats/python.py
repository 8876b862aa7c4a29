"""Images from a function of the user's: `path: package.module:function` returns (images, labels or None)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data.formats import _arrays
from pipeline.data.notes import Notes
from pipeline.errors import UserError
from pipeline.imports import load_function


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """Rows of the arrays that the function returns."""
    where = f"datasets.{dataset.name}"
    function = load_function(dataset.path, f"{where}.path")
    try:
        images, labels = function()
        images = np.asarray(images)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}.path: {dataset.path}() must return (images, labels or None): {error}"
        ) from error
    _arrays.check_shape(where, images.shape, images.dtype)
    checked = None if labels is None else _arrays.check_labels(where, np.asarray(labels), len(images))
    size = _arrays.CHUNK
    chunks = (images[start : start + size] for start in range(0, len(images), size))
    yield from _arrays.rows(dataset.path.rpartition(":")[2], chunks, checked)
