"""Every dataset format is compiled to one manifest; everything later reads manifests only.

A file that cannot be read is still a row: fetching and decoding fail later, per row, and are counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import ID_ROLES, LABELLED_ROLES, MAX_IMAGE_MIB, Dataset
from pipeline.data import filters, formats
from pipeline.data.contents import Contents
from pipeline.data.notes import Notes
from pipeline.errors import UserError, unknown
from pipeline.workspace import files, storage, tables
from pipeline.workspace.artifacts import name_of
from pipeline.workspace.files import Place
from pipeline.workspace.tables import ROW_GROUP

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("column", pa.string()),
        ("bytes", pa.binary()),
        ("shape", pa.list_(pa.int32())),
        ("label", pa.int32()),
        ("accepted", pa.list_(pa.int32())),
        ("identity", pa.string()),
    ]
)
"""One row per image.

Its bytes are inline (`bytes`; raw pixels if there is a `shape`), or the file `uri`, or `length` bytes of it
from `offset` on, or in row `offset` of the Parquet file `uri` the value of `column`. A row with neither `uri`
nor `bytes` is an image known to be lost. `label` is the class index, -1 where it is unknown; where several
are right, `accepted` has all of them and `label` the first. `identity` changes with the image: size and time
stamp of its file, or the SHA-256 of its bytes; empty for inline bytes."""

_SPECIAL = r"[^ !#-\[\]-~]"
"""Characters that JSON in ASCII spells in another way."""


@dataclass(frozen=True)
class Manifest:
    """A compiled dataset in the workspace."""

    path: str
    rows: int
    digest: str
    """SHA-256 over all rows: the identity of the dataset."""
    class_count: dict[int, int]
    """Rows that accept each label; -1 is unlabelled, 0 a label of which the filters left no row."""
    notes: tuple[str, ...] = ()
    """What the reader of its results should know: what was left out, in which order classes are numbered."""

    @property
    def name(self) -> str:
        """Its place in the workspace."""
        return name_of(files.at(storage.parent(self.path)))

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop), reading no more than the row groups they lie in."""
        return tables.read_rows(self.path, start, stop)

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """The named rows, in ascending order, reading no more than the row groups they lie in."""
        rows = np.sort(rows)
        with tables.parquet(self.path) as file:
            groups = np.unique(rows // ROW_GROUP)
            found = [
                file.read_row_group(group).take(rows[rows // ROW_GROUP == group] - group * ROW_GROUP)
                for group in groups.tolist()
            ]
        return pa.concat_tables(found)

    def keys(self) -> list[str]:
        """Keys of all rows in manifest order."""
        with tables.parquet(self.path) as file:
            keys: list[str] = file.read(columns=["key"])["key"].to_pylist()
        return keys

    def labels(self) -> NDArray[np.int32]:
        """(rows,) int32 labels in manifest order."""
        with tables.parquet(self.path) as file:
            labels: NDArray[np.int32] = file.read(columns=["label"])["label"].to_numpy()
        return labels


def compile_manifest(
    dataset: Dataset, folder: Place, seed: int = 0, limit: int = MAX_IMAGE_MIB * 2**20
) -> Manifest:
    """Compile a dataset below `folder`; equal datasets share one manifest.

    Args:
        dataset: what to compile.
        folder: where manifests lie.
        seed: decides which images the filters `limit` and `limit_per_class` keep.
        limit: most bytes of an image that are read to know it by its content.

    Raises:
        UserError: unknown format, missing or unreadable path, array or column, a class without an index,
            empty dataset, keys used twice, no labels where the role needs them.
    """
    if dataset.format not in formats.names():
        raise UserError(
            f"datasets.{dataset.name}.format: {unknown('format', dataset.format, formats.names())}"
        )
    module, notes = formats.get(dataset.format), Notes()
    with files.scratch(folder) as draft:
        rows, whole = _regrouped(_listed(dataset, module.read(dataset, notes))), None
        if filters.wanted(dataset):
            whole = _write(rows, draft / "whole.parquet")
            kept = filters.kept(dataset, whole.path, seed, getattr(module, "classes", None))
            rows = _regrouped(_taken(whole.path, kept))
        if dataset.role not in ID_ROLES:
            rows = map(_without_labels, rows)
        if dataset.identity == "content":
            rows = Contents(contents_of(dataset, folder), limit).of(rows)
        manifest = _write(rows, draft / "rows.parquet")
        _check(dataset, manifest, whole or manifest, notes)
        if whole is not None and dataset.role in ID_ROLES:
            manifest = replace(
                manifest, class_count=dict.fromkeys(whole.class_count, 0) | manifest.class_count
            )
        final = folder / f"{dataset.name}-{manifest.digest[:16]}" / "rows.parquet"
        files.put(draft / "rows.parquet", final)  # also over an old one: the files may lie elsewhere by now
        return replace(manifest, path=str(final), notes=notes.sentences)


def contents_of(dataset: Dataset, folder: Place) -> Place:
    """The folder with the digests of a dataset's images; `folder` is that of all manifests."""
    return files.at(storage.parent(str(folder))) / "contents" / dataset.name


def _listed(dataset: Dataset, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows; no access, a link that goes round in circles, a damaged table are the user's to mend."""
    try:
        yield from batches
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        what = getattr(error, "filename", None) or dataset.path
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"datasets.{dataset.name}.path: cannot read {what}: {why}.") from None


def _write(tables: Iterator[pa.Table], path: Path) -> Manifest:
    """Stream the rows to disk, hashing and counting them on the way."""
    sha, rows, class_count = hashlib.sha256(), 0, dict[int, int]()
    with pq.ParquetWriter(path, SCHEMA, compression="lz4") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROW_GROUP)
            rows += len(table)
            sha.update(table_digest(table))
            for label, count in _counts(table):
                class_count[label] = class_count.get(label, 0) + count
    return Manifest(str(path), rows, sha.hexdigest(), class_count)


def _check(dataset: Dataset, manifest: Manifest, whole: Manifest, notes: Notes) -> None:
    """Refuse a dataset without images before or after its filters, keys used twice, and missing labels."""
    if not whole.rows:
        told = "".join(f" {note}." for note in notes.sentences)
        raise UserError(f"datasets.{dataset.name}.path: no images in {dataset.path}. Check the path.{told}")
    if not manifest.rows:
        raise UserError(f"datasets.{dataset.name}: include_labels keeps none of its {whole.rows} images.")
    _check_keys(dataset, Path(manifest.path), manifest.rows)
    if dataset.role in LABELLED_ROLES and -1 in manifest.class_count:
        raise UserError(
            f"datasets.{dataset.name}: role {dataset.role!r} needs a label for every image, but "
            f"{manifest.class_count[-1]} of {manifest.rows} have none. "
            "Name the labels (`labels:`) or use class folders."
        )


def _taken(path: str, kept: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest that are kept."""
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROW_GROUP):
            yield batch.filter(pa.array(kept[start : start + len(batch)]))
            start += len(batch)


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
    for name, values in (("label", [-1] * len(table)), ("accepted", [None] * len(table))):
        field = SCHEMA.field(name)
        table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return table


def table_digest(table: pa.Table) -> bytes:
    """Digest of one table of rows; the folder a dataset lies in does not enter, its content does.

    The digest of a dataset is SHA-256 over those of its row groups.
    """
    names = ("key", "shape", "label", "identity", "accepted", "bytes")
    keys, shapes, labels, identities, accepted, contents = (table[name] for name in names)
    parts = [
        *('["', _escaped(keys), '", ', _each(shapes, _shape), ", ", labels.cast(pa.string()), ', "'),
        *(_escaped(identities), '", ', _each(contents, _lacks), _each(accepted, _several), "]"),
        _each(contents, _content),
    ]
    joined = pc.binary_join_element_wise(
        *_as_bytes(parts), b"", null_handling="replace", null_replacement="None"
    )
    rows = joined.combine_chunks()
    content: pa.Buffer = pc.binary_join(pa.ListArray.from_arrays([0, len(rows)], rows), b"")[0].as_buffer()
    return hashlib.sha256(content).digest()


def _as_bytes(parts: Iterable[Any]) -> Iterator[Any]:
    """Columns of text and bytes, and what is the same in all rows; of the latter, neighbours become one."""
    for alike, some in groupby(parts, lambda part: isinstance(part, str | bytes)):
        if alike:
            yield b"".join(part.encode() if isinstance(part, str) else part for part in some)
        else:
            yield from (part.cast(pa.binary()) for part in some)


def _escaped(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as JSON has them between quotes."""
    if pc.any(pc.match_substring_regex(texts, _SPECIAL)).as_py():
        return pa.chunked_array([[encode_basestring_ascii(text)[1:-1] for text in texts.to_pylist()]])
    return texts


def _each(column: pa.ChunkedArray, say: Callable[[Any], Any]) -> Any:
    """What is said of each value; once where there are none."""
    if column.null_count == len(column):
        return say(None)
    return pa.array(map(say, column.to_pylist()))


def _shape(shape: list[int] | None) -> str:
    return json.dumps(shape) if shape else "null"


def _several(labels: list[int] | None) -> str:
    return "" if labels is None else f", {json.dumps(labels)}"


def _lacks(content: bytes | None) -> str:
    return "true" if content is None else "false"


def _content(content: bytes | None) -> bytes:
    return hashlib.sha256(content or b"").digest()


def _counts(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Labels and the rows that accept them; rows without bytes fail when they are read and have none."""
    readable = pc.or_(pc.is_valid(table["uri"]), pc.is_valid(table["bytes"]))
    table = table.select(["label", "accepted"]).filter(readable)
    several = pc.list_flatten(table["accepted"])
    single = table["label"].filter(pc.is_null(table["accepted"]))
    for column in (single, several):
        for item in pc.value_counts(column):
            yield item["values"].as_py(), item["counts"].as_py()


def _check_keys(dataset: Dataset, path: Path, rows: int) -> None:
    """Refuse a key that is used twice; 8 bytes of memory a row, keys are compared where hashes agree."""
    hashes = np.sort(np.fromiter(map(hash, _keys(path)), np.int64, count=rows))
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: set[str] = set()
    for key in (key for key in _keys(path) if hash(key) in twice) if twice else ():
        if key in seen:
            raise UserError(
                f"datasets.{dataset.name}: the key {key!r} occurs more than once; keys must be unique."
            )
        seen.add(key)


def _keys(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROW_GROUP, columns=["key"]):
            yield from batch["key"].to_pylist()
