"""Every dataset format is compiled to one manifest; everything later reads manifests only.

A file here is a format, its name the name used in the config (`_arrays.py` is shared by three). It holds
one function `read(dataset) -> Iterator[pyarrow.RecordBatch]` that yields rows of `SCHEMA` in a fixed order
and raises `UserError` on a path or name that is not there. A file that cannot be read is still a row:
reading and decoding fail later, per row, and are counted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import LABELLED_ROLES, Dataset
from pipeline.errors import UserError, unknown

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("bytes", pa.binary()),
        ("shape", pa.list_(pa.int32())),
        ("label", pa.int32()),
        ("identity", pa.string()),
    ]
)
"""One row per image: where its bytes are (`uri` or inline `bytes`), the shape if they are raw pixels, and
what a change of the image changes (`identity`: size and time stamp of a file, empty for inline bytes)."""

ROW_GROUP = 1024
"""Rows per row group of a manifest; a shard reads only the row groups it needs."""


@dataclass(frozen=True)
class Manifest:
    """A compiled dataset on disk."""

    path: str
    rows: int
    digest: str
    """SHA-256 over all rows: the identity of the dataset."""
    class_count: dict[int, int]
    """Rows per label; -1 is unlabelled."""

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop), reading no more than the row groups they lie in."""
        with pq.ParquetFile(self.path) as file:
            first, last = start // ROW_GROUP, -(-stop // ROW_GROUP)
            groups = file.read_row_groups(list(range(first, min(last, file.num_row_groups))))
        return groups.slice(start - first * ROW_GROUP, stop - start)

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """The named rows, in ascending order, reading no more than the row groups they lie in."""
        rows = np.sort(rows)
        with pq.ParquetFile(self.path) as file:
            groups = np.unique(rows // ROW_GROUP)
            tables = [
                file.read_row_group(group).take(rows[rows // ROW_GROUP == group] - group * ROW_GROUP)
                for group in groups.tolist()
            ]
        return pa.concat_tables(tables)

    def labels(self) -> NDArray[np.int32]:
        """(rows,) int32 labels in manifest order."""
        labels: NDArray[np.int32] = pq.read_table(self.path, columns=["label"])["label"].to_numpy()
        return labels


def formats() -> list[str]:
    """Names of all formats, sorted."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def compile_manifest(dataset: Dataset, folder: Path) -> Manifest:
    """Compile a dataset below `folder`; equal datasets share one manifest.

    Raises:
        UserError: unknown format, missing path or array, empty dataset, keys used twice, no labels
            where the role needs them.
    """
    if dataset.format not in formats():
        raise UserError(f"datasets.{dataset.name}.format: {unknown('format', dataset.format, formats())}")
    batches = import_module(f"{__name__}.{dataset.format}").read(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{dataset.name}-{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        manifest = _write(dataset, batches, draft)
        final = folder / f"{dataset.name}-{manifest.digest[:16]}"
        final.mkdir(exist_ok=True)
        (draft / "rows.parquet").replace(final / "rows.parquet")  # the files may lie elsewhere by now
        return Manifest(**{**asdict(manifest), "path": str(final / "rows.parquet")})
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(dataset: Dataset, batches: Iterator[pa.RecordBatch], folder: Path) -> Manifest:
    """Stream the rows to disk, hashing them on the way."""
    path = folder / "rows.parquet"
    sha, rows, class_count = hashlib.sha256(), 0, dict[int, int]()
    with pq.ParquetWriter(path, SCHEMA, compression="lz4") as writer:
        for batch in _regrouped(batches):
            if dataset.role not in LABELLED_ROLES:
                batch = _without_labels(batch)
            writer.write_table(batch, row_group_size=ROW_GROUP)
            rows += len(batch)
            sha.update(_identity(batch))
            for label, count in _counts(batch["label"]):
                class_count[label] = class_count.get(label, 0) + count
    if not rows:
        raise UserError(f"datasets.{dataset.name}.path: no images in {dataset.path}. Check the path.")
    _check_keys(dataset, path, rows)
    if dataset.role in LABELLED_ROLES and -1 in class_count:
        raise UserError(
            f"datasets.{dataset.name}: role {dataset.role!r} needs a label for every image, but "
            f"{class_count[-1]} of {rows} have none. Name the labels (`labels:`) or use class folders."
        )
    return Manifest(str(path), rows, sha.hexdigest(), class_count)


def _regrouped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in tables of exactly ROW_GROUP rows (the last may be shorter)."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        if count >= ROW_GROUP:
            table = pa.Table.from_batches(held, SCHEMA)
            full = count - count % ROW_GROUP
            for start in range(0, full, ROW_GROUP):
                yield table.slice(start, ROW_GROUP)
            held, count = table.slice(full).to_batches(), count - full
    if count:
        yield pa.Table.from_batches(held, SCHEMA)


def _without_labels(table: pa.Table) -> pa.Table:
    """Class indices of another label space must never meet the classifier's."""
    column = SCHEMA.get_field_index("label")
    return table.set_column(column, SCHEMA.field("label"), pa.array([-1] * len(table), pa.int32()))


def _identity(table: pa.Table) -> bytes:
    """Digest of one table of rows; the folder a dataset lies in does not enter, its content does."""
    sha = hashlib.sha256()
    rows = zip(
        *(table[name].to_pylist() for name in ("key", "bytes", "shape", "label", "identity")), strict=True
    )
    for key, content, shape, label, identity in rows:
        sha.update(json.dumps([key, shape, label, identity, content is None]).encode())
        sha.update(hashlib.sha256(content or b"").digest())
    return sha.digest()


def _counts(column: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    for item in pc.value_counts(column):
        yield item["values"].as_py(), item["counts"].as_py()


def _check_keys(dataset: Dataset, path: Path, rows: int) -> None:
    keys = pq.read_table(path, columns=["key"])["key"]
    if pc.count_distinct(keys).as_py() == rows:
        return
    twice = next(item["values"].as_py() for item in pc.value_counts(keys) if item["counts"].as_py() > 1)
    raise UserError(f"datasets.{dataset.name}: the key {twice!r} occurs more than once; keys must be unique.")
