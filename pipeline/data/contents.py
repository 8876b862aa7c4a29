"""Images known by their bytes: a copy of a dataset is then the same dataset.

Listing such a dataset reads every image, once: what was found is kept in the workspace, and what has the same
place and size, and was not touched, the next time is not read again.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.fetch import CONTENT, fetch
from pipeline.workspace import files, storage, tables
from pipeline.workspace.files import Place

PIECE = 2**16
"""Digests after which those found so far are written: a listing that is interrupted goes on from there."""

SETTLED = 2.0
"""Seconds after which a change of a file shows in its time stamp; digests of younger ones are not kept."""

_SCHEMA = pa.schema([("seen", pa.binary(16)), ("sha256", pa.binary(32))])
"""A hash of where an image lies and of what its file was like; and the digest of its bytes."""

_PLACE = ["uri", "offset", "length", "column", "identity"]

Bytes = NDArray[np.uint8]


class Contents:
    """Digests of the images of a dataset, with those that were found when it was listed before.

    Memory: 48 bytes for each of these.
    """

    def __init__(self, folder: Place, limit: int) -> None:
        """Read what is known.

        Args:
            folder: of its digests alone.
            limit: most bytes of an image that are read; a larger one stays known by its file.
        """
        self.folder, self.limit = folder, limit
        pieces: list[Place] = list(folder.glob("*.parquet")) if folder.is_dir() else []
        known = [table for piece in pieces if (table := _read(piece)) is not None]
        whole = pa.concat_tables([_SCHEMA.empty_table(), *known])
        seen = _words(_matrix(whole["seen"], 16))
        order = np.lexsort((seen[:, 1], seen[:, 0]))
        self._seen, self._sha256 = seen[order], _matrix(whole["sha256"], 32)[order]
        self._found: list[tuple[bytes, bytes]] = []

    def of(self, batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same rows of a manifest, identified by their bytes; what cannot be read stays as it is."""
        for table in batches:
            listed = table.filter(table["uri"].is_valid())
            places = _places(listed)
            digests = self._known([_seen(place) for place in places])
            lacking = [number for number, digest in enumerate(digests) if digest is None]
            read = fetch(listed.take(pa.array(lacking, pa.int64())), self.limit) if lacking else ()
            for number, content in zip(lacking, read, strict=True):
                if isinstance(content, bytes):
                    digests[number] = digest = hashlib.sha256(content).digest()
                    if _is_settled(places[number]):
                        self._found.append((_seen(places[number]), digest))
            if len(self._found) >= PIECE:
                self._keep()
            own = iter(digests)
            yield _identified(table, [uri and next(own) for uri in table["uri"].to_pylist()])
        self._keep()

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

    def _keep(self) -> None:
        """Write what was found since the last time."""
        if self._found:
            table = pa.table(list(map(list, zip(*self._found, strict=True))), _SCHEMA)
            tables.write_table(self.folder / f"{uuid.uuid4().hex}.parquet", table)
            self._found.clear()


def forget(folder: Place) -> None:
    """Delete what is known: a file has other bytes though its size and its time stamp are the same."""
    files.remove_folder(folder)


def _identified(table: pa.Table, digests: list[bytes | None]) -> pa.Table:
    """Rows with the identities that digests are."""
    given = zip(table["identity"].to_pylist(), digests, strict=True)
    identities = [old if digest is None else f"{CONTENT}{digest.hex()}" for old, digest in given]
    column = table.schema.get_field_index("identity")
    return table.set_column(column, table.schema.field(column), pa.array(identities, pa.string()))


def _places(listed: pa.Table) -> list[dict[str, Any]]:
    """Where images lie, and what their files are like."""
    places: list[dict[str, Any]] = listed.select(_PLACE).to_pylist()
    touched = {uri: storage.touched(uri) for uri in {place["uri"] for place in places}}
    return [place | {"touched": touched[place["uri"]]} for place in places]


def _seen(place: Mapping[str, Any]) -> bytes:
    return hashlib.sha256("\0".join(map(str, place.values())).encode()).digest()[:16]


def _is_settled(place: Mapping[str, Any]) -> bool:
    """Whether a file would have another time stamp, were it changed now: some stores count whole seconds."""
    stamp = place["identity"].partition("#")[0].rpartition("-")[2]
    latest: int = max(int(stamp), place["touched"]) if stamp.isdecimal() else 0
    return 0 < latest / 1e9 < time.time() - SETTLED


def _read(path: Place) -> pa.Table | None:
    """What was written down; None if it is damaged."""
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
