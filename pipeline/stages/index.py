"""Nearest neighbours in banks of training vectors: FAISS in actors, each holding a range of every bank.

Neighbours are merged in shard order, ties by row, so any number of shards gives the result of one index.
Their distances are then computed again in float64 from the stored vectors: FAISS' own come from
‖a‖² + ‖b‖² - 2ab in float32, which loses the small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cluster.engine import Actor, Engine
from pipeline.columns import Float
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.workspace import files, storage
from pipeline.workspace.artifacts import Artifact, Damaged, Record, Store, mend, name_of, opened, write

try:
    import faiss
except ModuleNotFoundError:
    raise UserError(
        "FAISS is not installed. Install exactly one build of it: pip install 'ood-pipeline[cpu]' or, on a "
        "machine with a GPU, 'ood-pipeline[gpu]'."
    ) from None

FORMAT = "index 1"
"""Kind and version of what trained indexes are kept as."""

_FILE = "index.faiss"

AUTO_SHARD_BYTES = 8 * 2**30
"""With `shards: auto` a shard holds at most this much."""

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class BankFiles:
    """A bank in the workspace: .npy pieces in row order."""

    folder: str
    content: str
    """Digest of all bytes."""
    pieces: tuple[tuple[str, int, str], ...]
    """Name, vectors and SHA-256 of each."""
    width: int

    @classmethod
    def of(cls, artifact: Artifact, record: Record) -> BankFiles:
        """The files of a complete bank."""
        pieces = [(name, file.facts["rows"], file.sha256) for name, file in record.files.items()]
        width = next(iter(record.files.values())).facts["width"]
        return cls(str(artifact.folder), record.content, tuple(pieces), width)

    @property
    def name(self) -> str:
        """The name of the artifact."""
        return name_of(files.at(self.folder))

    @property
    def rows(self) -> int:
        """Vectors in the bank."""
        return sum(count for _, count, _ in self.pieces)

    def ranges(self, start: int, stop: int) -> Iterator[Vectors]:
        """Vectors [start, stop), memory-mapped, in the pieces they lie in; only these are opened.

        Raises:
            Damaged: a piece that is not what was written.
        """
        folder, offset = files.at(self.folder), 0
        for name, count, sha256 in self.pieces:
            first, last = max(start - offset, 0), min(stop - offset, count)
            if first < last:
                with opened(folder / name, sha256) as file:
                    piece = np.load(file, mmap_mode="r")
                yield piece[first:last]
            offset += count


@dataclass(frozen=True)
class Neighbours:
    """Neighbours of a batch of queries, nearest first by `rank`."""

    rank: NDArray[np.float32]
    """(N, k) the distance FAISS ordered by; inf where it found none."""
    row: Ids
    """(N, k) rows of the bank; -1 where it found none."""
    distance: Float
    """(N, k) Euclidean distance in float64."""


def merge(found: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest of several shards, ties in the order of the shards."""
    rank = np.concatenate([part.rank for part in found], axis=1)
    order = np.argsort(rank, axis=1, kind="stable")[:, :k]
    columns = {
        name: np.take_along_axis(
            np.concatenate([getattr(part, name) for part in found], axis=1), order, axis=1
        )
        for name in ("rank", "row", "distance")
    }
    return Neighbours(**columns)


def exact_distance(queries: Vectors, vectors: Vectors, row: Ids) -> Float:
    """Euclidean distances in float64 of queries to some vectors each, a few queries at a time.

    Args:
        queries: (N, width) float32.
        vectors: (rows, width) float32.
        row: (N, k) int.

    Returns:
        (N, k) float64.
    """
    distance = np.empty(row.shape)
    for start in range(0, len(queries), 8):  # blocks that stay in the cache: 3 times as fast as one
        some = slice(start, start + 8)
        difference = vectors[row[some]].astype(np.float64)
        difference -= queries[some, None]
        distance[some] = np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))
    return distance


class IndexShard:
    """One range of rows of every bank. Not an actor itself; `start` makes actors of it.

    An index is loaded from the workspace when it is first needed: an actor that was started again, perhaps
    on another node, goes on where the old one was.
    """

    def __init__(
        self, number: int, of: int, settings: schema.Index, banks: Mapping[str, BankFiles], threads: int = 1
    ) -> None:
        self.number, self.of, self.settings = number, of, settings
        self.banks = banks
        """By folder, which is what they are asked for by."""
        self.source: dict[str, Any] = {}
        self.indexes: dict[str, Any] = {}
        self.vectors: dict[str, Vectors] = {}
        self.offset: dict[str, int] = {}
        faiss.omp_set_num_threads(threads)

    def load(self, folder: str) -> None:
        """Build or read back the index of this shard's rows of a bank; nothing if it is there.

        Raises:
            UserError: GPU asked for but not in this build of FAISS, or a factory string it refuses.
        """
        if folder in self.indexes:
            return
        bank = self.banks[folder]
        start = bank.rows * self.number // self.of
        stop = bank.rows * (self.number + 1) // self.of
        self.offset[folder] = start
        if self.settings.kind == "flat":
            index = faiss.IndexFlatL2(bank.width)
            for piece in bank.ranges(start, stop):
                index.add(np.ascontiguousarray(piece))
            stored = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * bank.width)
            self.vectors[folder] = stored.reshape(index.ntotal, bank.width)
        else:
            self.vectors[folder] = np.concatenate(list(bank.ranges(start, stop)))
            index = self._trained(bank, self.vectors[folder])
        self.source[folder] = index
        self.indexes[folder] = self._on_device(index)

    def search(self, folder: str, queries: Vectors, k: int, exact: bool = False) -> Neighbours:
        """The k nearest vectors of this shard for (N, width) float32 queries."""
        self.load(folder)
        vectors = self.vectors[folder]
        if exact:
            rank, row = faiss.knn(queries, vectors, min(k, len(vectors)))
        else:
            rank, row = self.indexes[folder].search(queries, min(k, len(vectors)))
        found = row >= 0
        distance = exact_distance(queries, vectors, np.where(found, row, 0))
        return Neighbours(
            rank=np.where(found, rank, np.inf).astype(np.float32),
            row=np.where(found, row + self.offset[folder], -1),
            distance=np.where(found, distance, np.inf),
        )

    def _trained(self, bank: BankFiles, vectors: Vectors) -> Any:
        """An index by factory string, trained once and kept in the workspace."""
        artifact = kept(bank, self.settings.kind, self.number, self.of)
        record = Store(files.at(storage.parent(bank.folder))).ready(artifact)
        if record is not None:
            try:
                with opened(artifact.folder / _FILE, record.files[_FILE].sha256) as file:
                    return faiss.read_index(str(file))
            except Damaged as damaged:
                mend(damaged)
        index = made(self.settings.kind, bank.width)
        try:
            index.train(vectors)
            index.add(vectors)
        except RuntimeError as error:
            raise UserError(
                f"index.kind: {self.settings.kind!r} cannot be trained: {_reason(error)}"
            ) from None
        written = write(artifact.folder / _FILE, lambda path: faiss.write_index(index, str(path)))
        artifact.finish({_FILE: written}, alone=False)  # another run may be at the same
        return index

    def _on_device(self, index: Any) -> Any:
        if device(self.settings) == "cpu":
            return index
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            raise UserError(
                "index.device: cuda was asked for, but this FAISS sees no GPU. "
                "Install the extra `gpu` instead of `cpu` on a machine with one, or set index.device to cpu."
            )
        try:
            return faiss.index_cpu_to_gpu(self._resources, 0, index)
        except RuntimeError as error:
            if "not implemented on GPU" in str(error):
                raise UserError(
                    f"index.kind: FAISS has no {self.settings.kind!r} on GPUs. Choose 'flat' or another, or "
                    "set index.device to cpu."
                ) from None
            if "out of memory" not in str(error):
                raise
            raise UserError(
                f"index.shards: {index.ntotal:,} vectors of {index.d} numbers do not fit into the memory of "
                "the GPU. Raise it, or index.gpus_per_shard where shards share a GPU; or set index.device to "
                "cpu."
            ) from None

    @cached_property
    def _resources(self) -> Any:
        """Of the GPU, for all indexes of the shard: each set of resources takes memory of its own."""
        return faiss.StandardGpuResources()


def kept(bank: BankFiles, kind: str, number: int, of: int) -> Artifact:
    """The artifact of a shard's trained index of a bank."""
    identity = {"bank": bank.name, "kind": kind, "shard": [number, of]}
    return Store(files.at(storage.parent(bank.folder))).artifact(FORMAT, identity, {bank.name: bank.content})


def made(kind: str, width: int) -> Any:
    """An empty index by FAISS factory string.

    Raises:
        UserError: if FAISS refuses the string.
    """
    try:
        return faiss.index_factory(width, "Flat" if kind == "flat" else kind)
    except RuntimeError as error:
        raise UserError(f"index.kind: FAISS refuses {kind!r}: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    return str(error).rpartition("Error: ")[2] or str(error)


def device(settings: schema.Index) -> str:
    """'cpu' or 'cuda', decided by the config alone."""
    if settings.device == "auto":
        return "cuda" if settings.gpus_per_shard > 0 else "cpu"
    return settings.device


@dataclass(frozen=True)
class Index:
    """Handles of the shard actors; travels to the tasks that search."""

    shards: tuple[Actor, ...]
    flat: bool
    """Whether every search is exhaustive; the first of k neighbours are then those of a smaller k."""

    def search(self, folder: str, queries: Vectors, k: int, exact: bool = False) -> Neighbours:
        """The k nearest vectors of a bank.

        Args:
            folder: of the bank that is searched.
            queries: (N, width) float32; keep N fixed for reproducible bits.
            k: how many.
            exact: by exhaustive search, whatever the index is.
        """
        return self.ask(folder, queries, k, exact)()

    def ask(self, folder: str, queries: Vectors, k: int, exact: bool = False) -> Callable[[], Neighbours]:
        """Begin a search; what comes back waits for its result."""
        found = [shard.ask("search", folder, queries, k, exact) for shard in self.shards]
        return lambda: merge([part() for part in found], k)

    def stop(self) -> None:
        """End the actors and report what they cost."""
        for shard in self.shards:
            shard.stop()


def start(
    engine: Engine, files: Iterable[BankFiles], settings: schema.Index, others: Iterable[BankFiles] = ()
) -> Index:
    """Start the shard actors and load every bank into them, once however many detectors search it.

    Args:
        engine: does the work.
        files: the banks that are searched.
        settings: of the index.
        others: banks of the run that need not be searched now, but count where shards are sized.
    """
    banks = {bank.folder: bank for bank in files}
    sized = banks | {bank.folder: bank for bank in others}
    size = sum(bank.rows * bank.width * 4 for bank in sized.values())
    count = max(1, -(-size // AUTO_SHARD_BYTES)) if settings.shards == "auto" else settings.shards
    smallest = min(bank.rows for bank in banks.values())
    if count > smallest:
        raise UserError(f"index.shards is {count} but the smallest bank has {smallest} rows; lower it.")
    engine.capacity(settings.needs, "index")
    if not engine.holds(settings.needs, count, spare=1):
        raise UserError(
            f"index.shards: {count} shards of {settings.cpus_per_shard:g} CPU and "
            f"{settings.gpus_per_shard:g} GPU leave no CPU for scoring on this cluster. "
            "Lower shards or cpus_per_shard, or add nodes."
        )
    needs, threads = settings.needs, engine.threads(settings.needs)
    index = Index(
        tuple(
            engine.start(IndexShard, needs, number, count, settings, banks, threads, spread=True)
            for number in range(count)
        ),
        settings.kind == "flat",
    )
    try:
        for folder in banks:
            for loaded in [shard.ask("load", folder) for shard in index.shards]:
                loaded()
    except BaseException:
        index.stop()
        raise
    return index


def recall(index: Index, folder: str, queries: Vectors) -> float:
    """Share of queries whose nearest neighbour is the exact one (equal distances count)."""
    found = index.search(folder, queries, 1).distance[:, 0]
    exact = index.search(folder, queries, 1, exact=True).distance[:, 0]
    return float(np.mean(found <= exact))
