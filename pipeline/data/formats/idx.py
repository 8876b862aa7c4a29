"""IDX files as MNIST and its relatives are published, plain or gzipped; streamed."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config.schema import Dataset
from pipeline.data.formats import _arrays, _files
from pipeline.data.notes import Notes
from pipeline.data.places import located
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "file"

_UINT8 = 8


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """Rows of the image file `path`, labelled by the file `labels` where one is named."""
    where = f"datasets.{dataset.name}"
    try:
        labels = None
        if dataset.labels is not None:
            source = dataset.labels
            with _open(source, f"{where}.labels") as stream:
                (count,) = _header(stream, 1, f"{where}.labels: {source}")
                labels = _labels(stream, count)
        source = dataset.path
        with _open(source, f"{where}.path") as stream:
            shape = _header(stream, 3, f"{where}.path: {source}")
            _arrays.check_shape(f"{where}.path: {source}", shape, np.dtype(np.uint8))
            checked = None if labels is None else _arrays.check_labels(f"{where}.labels", labels, shape[0])
            yield from _arrays.rows(_stem(source), _arrays.read_chunks(stream, shape, source), checked)
            if stream.read(1):  # reading to the end also checks gzip's checksum
                raise UserError(f"{where}.path: {source} goes on after its {shape[0]} images.")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{where}: {source} is damaged: {error}") from None


def _labels(stream: BinaryIO, count: int) -> NDArray[np.uint8]:
    """All labels, and one more if there are more than the header says."""
    parts = list[bytes]()
    while count >= 0 and (content := stream.read(min(count + 1, _arrays.CHUNK_BYTES))):
        parts.append(content)
        count -= len(content)
    return np.frombuffer(b"".join(parts), np.uint8)


@contextmanager
def _open(path: str, where: str) -> Iterator[BinaryIO]:
    with _files.open_file(path, where) as stream:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if path.endswith(".gz") else stream


def _stem(path: str) -> str:
    return storage.name_of(located(path)).removesuffix(".gz")


def _header(stream: BinaryIO, dimensions: int, where: str) -> tuple[int, ...]:
    """Shape of the array; only unsigned bytes are images or labels."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UINT8 or magic[3] != dimensions:
        raise UserError(f"{where}: not an IDX file of unsigned bytes with {dimensions} dimension(s).")
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise UserError(f"{where}: the file ends inside its header.")
    return struct.unpack(f">{dimensions}I", sizes)
