"""One range of rows of every bank in FAISS.

The distances of the neighbours that FAISS finds are computed again in float64 from the stored vectors: its
own come from ‖a‖² + ‖b‖² - 2ab in float32, which loses the small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.cluster.engine import Shared
from pipeline.columns import Float
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.stages.index import (
    FILE,
    ROOMIER,
    BankFiles,
    Distances,
    Ids,
    Neighbours,
    Vectors,
    device,
    kept,
    merge,
)
from pipeline.workspace import files
from pipeline.workspace.artifacts import File, opened, write_part

Places = NDArray[np.integer[Any]]

_OPQ = 256
"""Clusters that FAISS learns a rotation for product quantisers (OPQ) with."""


BLOCK = 1024
"""FAISS multiplies queries with so many vectors at once. Flat shards are cut between such blocks: products
then have the same bits however many shards and threads there are."""

_AT_ONCE = 64
"""Pairs of a query and a vector that stay in the cache."""


@dataclass(frozen=True)
class Mapped:
    """Vectors that stay in their files; of what is read, memory holds as much as there is room for."""

    pieces: tuple[Vectors, ...]
    """Memory-mapped, one after the other."""

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Behind the last row of each piece."""
        return np.cumsum([len(piece) for piece in self.pieces], dtype=np.int64)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __getitem__(self, row: Places) -> Vectors:
        """(P, width) of (P,) rows."""
        found = np.empty((len(row), self.pieces[0].shape[1]), np.float32)
        number = np.searchsorted(self.ends, row, side="right")
        for each in np.unique(number):
            own, piece = number == each, self.pieces[each]
            found[own] = piece[row[own] - (self.ends[each] - len(piece))]
        return found


def exact_distance(queries: Vectors, vectors: Vectors | Mapped, query: Places, row: Places) -> Float:
    """Euclidean distances in float64 of pairs.

    Args:
        queries: (N, width) float32.
        vectors: (rows, width) float32.
        query: (P,) rows of `queries`.
        row: (P,) rows of `vectors`.

    Returns:
        (P,) float64.
    """
    distance = np.empty(len(row))
    for start in range(0, len(row), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        difference = vectors[row[some]].astype(np.float64)
        difference -= queries[query[some]]
        distance[some] = np.sqrt(np.einsum("pd,pd->p", difference, difference))
    return distance


class IndexShard:
    """One range of rows of every bank. Not an actor itself; `index.start` makes actors of it.

    An index is loaded from the workspace when it is first needed: an actor that was started again, perhaps
    on another node, goes on where the old one was.
    """

    def __init__(
        self, number: int, of: int, settings: schema.Index, banks: Mapping[str, BankFiles], threads: int = 1
    ) -> None:
        self.number, self.of, self.settings = number, of, settings
        self.banks = banks
        """By folder, which is what they are asked for by."""
        self.indexes: dict[str, Any] = {}
        """By folder; a flat bank on CPUs needs none."""
        self.vectors: dict[str, Vectors | Mapped] = {}
        """By folder; in memory where they are searched there. Exact distances are computed of them."""
        self.offset: dict[str, int] = {}
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "faiss", partial(faiss.omp_set_num_threads, 1))
        faiss.omp_set_num_threads(threads)

    def load(self, folder: str) -> None:
        """Build the index of this shard's rows of a bank, or read the trained one; nothing if it is there.

        Raises:
            UserError: GPU asked for but not in this build of FAISS.
            Damaged: vectors or an index that are not what was written.
        """
        if folder in self.vectors:
            return
        bank, on_cpu = self.banks[folder], device(self.settings) == "cpu"
        if not on_cpu:
            require_gpu()
        start, stop = self._cut(bank)
        self.offset[folder] = start
        if self.settings.kind == "flat" and on_cpu:
            self.vectors[folder] = bank.read(start, stop)
            return
        if self.settings.kind == "flat":
            self.indexes[folder] = self._on_gpu(bank.width, bank.read(start, stop))
        else:
            index = self._trained(bank)
            self.indexes[folder] = index if on_cpu else self._cloned(index)
        self.vectors[folder] = Mapped(tuple(bank.ranges(start, stop)))

    def search(self, folder: str, queries: Shared[Vectors], k: int, exact: bool = False) -> Neighbours:
        """The k nearest vectors of this shard for (N, width) float32 queries; all if it has fewer."""
        self.load(folder)
        asked, most = queries.get(), min(k, len(self.vectors[folder]))
        if exact or not most or folder not in self.indexes:
            found = self._exhaustive(self.vectors[folder], asked, most)
        else:
            with _fitting(len(self.vectors[folder]), asked.shape[1]):  # a search takes memory of its own
                rank, row = self.indexes[folder].search(asked, most)
            found = Neighbours(np.where(row >= 0, rank, np.inf).astype(np.float32), row.astype(np.int32))
        return Neighbours(found.rank, np.where(found.row >= 0, found.row + self.offset[folder], -1))

    def _exhaustive(self, vectors: Vectors | Mapped, queries: Vectors, k: int) -> Neighbours:
        """By all threads, each with one of FAISS' own: of several, products have other bits."""
        if isinstance(vectors, Mapped):
            parts = list(vectors.pieces)
        else:
            cuts = (_cut(len(vectors), number, self.threads, BLOCK) for number in range(self.threads))
            parts = [vectors[start:stop] for start, stop in cuts]

        def nearest(start: int, part: Vectors) -> Neighbours:
            rank, row = faiss.knn(queries, part, min(k, len(part)))
            return Neighbours(rank, (row + start).astype(np.int32))

        parts = [part for part in parts if len(part)] if k else []
        starts = np.cumsum([0, *map(len, parts)])
        nothing = Neighbours(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int32))
        return merge(list(self.pool.map(nearest, starts, parts)) or [nothing], k)

    def distance(self, folder: str, queries: Shared[Vectors], row: Ids) -> Distances:
        """Euclidean float64 distances of queries to those of (N, m) rows of a bank that lie in this shard."""
        self.load(folder)
        vectors, start = self.vectors[folder], self.offset[folder]
        found = Distances(start, start + len(vectors), np.empty(0))
        own = found.of(row)
        query, _ = np.nonzero(own)
        return replace(found, value=exact_distance(queries.get(), vectors, query, row[own] - start))

    def train(self, folder: str, path: str) -> File:
        """Train an index of this shard's rows of a bank by the factory string, and write it to a path.

        Raises:
            UserError: if FAISS cannot.
        """
        bank = self.banks[folder]
        cut = self._cut(bank)
        index = made(self.settings.kind, bank.width)
        try:
            if isinstance(index, faiss.IndexScalarQuantizer) and index.is_trained:  # `SQfp16`
                for piece in bank.ranges(*cut):
                    index.add(np.ascontiguousarray(piece))
            else:
                vectors = bank.read(*cut)
                index.train(vectors)
                index.add(vectors)
        except RuntimeError as error:
            raise UserError(
                f"index.kind: {self.settings.kind!r} cannot be trained: {_reason(error)}"
            ) from None
        return write_part(files.at(path), lambda local: write(index, local))

    def _cut(self, bank: BankFiles) -> tuple[int, int]:
        """The rows of a bank that this shard holds: first, and behind the last."""
        return _cut(bank.rows, self.number, self.of, BLOCK if self.settings.kind == "flat" else 1)

    def _trained(self, bank: BankFiles) -> Any:
        """The index that was trained.

        Raises:
            Damaged: if it is not there, or not what was written.
        """
        artifact = kept(bank, self.settings.kind, self.number, self.of)
        with opened(artifact.folder / FILE, artifact.require().files[FILE].sha256) as file:
            return faiss.read_index(str(file))

    def _on_gpu(self, width: int, vectors: Vectors) -> Any:
        """A flat index on the GPU; what is added in one piece is allocated once."""
        settings = faiss.GpuIndexFlatConfig()
        settings.device = 0
        with _fitting(len(vectors), width):
            index = faiss.GpuIndexFlatL2(self._resources, width, settings)
            index.add(vectors)
        return index

    def _cloned(self, index: Any) -> Any:
        """A trained index on the GPU; one in 16 bits (`SQfp16`) is a flat one there.

        Raises:
            UserError: it does not fit, or there is none such on GPUs.
        """
        try:
            with _fitting(index.ntotal, index.d):
                return faiss.index_cpu_to_gpu(self._resources, 0, index)
        except RuntimeError as error:
            if "not implemented on GPU" not in str(error):
                raise
            raise UserError(
                f"index.kind: FAISS has no {self.settings.kind!r} on GPUs. Choose 'flat' or another, or set "
                "index.device to cpu."
            ) from None

    @cached_property
    def _resources(self) -> Any:
        """Of the GPU, for all indexes of the shard: each set of resources takes memory of its own."""
        return faiss.StandardGpuResources()


def require_gpu() -> None:
    """Refuse a FAISS that sees no GPU here.

    Raises:
        UserError: it is built without, or there is none.
    """
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise UserError(
            "index.device: cuda was asked for, but this FAISS sees no GPU. "
            "Install the extra `gpu` instead of `cpu` on a machine with one, or set index.device to cpu."
        )


@contextmanager
def _fitting(rows: int, width: int) -> Iterator[None]:
    """A clear error where vectors do not fit into the memory of the GPU."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise UserError(
            f"index.shards: {rows:,} vectors of {width} numbers do not fit into the memory of the GPU. "
            f"{ROOMIER} Where shards share a GPU, raise index.gpus_per_shard; or set index.device to cpu."
        ) from None


def _cut(rows: int, number: int, of: int, block: int) -> tuple[int, int]:
    """Piece `number` of `of` of some rows, in whole blocks: first, and behind the last."""
    blocks = -(-rows // block)
    return min(block * (blocks * number // of), rows), min(block * (blocks * (number + 1) // of), rows)


def made(kind: str, width: int) -> Any:
    """An empty index by FAISS factory string.

    Raises:
        UserError: if FAISS refuses the string.
    """
    try:
        return faiss.index_factory(width, "Flat" if kind == "flat" else kind)
    except RuntimeError as error:
        raise UserError(f"index.kind: FAISS refuses {kind!r}: {_reason(error)}") from None


def write(index: Any, path: Path) -> None:
    """Write an index to the local disk; FAISS alone does not tell when the last bytes found no room.

    Raises:
        OSError: no room; RuntimeError of FAISS's if it is missing early.
    """
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def fewest(index: Any) -> int:
    """How many vectors an empty index takes at least to be trained.

    As many as it has clusters, of vectors or of parts of them, or as a projection keeps dimensions.
    """
    found: Any = faiss.downcast_index(index)  # lives as long as the index it is a view of
    inside = [fewest(getattr(found, name)) for name in ("index", "base_index") if hasattr(found, name)]
    own = [getattr(found, "nlist", 1), found.pq.ksub if hasattr(found, "pq") else 1]
    for number in range(found.chain.size() if hasattr(found, "chain") else 0):
        step = faiss.downcast_VectorTransform(found.chain.at(number))
        own += [step.d_out] if isinstance(step, faiss.PCAMatrix) else []
        own += [_OPQ] if isinstance(step, faiss.OPQMatrix) else []
    return max(*own, *inside)


def _reason(error: RuntimeError) -> str:
    return str(error).rpartition("Error: ")[2] or str(error)
