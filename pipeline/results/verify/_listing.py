"""The list of a dataset's images, as it was compiled, and which of them were found again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.columns import KEY, LABEL, Mask
from pipeline.data import manifest
from pipeline.results.verify._files import require, row_groups
from pipeline.results.verify._findings import Tally
from pipeline.workspace.files import Place

Hashes = NDArray[np.int64]

_ACCEPTED = "accepted"


class Listing:
    """The rows of a list as 64-bit hashes: 17 bytes of memory a row, 24 while it is read."""

    def __init__(self, path: Place) -> None:
        """Read the list once, and compute its digest again."""
        self.path = path
        require(path, dict(zip(manifest.SCHEMA.names, manifest.SCHEMA.types, strict=True)))
        sha, keys, pairs = hashlib.sha256(), list[Hashes](), list[Hashes]()
        for table in row_groups(path, manifest.SCHEMA.names):
            sha.update(manifest.table_digest(table))
            keys.append(_hashes(table[KEY].to_pylist()))
            pairs.append(_hashes(list(_accepted(table))))
        self.digest = sha.hexdigest()
        """SHA-256 over all rows."""
        self._keys, self._pairs = _ordered(keys), _ordered(pairs)
        self._seen = np.zeros(len(self._keys), np.uint8)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._keys)

    def repeated(self) -> Tally:
        """Keys that the list has more than once."""
        again = self._keys[1:] == self._keys[:-1]
        return self._named(np.append(again, False))

    def see(self, keys: NDArray[np.object_]) -> Mask:
        """Note that keys were found; returns which of them are not in the list."""
        hashes = _hashes(keys.tolist())
        known = _contains(self._keys, hashes)
        places, counts = np.unique(np.searchsorted(self._keys, hashes[known]), return_counts=True)
        self._seen[places] = np.minimum(self._seen[places] + counts, 2)
        return ~known

    def missing(self) -> Tally:
        """Keys that were not found."""
        return self._named(self._seen == 0)

    def doubled(self) -> Tally:
        """Keys that were found more than once."""
        return self._named(self._seen > 1)

    def accepts(self, keys: NDArray[np.object_], labels: NDArray[np.int32]) -> Mask:
        """Which rows have a label that the list has for them."""
        return _contains(self._pairs, _hashes(list(zip(keys.tolist(), labels.tolist(), strict=True))))

    def _named(self, chosen: Mask) -> Tally:
        """The keys at some places of the sorted hashes; the list is read again if there are any."""
        tally, wanted = Tally(), self._keys[chosen]
        if len(wanted):
            for table in row_groups(self.path, [KEY]):
                keys = np.array(table[KEY].to_pylist(), dtype=object)
                tally.add(keys[_contains(wanted, _hashes(keys.tolist()))])
        return tally


def _accepted(table: pa.Table) -> Iterator[tuple[str, int]]:
    """Every key with each label that is right for it."""
    columns = (table[name].to_pylist() for name in (KEY, LABEL, _ACCEPTED))
    for key, label, several in zip(*columns, strict=True):
        for accepted in several or [label]:
            yield key, accepted


def _hashes(values: Sequence[object]) -> Hashes:
    hashed: Callable[[object], int] = hash
    return np.fromiter(map(hashed, values), np.int64, count=len(values))


def _ordered(pieces: list[Hashes]) -> Hashes:
    """All hashes, sorted; the pieces are given up, so that memory holds them once."""
    hashes = np.concatenate([*pieces, _hashes([])])
    pieces.clear()
    hashes.sort()
    return hashes


def _contains(ordered: Hashes, hashes: Hashes) -> Mask:
    """Which hashes are among the ordered ones."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    found: Mask = ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)] == hashes
    return found
