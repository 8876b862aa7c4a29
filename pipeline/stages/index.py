"""Nearest neighbours in banks of training vectors: FAISS in actors, each holding a range of every bank.

Small banks are held by every process that scores instead: it then waits for nobody.

Neighbours are merged in shard order, ties by row, so any number of shards gives the result of one index.
Exact distances are computed of those alone that are left, and that a detector reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipeline.cluster.engine import Actor, Engine, Pending, Shared
from pipeline.columns import Float, Mask
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.stages import memory
from pipeline.workspace import files, storage
from pipeline.workspace.artifacts import Artifact, File, Record, Store, name_of, opened

_log = logging.getLogger(__name__)

FORMAT = "index 1"
"""Kind and version of what trained indexes are kept as."""

FILE = "index.faiss"
"""What a trained index is kept in."""

AUTO_SHARD_BYTES = 8 * 2**30
"""With `shards: auto` a shard holds about this much at most; a flat one more where no more have room."""

AUTO_SHARD_OPERATIONS, AUTO_SHARDS = 10**8, 16
"""With `shards: auto` a flat shard has about so much to compute for a query, if CPUs or GPUs are there.

There are no more than 16 for it, on GPUs neither: whoever scores holds and sorts k neighbours of a query from
each. With k = 1000 a batch from 8 takes 0.2 s, from 16 it takes 0.5 s and from 64 it takes 3 s.
"""

AUTO_COPIED_BYTES = 2**26
"""With `shards: auto` flat banks of at most this much are held by each process that scores."""

ROOMIER = (
    "Raise index.shards where there are nodes or GPUs for more, choose an index.kind that holds less "
    "('SQfp16' a half, 'IVF4096,SQ8' a quarter), or add memory."
)
"""What to do where vectors do not fit."""

_FLAT, _TRAINED = 1.1, 1.5
"""What a shard takes over the bytes of its vectors, at most: measured 1.0, and a file of 8,192 of them.

Trained ones were 1.0 with `IVF16,Flat`, 0.5 with `SQfp16`, 0.25 with `IVF16,SQ8`; graphs take more.
"""

_COPIED = 2
"""The same of a bank in one piece: the vectors and the file they are read from; measured 1.9 to 2."""

_MOST_ON_GPU = 2048
"""Neighbours of a query that FAISS finds on a GPU; those with cuVS find more, which is not relied on."""

_SCORING = 120
"""Operations that all detectors take for a row besides, over D²; measured with D = 2048 and C = 1000."""

Vectors = NDArray[np.float32]
Ids = NDArray[np.int32]
Sizes = Sequence[tuple[int, int]]
"""Vectors, and numbers in each, of banks."""


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

    def read(self, start: int, stop: int) -> Vectors:
        """Vectors [start, stop), in memory that is allocated once.

        Raises:
            UserError: there is not so much memory.
            Damaged: a piece that is not what was written.
        """
        try:
            vectors = np.empty((stop - start, self.width), np.float32)
        except MemoryError:
            raise UserError(
                f"index.shards: {stop - start:,} vectors of {self.width} numbers do not fit into the memory "
                f"of the node. {ROOMIER}"
            ) from None
        place = 0
        for piece in self.ranges(start, stop):
            vectors[place : place + len(piece)] = piece
            place += len(piece)
        return vectors


@dataclass(frozen=True)
class Neighbours:
    """Neighbours of a batch of queries, nearest first by `rank`."""

    rank: NDArray[np.float32]
    """(N, k) the distance FAISS ordered by; inf where it found none."""
    row: Ids
    """(N, k) rows of the bank; -1 where it found none."""


@dataclass(frozen=True)
class Distances:
    """Distances to those of some rows that lie in one shard: no others travel."""

    start: int
    """First row of the bank in the shard."""
    stop: int
    """Behind the last."""
    value: Float
    """(M,) in the order of the rows."""

    def of(self, row: Ids) -> Mask:
        """(N, m) bool, which of the rows they are for."""
        mask: Mask = (row >= self.start) & (row < self.stop)
        return mask


def merge(found: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest of several shards, ties in the order of the shards."""
    if len(found) == 1:
        return found[0]
    rank, row = (np.concatenate([getattr(part, name) for part in found], axis=1) for name in ("rank", "row"))
    order = np.argsort(rank, axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(rank, order, axis=1), np.take_along_axis(row, order, axis=1))


@dataclass(frozen=True)
class Search:
    """A search that is under way in all shards."""

    shards: tuple[Actor, ...]
    folder: str
    queries: Shared[Vectors]
    k: int
    found: tuple[Pending, ...]

    @cached_property
    def neighbours(self) -> Neighbours:
        """The k nearest of each query; waits for them."""
        return merge([part() for part in self.found], self.k)

    def distance(self, columns: slice) -> Float:
        """Euclidean float64 distances to some of the k neighbours, by their place; inf where there is none.

        Args:
            columns: which of the k, of m.

        Returns:
            (N, m) float64.
        """
        row = self.neighbours.row[:, columns]
        distance = np.full(row.shape, np.inf)
        for part in [shard.ask("distance", self.folder, self.queries, row) for shard in self.shards]:
            found: Distances = part()
            distance[found.of(row)] = found.value
        return distance


def kept(bank: BankFiles, kind: str, number: int, of: int) -> Artifact:
    """The artifact of a shard's trained index of a bank."""
    identity = {"bank": bank.name, "kind": kind, "shard": [number, of]}
    return Store(files.at(storage.parent(bank.folder))).artifact(FORMAT, identity, {bank.name: bank.content})


def check(kind: str, width: int) -> None:
    """Whether there is FAISS, and it knows a kind of index.

    Raises:
        UserError: FAISS is not installed, or refuses the string.
    """
    _require_installed()
    if kind != "flat":
        from pipeline.stages.faiss_shard import made

        made(kind, width)


def _require_installed() -> None:
    if find_spec("faiss") is None:
        raise UserError(
            "FAISS is not installed. Install exactly one build of it: pip install 'ood-pipeline[cpu]' or, on "
            "a machine with a GPU, 'ood-pipeline[gpu]'."
        )


def check_k(label: str, k: int, rows: int, settings: schema.Index) -> None:
    """Whether a shard of a bank of so many vectors can look up k neighbours of a query.

    Raises:
        UserError: if a GPU is to look up more than FAISS can there.
    """
    shards = 1 if settings.shards == "auto" else settings.shards
    if device(settings) == "cuda" and min(k, -(-rows // shards)) > _MOST_ON_GPU:
        raise UserError(
            f"detectors.{label}.k is {k:,}, but FAISS looks up {_MOST_ON_GPU:,} neighbours at most on a GPU. "
            "Lower k, or search on CPUs: set index.device to cpu and index.gpus_per_shard to 0."
        )


def check_rows(settings: schema.Index, width: int, rows: int) -> None:
    """Whether each shard of a bank of so many vectors has one at least, and enough to train its index.

    Raises:
        UserError: if one has too few.
    """
    if settings.shards != "auto":
        _check_shards(settings.shards, rows)
    if settings.kind == "flat":
        return
    from pipeline.stages.faiss_shard import fewest, made

    shards = 1 if settings.shards == "auto" else settings.shards
    least, each = fewest(made(settings.kind, width)), rows // shards
    if least > each:
        raise UserError(
            f"index.kind: {settings.kind!r} takes {least:,} vectors to be trained, but {rows:,} training "
            f"images in {shards} shards are {each:,} each. Choose one with fewer clusters, or 'flat'; or "
            "lower index.shards."
        )


def device(settings: schema.Index) -> str:
    """'cpu' or 'cuda', decided by the config alone."""
    if settings.device == "auto":
        return "cuda" if settings.gpus_per_shard > 0 else "cpu"
    return settings.device


@dataclass(frozen=True)
class Index:
    """Handles of the shards; travels to the tasks that search."""

    shards: tuple[Actor, ...]
    flat: bool
    """Whether every search is exhaustive; the first of k neighbours are then those of a smaller k."""
    holds: tuple[int, ...] = ()
    """Bytes that each shard may hold that is an actor."""
    copied: int = 0
    """Bytes that whoever searches may hold where there are no actors."""

    def search(self, folder: str, queries: Vectors, k: int, exact: bool = False) -> Search:
        """Begin to look for the k nearest vectors of a bank.

        Args:
            folder: of the bank that is searched.
            queries: (N, width) float32; keep N fixed for reproducible bits.
            k: how many.
            exact: by exhaustive search, whatever the index is.
        """
        sent = self.shards[0].send(queries)
        found = [shard.ask("search", folder, sent, k, exact) for shard in self.shards]
        return Search(self.shards, folder, sent, k, tuple(found))

    def stop(self) -> None:
        """End the actors and report what they cost."""
        for shard in self.shards:
            shard.stop()


def sizes_of(banks: Iterable[BankFiles]) -> Sizes:
    """Of the banks, each once."""
    return [(bank.rows, bank.width) for bank in {bank.folder: bank for bank in banks}.values()]


def shards_of(engine: Engine, sizes: Sizes, settings: schema.Index) -> int:
    """How many shards hold all banks of a run.

    Args:
        engine: where they are to be.
        sizes: of the banks.
        settings: of the index.

    Raises:
        UserError: if there are more of them than vectors in a bank, or no machine has what one needs.
    """
    if settings.shards != "auto":
        _check_shards(settings.shards, min(rows for rows, _ in sizes))
        return settings.shards
    numbers = sum(rows * width for rows, width in sizes)
    least = max(1, -(-4 * numbers // AUTO_SHARD_BYTES))
    if settings.kind != "flat":
        return least  # what is found depends on how many were trained
    room = busy = engine.capacity(settings.needs, "index", spare=1)
    if device(settings) == "cpu":  # score tasks get their share of the CPUs
        besides = _SCORING * max(width for _, width in sizes) ** 2
        searching = engine.cpus() * 2 * numbers / (2 * numbers + besides)
        busy = ceil(searching / engine.threads(settings.needs))
    return min(room, max(least, min(-(-2 * numbers // AUTO_SHARD_OPERATIONS), busy, AUTO_SHARDS)))


def _check_shards(shards: int, rows: int) -> None:
    """Refuse more shards than the smallest bank has vectors."""
    if shards > rows:
        raise UserError(f"index.shards is {shards} but the smallest bank has {rows} rows; lower it.")


def require(engine: Engine, sizes: Sizes, settings: schema.Index) -> None:
    """Whether banks that are still to be made can be searched; on GPUs, one worker is asked.

    Args:
        engine: where the shards are to be.
        sizes: of the banks, at most.
        settings: of the index.

    Raises:
        UserError: there is no room for the shards; or FAISS sees no GPU where one of them can be.
    """
    if not sizes or _is_small(sizes, settings):
        return
    count = shards_of(engine, sizes, settings)
    room = engine.capacity(settings.needs, "index", spare=1)
    if count > room and settings.shards == "auto":  # of a trained kind, of which banks may take fewer
        _log.warning(
            "index.shards: up to %d will be needed, this cluster has room for %d; say how many: index.shards",
            *(count, room),
        )
        count = room
    _require_room(engine, count, settings)
    _tell_of_memory(engine, sizes, count, settings)
    if device(settings) == "cuda":
        looking = engine.pool(_Sight, settings.needs, 1)
        try:
            list(looking.each("require_gpu", [()]))
        finally:
            looking.stop()


class _Sight:
    """Looks, in a worker like those of the shards, whether FAISS sees a GPU."""

    def require_gpu(self) -> None:
        """Refuse a FAISS that is not there or sees none.

        Raises:
            UserError: either.
        """
        _require_installed()
        from pipeline.stages.faiss_shard import require_gpu

        require_gpu()


def _require_room(engine: Engine, count: int, settings: schema.Index) -> None:
    """Refuse shards that cannot be there at once."""
    room = engine.capacity(settings.needs, "index", spare=1)
    if engine.holds(settings.needs, count, spare=1):
        return
    raise UserError(
        f"index.shards: {count} shards of {settings.cpus_per_shard:g} CPU and "
        f"{settings.gpus_per_shard:g} GPU each find no room beside a CPU for scoring; this cluster has room "
        f"for {room}. Set index.shards to that or fewer, lower index.cpus_per_shard or gpus_per_shard, or "
        "add nodes."
    )


def _tell_of_memory(engine: Engine, sizes: Sizes, count: int, settings: schema.Index) -> None:
    """Say that the shards of a node may hold more than it has."""
    there = [node["resources"] for node in engine.nodes().values()]
    nodes = [
        node.get("memory", 0)
        for node in there
        if all(node.get(name, 0) >= amount for name, amount in settings.needs.items())
    ]
    held = _shard_bytes(sizes, count, settings) * -(-count // max(len(nodes), 1))
    if nodes and 0 < max(nodes) < held:
        _log.warning(
            "index.shards: those of a node may hold %.1f GiB, the largest node has %.1f GiB for work. %s",
            *(held / 2**30, max(nodes) / 2**30, ROOMIER),
        )


def trained(
    engine: Engine, store: Store, banks: Iterable[BankFiles], settings: schema.Index
) -> dict[str, dict[str, str]]:
    """Train the indexes of banks that are not there yet, one for each shard; a flat one is not trained.

    Args:
        engine: does the work.
        store: where they are kept, beside the banks.
        banks: all of the run.
        settings: of the index.

    Returns:
        Content digests of the indexes of each bank, by their names, by the bank's folder.

    Raises:
        UserError: FAISS cannot train such an index; or it is not there and this command may not make it.
    """
    found = {bank.folder: bank for bank in banks}
    if settings.kind == "flat" or not found:
        return {}
    count = shards_of(engine, sizes_of(found.values()), settings)
    indexes = {
        folder: [kept(bank, settings.kind, number, count) for number in range(count)]
        for folder, bank in found.items()
    }

    def make(names: set[str]) -> None:
        index = _started(engine, found, count, settings)
        try:
            for folder, artifacts in indexes.items():
                made = [
                    (artifact, _made(artifact, shard, folder))
                    for artifact, shard in zip(artifacts, index.shards, strict=True)
                    if artifact.name in names
                ]
                for artifact, files_of in made:
                    artifact.finish(files_of())
        finally:
            index.stop()

    records = iter(store.shared([each for artifacts in indexes.values() for each in artifacts], make))
    return {
        folder: {artifact.name: next(records).content for artifact in artifacts}
        for folder, artifacts in indexes.items()
    }


def _made(artifact: Artifact, shard: Actor, folder: str) -> Callable[[], Mapping[str, File]]:
    """The files of a trained index: those that a killed run left whole, or what its shard begins to train."""
    if done := artifact.begin():
        return lambda: done
    train = shard.ask("train", folder, str(artifact.folder / FILE))
    return lambda: {FILE: train()}


def start(
    engine: Engine, files: Iterable[BankFiles], settings: schema.Index, others: Iterable[BankFiles] = ()
) -> Index:
    """Start the shard actors and load every bank into them, once however many detectors search it.

    There are none where all banks are small: who searches then loads them itself.

    Args:
        engine: does the work.
        files: the banks that are searched; trained indexes of them are there.
        settings: of the index.
        others: banks of the run that need not be searched now, but count where shards are sized.
    """
    banks = {bank.folder: bank for bank in files}
    known = sizes_of([*banks.values(), *others])
    if _is_small(known, settings):
        from pipeline.stages.faiss_shard import IndexShard

        shard = engine.copied(IndexShard, 0, 1, settings, banks)
        return Index((shard,), True, copied=_COPIED * sum(_bytes(sizes_of(banks.values()), 1)))
    index = _started(engine, banks, shards_of(engine, known, settings), settings)
    try:
        for folder in banks:
            for loaded in [shard.ask("load", folder) for shard in index.shards]:
                loaded()
    except BaseException:
        index.stop()
        raise
    return index


def _is_small(sizes: Sizes, settings: schema.Index) -> bool:
    """Whether each process that scores may hold all banks, and nobody asked where they are to lie."""
    placed = settings.shards != "auto" or settings.needs != schema.Index().needs
    if placed or settings.kind != "flat" or device(settings) != "cpu":
        return False
    return sum(_bytes(sizes, 1)) <= AUTO_COPIED_BYTES


def here(banks: Iterable[BankFiles], settings: schema.Index) -> Index:
    """All shards in this process, loaded, without an engine; each may use all CPUs.

    Args:
        banks: those that are searched.
        settings: of the index; an approximate one has as many shards as were trained.
    """
    from pipeline.cluster.inline import Object, cpus
    from pipeline.stages.faiss_shard import IndexShard

    found = {bank.folder: bank for bank in banks}
    count = 1 if settings.shards == "auto" else settings.shards
    shards = tuple(Object(IndexShard(number, count, settings, found, cpus())) for number in range(count))
    for shard in shards:
        for folder in found:
            shard.target.load(folder)
    return Index(shards, settings.kind == "flat")


def _started(engine: Engine, banks: Mapping[str, BankFiles], count: int, settings: schema.Index) -> Index:
    """The shard actors, empty."""
    _require_room(engine, count, settings)
    from pipeline.stages.faiss_shard import IndexShard  # FAISS is for runs that search

    _tell_of_memory(engine, sizes_of(banks.values()), count, settings)
    needs, threads = settings.needs, engine.threads(settings.needs)
    return Index(
        engine.gang(
            IndexShard, needs, [(number, count, settings, banks, threads) for number in range(count)]
        ),
        settings.kind == "flat",
        (_shard_bytes(sizes_of(banks.values()), count, settings),) * count,
    )


def _shard_bytes(sizes: Sizes, count: int, settings: schema.Index) -> int:
    """Bytes that the actor of one of so many shards may hold, what is read from files beside it included.

    What a GPU is to hold, an actor has until it is there, one bank after the other.
    """
    held = _bytes(sizes, count)
    there = max(held) if device(settings) == "cuda" else sum(held)
    return memory.PROCESS + int((_FLAT if settings.kind == "flat" else _TRAINED) * there)


def _bytes(sizes: Sizes, count: int) -> list[int]:
    """Bytes of the vectors of each bank in one of so many shards."""
    return [4 * -(-rows // count) * width for rows, width in sizes]


def recall(index: Index, folder: str, queries: Vectors) -> float:
    """Share of queries whose nearest neighbour is the exact one (equal distances count)."""
    nearest = slice(1)
    found = index.search(folder, queries, 1).distance(nearest)
    exact = index.search(folder, queries, 1, exact=True).distance(nearest)
    return float(np.mean(found <= exact))
