"""Parquet tables of a workspace: visible when they are complete, read in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.columns import padded
from pipeline.errors import UserError
from pipeline.workspace import artifacts, files, storage
from pipeline.workspace.artifacts import Record
from pipeline.workspace.files import Place

AHEAD = 8
"""Parts that are opened at once: in an object store each takes a few answers of a server."""


def write_table(path: Place, table: pa.Table) -> None:
    """Write a Parquet file that belongs to no artifact; it appears when it is complete."""
    with files.atomic(path) as draft:
        written(table)(draft)


def written(table: pa.Table) -> Callable[[Path], None]:
    """A function that writes a table to a path, with checksums that `parquet` compares."""
    return partial(
        pq.write_table,
        table,
        compression="lz4",
        row_group_size=ROW_GROUP,
        use_dictionary=False,
        write_page_checksum=True,
    )


def part_name(number: int) -> str:
    """File name of one part; parts in name order are rows in manifest order."""
    return f"part-{number:05d}.parquet"


def arrow_columns(columns: Mapping[str, NDArray[Any]]) -> pa.Table:
    """Equally long arrays as a table; (N, D) arrays become fixed-size lists."""
    return pa.table({name: _arrow(values) for name, values in columns.items()})


def numpy_columns(table: pa.Table, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named columns as arrays; fixed-size lists become (N, D), float16 becomes float32."""
    return {name: _numpy(table[name].combine_chunks()) for name in names}


def _arrow(values: NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _numpy(column: pa.Array) -> NDArray[Any]:
    values: NDArray[Any]
    if pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        if values.dtype == np.float16:
            values = values.astype(np.float32)
    else:
        values = column.to_numpy(zero_copy_only=False)
    return values


@dataclass(frozen=True)
class Table:
    """A complete artifact of Parquet parts, addressed by row number.

    What reads rows of it raises `Damaged` for a part that is not what was written.
    """

    folder: str
    content: str
    """Digest of all bytes."""
    part_rows: tuple[int, ...]
    beside: tuple[tuple[str, str], ...] = ()
    """Columns that are artifacts of their own in its folder, with equal parts, and their content digests."""

    @classmethod
    def of(cls, folder: Place, record: Record, beside: Mapping[str, Record] | None = None) -> Table:
        """The rows of an artifact, and of columns beside it by name."""
        rows = [file.facts["rows"] for name, file in sorted(record.files.items()) if name.startswith("part-")]
        columns = {name: column.content for name, column in (beside or {}).items()}
        return cls(str(folder), record.content, tuple(rows), tuple(columns.items()))

    @classmethod
    def open(cls, folder: Place) -> Table:
        """The rows of whatever artifact is complete in a folder."""
        return cls.of(folder, artifacts.read_record(folder))

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return sum(self.part_rows)

    def parts(self) -> list[Place]:
        """Paths of the parts, in row order."""
        folder = files.at(self.folder)
        return [folder / part_name(number) for number in range(len(self.part_rows))]

    def slices(self, size: int) -> list[tuple[int, int]]:
        """Row ranges of a fixed size, independent of how the rows lie in parts."""
        return [(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Columns of rows [start, stop), at least one."""
        beside = dict(self.beside)
        own = [name for name in names if name not in beside]
        found = self._read(start, stop, own) if own else {}
        for name in names:
            if name in beside:
                other = replace(self, folder=str(files.at(self.folder) / name), content=beside[name])
                found |= other._read(start, stop, [name])
        return found

    def row_bytes(self, names: Iterable[str]) -> int:
        """About how many bytes a row of some columns takes in memory; 0 where the first part is not there."""
        beside, folder = dict(self.beside), files.at(self.folder)
        places = {name: folder / name if name in beside else folder for name in names}
        return sum(_widths(str(place / part_name(0))).get(name, 0) for name, place in places.items())

    def contents(self, name: str, columns: Iterable[str]) -> dict[str, str]:
        """Content digests of this artifact, which has a name, and of some of the columns beside it."""
        beside = dict(self.beside)
        return {name: self.content} | {
            f"{name}/{column}": beside[column] for column in columns if column in beside
        }

    def columns(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns, part by part in order."""

        def read(path: Place) -> pa.Table:
            with self._opened(path) as file, parquet(file) as content:
                return content.read(list(names)).select(list(names))

        return storage.ahead(read, self.parts(), AHEAD)

    def _opened(self, path: Place) -> AbstractContextManager[Path]:
        return artifacts.opened(path, artifacts.digests(self.folder, self.content)[path.name])

    def _read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        tables, offset = [], 0
        for path, rows in zip(self.parts(), self.part_rows, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, rows)
            if first < last:
                with self._opened(path) as file:
                    tables.append(read_rows(file, first, last, names))
            offset += rows
        return numpy_columns(pa.concat_tables(tables), names)


_TEXT = 100
"""Bytes of a string in a column of objects, about."""


@lru_cache(maxsize=2**10)
def _widths(path: str) -> dict[str, int]:
    """Bytes of a value in memory, by column of a file that need not be there or whole."""
    with suppress(OSError, UserError, pa.ArrowException), parquet(path) as file:
        return {field.name: _value_bytes(field.type) for field in file.schema_arrow}
    return {}


def _value_bytes(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size * max(4, _value_bytes(kind.value_type)))
    return _TEXT if pa.types.is_string(kind) else int(kind.bit_width // 8)


def fixed_batches(
    columns: Mapping[str, NDArray[Any]], size: int
) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
    """Batches of exactly `size` rows, padded at the end, and how many of their rows are real."""
    rows = len(next(iter(columns.values())))
    for start in range(0, rows, size):
        count = min(size, rows - start)
        yield {name: padded(values[start : start + count], size) for name, values in columns.items()}, count


ROW_GROUP = 1024
"""Rows per row group of every Parquet file of a workspace; a reader decodes only the groups it needs."""


def parquet(path: Place | str) -> pq.ParquetFile:
    """A Parquet file to read; of a remote one only what is asked for is transferred."""
    system, place = storage.located(str(path))
    source = place if system is None else storage.Reader(str(path))
    return pq.ParquetFile(source, pre_buffer=system is not None, page_checksum_verification=True)


def read_rows(path: Place | str, start: int, stop: int, names: Sequence[str] | None = None) -> pa.Table:
    """Rows [start, stop) of a Parquet file of a workspace; only the row groups they lie in are decoded."""
    with parquet(path) as file:
        first, last = start // ROW_GROUP, min(-(-stop // ROW_GROUP), file.num_row_groups)
        groups = file.read_row_groups(list(range(first, last)), columns=names and list(names))
    return groups.slice(start - first * ROW_GROUP, stop - start)
