"""Images known by their bytes: a copy of a dataset is then the same dataset.

Listing such a dataset reads every image, once: what was found lies beside the manifest, and what has the same
place, size and time stamp the next time is not read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.fetch import CONTENT, fetch
from pipeline.workspace import tables
from pipeline.workspace.files import Place

FILE = "contents.parquet"
"""File beside the rows of a manifest."""

_SCHEMA = pa.schema([("seen", pa.binary(16)), ("sha256", pa.binary(32))])
"""A hash of where an image lies and of what its file was like; and the digest of its bytes."""

_PLACE = ["uri", "offset", "length", "column", "identity"]

Bytes = NDArray[np.uint8]


class Contents:
    """Digests of images, and those that were found when they were listed before.

    Memory: 48 bytes an image that was listed before.
    """

    def __init__(self, folder: Place, dataset: str) -> None:
        found: list[Place] = list(folder.glob(f"{dataset}-*")) if folder.is_dir() else []
        known = [table for each in found if (table := _read(each / FILE)) is not None]
        whole = pa.concat_tables([_SCHEMA.empty_table(), *known])
        seen = _words(_matrix(whole["seen"], 16))
        order = np.lexsort((seen[:, 1], seen[:, 0]))
        self._seen, self._sha256 = seen[order], _matrix(whole["sha256"], 32)[order]

    def of(self, batches: Iterator[pa.Table], path: Path) -> Iterator[pa.Table]:
        """The same rows of a manifest, identified by their bytes; those that cannot be read stay as they are.

        Args:
            batches: rows of a manifest.
            path: of the file that the digests are written to.
        """
        with pq.ParquetWriter(path, _SCHEMA, compression="lz4", write_page_checksum=True) as writer:
            for table in batches:
                listed = table.filter(table["uri"].is_valid())
                seen = [_seen(row) for row in listed.select(_PLACE).to_pylist()]
                digests = self._known(seen)
                lacking = [number for number, digest in enumerate(digests) if digest is None]
                for number, content in zip(
                    lacking, fetch(listed.take(pa.array(lacking, pa.int64()))), strict=True
                ):
                    if isinstance(content, bytes):
                        digests[number] = hashlib.sha256(content).digest()
                read = [(one, other) for one, other in zip(seen, digests, strict=True) if other is not None]
                writer.write_table(pa.table(list(map(list, zip(*read, strict=True))) or [[], []], _SCHEMA))
                own = iter(digests)
                digest_of = [None if uri is None else next(own) for uri in table["uri"].to_pylist()]
                yield _identified(table, digest_of)

    def _known(self, seen: list[bytes]) -> list[bytes | None]:
        """The digests of images that were seen before; None for others."""
        if not len(self._seen) or not seen:
            return [None] * len(seen)
        words = _words(np.frombuffer(b"".join(seen), np.uint8).reshape(-1, 16))
        places = np.minimum(np.searchsorted(self._seen[:, 0], words[:, 0]), len(self._seen) - 1)
        same = (self._seen[places] == words).all(axis=1)
        return [
            self._sha256[place].tobytes() if hit else None for place, hit in zip(places, same, strict=True)
        ]


def _identified(table: pa.Table, digests: list[bytes | None]) -> pa.Table:
    """Rows with the identities that digests are."""
    given = zip(table["identity"].to_pylist(), digests, strict=True)
    identities = [old if digest is None else f"{CONTENT}{digest.hex()}" for old, digest in given]
    column = table.schema.get_field_index("identity")
    return table.set_column(column, table.schema.field(column), pa.array(identities, pa.string()))


def _seen(row: Mapping[str, Any]) -> bytes:
    return hashlib.sha256("\0".join(str(row[name]) for name in _PLACE).encode()).digest()[:16]


def _read(path: Place) -> pa.Table | None:
    """What was written down; None if there is nothing, or it is damaged."""
    try:
        with tables.parquet(path) as file:
            return file.read()
    except (OSError, pa.ArrowException):
        return None


def _matrix(column: pa.ChunkedArray, width: int) -> Bytes:
    """(N, width) bytes of a column of digests."""
    chunks = [np.frombuffer(chunk.buffers()[1], np.uint8) for chunk in column.chunks if len(chunk)]
    return np.concatenate([np.empty(0, np.uint8), *chunks]).reshape(-1, width)


def _words(digests: Bytes) -> NDArray[np.uint64]:
    """(N, 2) numbers of (N, 16) bytes."""
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
