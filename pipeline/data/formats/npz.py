"""Image and label arrays in a NumPy .npz file; streamed, never loaded whole, never unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from tokenize import TokenError
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.config.schema import Dataset
from pipeline.data.formats import _arrays, _files
from pipeline.data.notes import Notes
from pipeline.errors import UserError, unknown

PLACE = "file"


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """Rows of the array `images`, labelled by the array `labels` where one is named."""
    path, where = dataset.path, f"datasets.{dataset.name}"
    try:
        with _files.open_file(path, f"{where}.path") as file, zipfile.ZipFile(file) as archive:
            name = dataset.images or _only(archive, where)
            labels = None
            if dataset.labels is not None:
                with _open(archive, dataset.labels, f"{where}.labels") as stream:
                    size = archive.getinfo(f"{dataset.labels}.npy").file_size
                    labels = _labels(stream, size, f"{where}.labels: {dataset.labels}")
            with _open(archive, name, f"{where}.images") as stream:
                shape, fortran, dtype = _header(stream, f"{where}.images: {name}")
                _arrays.check_shape(f"{where}.images", shape, dtype)
                if fortran:
                    raise UserError(f"{where}.images: the array is in Fortran order; save it in C order.")
                checked = (
                    None if labels is None else _arrays.check_labels(f"{where}.labels", labels, shape[0])
                )
                yield from _arrays.rows(name, _arrays.read_chunks(stream, shape, path), checked)
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it is encrypted
        raise UserError(f"{where}.path: {path} is not a readable .npz file: {error}") from None


def _only(archive: zipfile.ZipFile, where: str) -> str:
    names = _names(archive)
    if len(names) == 1:
        return names[0]
    raise UserError(f"{where}.images: the file has several arrays; name one of {', '.join(names)}.")


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _open(archive: zipfile.ZipFile, name: str, where: str) -> BinaryIO:
    if name not in _names(archive):
        raise UserError(f"{where}: {unknown('array', name, _names(archive))}")
    return cast(BinaryIO, archive.open(f"{name}.npy"))


def _labels(stream: BinaryIO, size: int, where: str) -> NDArray[Any]:
    """An array of labels in a member of `size` bytes.

    Raises:
        UserError: no array of integers, or one that has more bytes by its header than there are.
    """
    shape, _, dtype = _header(stream, where)
    wanted = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "iu" or min(shape, default=0) < 0:
        raise UserError(
            f"{where}: labels are {dtype} {shape}; expected integers. Save the labels as integers."
        )
    content = stream.read(wanted) if wanted <= size else b""
    if len(content) < wanted:
        raise UserError(
            f"{where}: the header says {dtype} {shape}, which is {wanted:,} bytes, but there are fewer. "
            "Is it damaged?"
        )
    return np.frombuffer(content, dtype).reshape(shape)


def _header(stream: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        major, _ = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        return read_header(stream)
    except (ValueError, RecursionError, MemoryError, TokenError) as error:  # but the first: nested too deeply
        raise UserError(f"{where} is not a NumPy array: {error}.") from None
