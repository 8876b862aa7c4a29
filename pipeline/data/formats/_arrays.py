"""Image arrays as manifest rows: what the formats `npz`, `idx` and `python` share."""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.decode import MAX_PIXELS
from pipeline.data.manifest import SCHEMA
from pipeline.errors import UserError

CHUNK = 1024
"""Images per record batch, at most."""

CHUNK_BYTES = 2**26
"""Bytes of a record batch, unless one image has more."""


def check_shape(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse arrays that are not (N, H, W) or (N, H, W, 1 or 3) uint8."""
    if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise UserError(
            f"{where}: images are {dtype} {shape}; expected uint8 (N, H, W) or (N, H, W, 1 or 3). "
            "Convert them to 8 bits with channels last."
        )
    if min(shape) < 0 or min(shape[1:]) < 1 or shape[1] * shape[2] > MAX_PIXELS:
        raise UserError(
            f"{where}: the header says {shape}; expected images of 1 to {MAX_PIXELS:,} pixels. Is it damaged?"
        )


def check_labels(where: str, labels: NDArray[Any], images: int) -> NDArray[np.int32]:
    """Labels as int32, one per image; an array (N, 1) is one of N labels."""
    if labels.shape == (images, 1):
        labels = labels[:, 0]
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}; expected {images} integers, one per image."
        )
    if len(labels) and not np.iinfo(np.int32).min <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        raise UserError(f"{where}: labels go from {labels.min()} to {labels.max()}; expected class indices.")
    return labels.astype(np.int32)


def rows(
    name: str, chunks: Iterator[NDArray[np.uint8]], labels: NDArray[np.int32] | None
) -> Iterator[pa.RecordBatch]:
    """Manifest rows of image chunks; keys are `<name>/<row number>`."""
    start = 0
    for chunk in chunks:
        count, shape = len(chunk), list(chunk.shape[1:])
        stop = start + count
        columns = {
            "key": [f"{name}/{row:08d}" for row in range(start, stop)],
            "bytes": [image.tobytes() for image in chunk],
            "shape": [shape] * count,
            "label": [-1] * count if labels is None else labels[start:stop],
            "identity": [""] * count,
        }
        nothing = dict.fromkeys(SCHEMA.names, [None] * count)
        yield pa.RecordBatch.from_pydict(nothing | columns, SCHEMA)
        start = stop


def read_chunks(stream: BinaryIO, shape: tuple[int, ...], where: str) -> Iterator[NDArray[np.uint8]]:
    """Image chunks of a stream of raw uint8 pixels.

    Raises:
        UserError: if the stream ends before all images are read.
    """
    size = math.prod(shape[1:])
    most = min(CHUNK, max(CHUNK_BYTES // size, 1))
    for start in range(0, shape[0], most):
        count = min(most, shape[0] - start)
        content = stream.read(count * size)
        if len(content) < count * size:
            raise UserError(
                f"{where}: the file ends inside image {start + len(content) // size} of {shape[0]}."
            )
        yield np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
