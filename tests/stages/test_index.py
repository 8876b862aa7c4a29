from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.cluster.engine import opened
from pipeline.cluster.inline import Inline, Object
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.stages import faiss_shard, index
from pipeline.stages.faiss_shard import IndexShard, Mapped
from pipeline.stages.index import BankFiles, Neighbours
from pipeline.workspace.artifacts import Damaged, Store, mend, write_part
from tests.damage import DAMAGES, flipped

FLAT = schema.Index()


def bank(folder: Path, vectors: np.ndarray, pieces: int = 3) -> BankFiles:
    """The vectors as a bank on disk."""
    artifact = Store(folder / "fits").artifact("bank 1", {"rows": len(vectors)})
    made = {}
    for number, part in enumerate(np.array_split(vectors.astype(np.float32), pieces)):
        name = f"bank-{number:05d}.npy"
        made[name] = write_part(artifact.folder / name, saved_npy(part), rows=len(part), width=part.shape[1])
    return BankFiles.of(artifact, artifact.finish(made))


def saved_npy(vectors: np.ndarray) -> Callable[[Path], None]:
    """A function that writes them to a path."""

    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.save(stream, vectors)

    return save


def shards(files: BankFiles, of: int, **settings: object) -> list[IndexShard]:
    """Shards with the index of a bank, which is trained first where it has to be."""
    banks, chosen = {files.folder: files}, schema.Index(**settings)
    train(files, shards=of, **settings)
    found = [IndexShard(number, of, chosen, banks) for number in range(of)]
    for shard in found:
        shard.load(files.folder)
    return found


def train(files: BankFiles, **settings: object) -> dict[str, str]:
    """Content digests of the trained indexes of a bank, by name."""
    with opened("inline", threads=1) as engine:
        store = Store(Path(files.folder).parent)
        return index.trained(engine, store, [files], schema.Index(**settings)).get(files.folder, {})


@dataclass(frozen=True)
class Found(Neighbours):
    """Neighbours and the distances to all of them."""

    distance: np.ndarray


def begun(found: list[IndexShard], queries: np.ndarray, k: int, exact: bool = False) -> index.Search:
    (folder,) = found[0].banks
    return index.Index(tuple(map(Object, found)), flat=True).search(folder, queries, k, exact)


def search(found: list[IndexShard], queries: np.ndarray, k: int, exact: bool = False) -> Found:
    searched = begun(found, queries, k, exact)
    return Found(searched.neighbours.rank, searched.neighbours.row, searched.distance(slice(None)))


def exact_distance(queries: np.ndarray, vectors: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(N, k) float64 distances of queries to k rows each."""
    query = np.indices(row.shape)[0]
    return faiss_shard.exact_distance(queries, vectors, query.ravel(), row.ravel()).reshape(row.shape)


@pytest.fixture
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    some = rng.normal(size=(400, 24)).astype(np.float32)
    return np.concatenate([some, some[:50]])  # every tie is real


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_any_number_of_shards_gives_the_result_of_one_flat_index(tmp_path, vectors, queries, of) -> None:
    files = bank(tmp_path, vectors)
    flat = faiss.IndexFlatL2(24)
    flat.add(vectors)
    rank, row = flat.search(queries, 9)
    found = search(shards(files, of), queries, 9)
    np.testing.assert_array_equal(found.rank, rank)
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_array_equal(found.distance, exact_distance(queries, vectors, row))


def test_any_number_of_shards_and_threads_gives_the_same_bits(tmp_path) -> None:
    """Ranks in float32 depend on where a vector stands in its block of a matrix product."""
    rng = np.random.default_rng(5)
    some, asked = (rng.normal(size=(rows, 2049)).astype(np.float32) for rows in (2300, 100))
    files = bank(tmp_path, np.concatenate([some, some[:300]]))  # these ties are real
    one = begun(shards(files, 1), asked, 2000).neighbours
    for of, threads in ((1, 2), (2, 1), (3, 2), (6, 1)):
        found = [IndexShard(number, of, FLAT, {files.folder: files}, threads) for number in range(of)]
        many = begun(found, asked, 2000).neighbours
        for name in ("rank", "row"):
            np.testing.assert_array_equal(getattr(many, name), getattr(one, name))


def test_only_the_distances_that_are_read_are_computed(tmp_path, vectors, queries, monkeypatch) -> None:
    pairs: list[int] = []
    compute = faiss_shard.exact_distance
    monkeypatch.setattr(
        faiss_shard, "exact_distance", lambda *given: (pairs.append(len(given[3])), compute(*given))[1]
    )
    files = bank(tmp_path, vectors)
    searched = begun(shards(files, 1), queries, 9)
    every = searched.distance(slice(None))
    np.testing.assert_array_equal(searched.distance(slice(6, 7)), every[:, 6:7])
    assert pairs == [64 * 9, 64]


def test_each_shard_sends_the_distances_to_its_own_vectors_alone(tmp_path) -> None:
    rng = np.random.default_rng(3)
    vectors, asked = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (3 * faiss_shard.BLOCK, 20))
    files = bank(tmp_path, vectors)
    found = shards(files, 3)
    row = begun(found, asked, 7).neighbours.row
    row[0, 0] = -1
    sent = [Object(shard).ask("distance", files.folder, Object(shard).send(asked), row)() for shard in found]
    assert [len(each.value) for each in sent] == [
        (row // faiss_shard.BLOCK == number).sum() for number in range(3)
    ]


def test_distances_are_exact_where_faiss_own_are_lost(tmp_path) -> None:
    rng = np.random.default_rng(2)
    vectors = (rng.normal(size=(100, 16)) * 1e-4 + 10).astype(np.float32)
    queries = vectors[:32] + np.float32(1e-5)
    found = search(shards(bank(tmp_path, vectors), 2), queries, 3)
    every = cdist(queries.astype(np.float64), vectors.astype(np.float64))
    expected = np.take_along_axis(every, found.row, axis=1)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-12)


def test_nearest_distances_equal_brute_force(tmp_path, vectors, queries) -> None:
    every = np.sort(cdist(queries.astype(np.float64), vectors.astype(np.float64)), axis=1)
    found = search(shards(bank(tmp_path, vectors), 3), queries, 5)
    np.testing.assert_allclose(found.distance, every[:, :5], rtol=1e-6)


def test_a_shard_with_fewer_rows_than_k_is_filled_by_the_others(tmp_path, queries) -> None:
    vectors = np.random.default_rng(3).normal(size=(9, 24)).astype(np.float32)
    found = search(shards(bank(tmp_path, vectors), 4), queries, 6)
    every = np.sort(cdist(queries, vectors), axis=1)
    np.testing.assert_allclose(found.distance, every[:, :6], rtol=1e-5)


def test_an_approximate_index_is_kept_on_disk_and_read_back(tmp_path, vectors, queries) -> None:
    files = bank(tmp_path, vectors)
    first = search(shards(files, 2, kind="IVF4,Flat"), queries, 3)
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("fits/*/index.faiss")}
    assert len(saved) == 2
    second = search(shards(files, 2, kind="IVF4,Flat"), queries, 3)
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    np.testing.assert_array_equal(first.row, second.row)
    exact = search(shards(files, 2, kind="IVF4,Flat"), queries, 3, exact=True)
    assert (exact.distance[:, 0] <= first.distance[:, 0]).all()
    assert (exact.distance[:, 0] < first.distance[:, 0]).any()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_file_is_built_again(tmp_path, vectors, queries, caplog, damage) -> None:
    files = bank(tmp_path, vectors)
    before = search(shards(files, 1, kind="IVF4,Flat"), queries, 3)
    path = next(tmp_path.glob("fits/*/index.faiss"))
    content = path.read_bytes()
    path.write_bytes(damage(content))
    try:
        found = shards(files, 1, kind="IVF4,Flat")
    except Damaged as damaged:  # seen when it is read: a run takes it away and trains it again
        mend(damaged)
        found = shards(files, 1, kind="IVF4,Flat")
    after = search(found, queries, 3)
    np.testing.assert_array_equal(before.row, after.row)
    assert path.read_bytes() == content
    assert f"{path} is damaged: " in caplog.text


@pytest.mark.parametrize("kind", ["flat", "IVF4,Flat"])
def test_a_damaged_bank_is_refused(tmp_path, vectors, kind) -> None:
    files = bank(tmp_path, vectors)
    path = Path(files.folder) / "bank-00001.npy"
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(Damaged, match=re.escape(f"{path} is damaged: other bytes than were written")):
        shards(files, 2, kind=kind)


def test_an_index_of_other_vectors_under_the_same_name_is_built_again(tmp_path, vectors) -> None:
    shards(bank(tmp_path, vectors), 1, kind="IVF4,Flat")
    path = next(tmp_path.glob("fits/*/index.faiss"))
    before = path.read_bytes()
    shards(bank(tmp_path, vectors + 1), 1, kind="IVF4,Flat")
    assert path.read_bytes() != before


def test_a_factory_string_that_faiss_refuses_is_a_clear_error(tmp_path, vectors) -> None:
    with pytest.raises(UserError, match=r"index\.kind: FAISS refuses 'Nonsense7'"):
        shards(bank(tmp_path, vectors), 1, kind="Nonsense7")


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="needs a machine without a GPU")
def test_a_gpu_that_this_faiss_does_not_see_is_a_clear_error(tmp_path, vectors) -> None:
    with pytest.raises(UserError, match=r"index\.device: cuda was asked for.*Install the extra `gpu`"):
        shards(bank(tmp_path, vectors), 1, device="cuda")


class Gpu:
    """A build of FAISS for GPUs stands in, which computes on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: bool = False) -> None:
        self.full = full
        """Whether what it is asked for finds no room."""
        self.added: list[int] = []
        """Vectors that came to the GPU by each call."""
        for name in ("StandardGpuResources", "GpuIndexFlatConfig"):
            monkeypatch.setattr(faiss, name, SimpleNamespace, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "GpuIndexFlatL2", self.flat, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", self.cloned, raising=False)

    def flat(self, _: object, width: int, settings: SimpleNamespace) -> SimpleNamespace:
        index = faiss.IndexFlatL2(width)

        def add(vectors: np.ndarray) -> None:
            self.take(len(vectors))
            index.add(vectors)

        assert settings.device == 0
        return SimpleNamespace(add=add, search=self.searching(index))

    def cloned(self, _: object, device: int, index: faiss.Index) -> faiss.Index:
        assert device == 0
        self.take(index.ntotal)
        return SimpleNamespace(search=self.searching(index))

    def searching(self, index: faiss.Index) -> Callable[..., Any]:
        def search(*given: Any) -> Any:
            self.require_room()
            return index.search(*given)

        return search

    def take(self, count: int) -> None:
        self.require_room()
        self.added.append(count)

    def require_room(self) -> None:
        if self.full:
            raise RuntimeError("StandardGpuResources: alloc fail (cudaMalloc error out of memory [2])")


@pytest.mark.parametrize("kind", ["flat", "SQfp16"])
def test_vectors_that_do_not_fit_into_a_gpu_are_a_clear_error(
    tmp_path, vectors, queries, monkeypatch, kind
) -> None:
    """Also where the vectors fit, but not what a search takes beside them."""
    files, gpu = bank(tmp_path, vectors), Gpu(monkeypatch, full=True)
    message = r"index\.shards: 450 vectors of 24 numbers do not fit into the memory of the GPU"
    with pytest.raises(UserError, match=message):
        shards(files, 1, device="cuda", kind=kind)
    gpu.full = False
    found = shards(files, 1, device="cuda", kind=kind)
    gpu.full = True
    with pytest.raises(UserError, match=message):
        search(found, queries, 9)


@pytest.mark.parametrize("kind", ["flat", "SQfp16"])
def test_a_gpu_gets_all_vectors_at_once_and_the_node_keeps_none(
    tmp_path, vectors, queries, monkeypatch, kind
) -> None:
    files = bank(tmp_path, vectors)
    expected = search(shards(files, 1, kind=kind), queries, 9)
    gpu = Gpu(monkeypatch)
    (shard,) = shards(files, 1, kind=kind, device="cuda")
    assert gpu.added == [450]
    mapped = shard.vectors[files.folder]
    assert isinstance(mapped, Mapped)
    assert all(isinstance(piece.base, np.memmap) for piece in mapped.pieces)
    found = search([shard], queries, 9)
    np.testing.assert_array_equal(found.row, expected.row)
    np.testing.assert_array_equal(found.distance, expected.distance)


def test_vectors_in_files_are_those_in_memory(tmp_path, vectors, queries) -> None:
    files = bank(tmp_path, vectors, pieces=4)
    mapped, rows = Mapped(tuple(files.ranges(100, 430))), np.array([329, 0, 0, 12, 13, 126, 238])
    np.testing.assert_array_equal(files.read(100, 430), vectors[100:430])
    assert len(mapped) == 330
    np.testing.assert_array_equal(mapped[rows], vectors[100:430][rows])
    assert mapped[rows[:0]].shape == (0, 24)


def test_vectors_that_do_not_fit_into_memory_are_a_clear_error() -> None:
    files = BankFiles("nowhere", "", (("bank-00000.npy", 2**48, ""),), 24)
    with pytest.raises(UserError, match=r"vectors of 24 numbers do not fit into the memory of the node"):
        files.read(0, files.rows)


def test_vectors_of_16_bits_take_half_and_find_almost_the_same(tmp_path, vectors, queries) -> None:
    files = bank(tmp_path, vectors)
    found = shards(files, 2, kind="SQfp16")
    path = next(tmp_path.glob("fits/*/index.faiss"))
    assert path.stat().st_size < 2 * 225 * 24 + 500
    whole = index.Index(tuple(map(Object, found)), flat=False)
    assert 0.9 < index.recall(whole, files.folder, queries) <= 1
    exact = search(found, queries, 3, exact=True)
    np.testing.assert_array_equal(exact.row, search(shards(files, 1), queries, 3).row)


def test_faiss_uses_as_many_threads_as_the_shard_is_given(tmp_path, vectors) -> None:
    IndexShard(0, 1, schema.Index(), {}, 3)
    assert faiss.omp_get_max_threads() == 3
    IndexShard(0, 1, schema.Index(), {}, 1)
    assert faiss.omp_get_max_threads() == 1


def test_actors_hold_every_bank_and_report_recall(on_ray, tmp_path, vectors, queries) -> None:
    large, small = bank(tmp_path, vectors), bank(tmp_path, vectors[:100])
    settings = schema.Index(shards=2, kind="IVF8,Flat")
    contents = index.trained(on_ray, Store(tmp_path / "fits"), [large, small, large], settings)
    assert [len(trained) for trained in contents.values()] == [2, 2]
    searched = index.start(on_ray, [large, small, large], settings)
    try:
        measured = index.recall(searched, large.folder, queries)
        exact = searched.search(large.folder, queries, 1, exact=True).distance(slice(1))
        found = searched.search(large.folder, queries, 1).distance(slice(1))
        assert measured == np.mean(exact == found)
        assert 0 < measured < 1
        assert searched.search(small.folder, queries, 1).neighbours.row.max() < 100
    finally:
        searched.stop()


def test_small_banks_are_searched_by_whoever_asks_and_give_what_actors_do(
    tmp_path, monkeypatch, vectors, queries
) -> None:
    files, started, wide = bank(tmp_path, vectors), [], schema.Index(cpus_per_shard=2)
    with opened("inline", threads=1) as engine:
        gang = Inline.gang
        monkeypatch.setattr(Inline, "gang", lambda *given: started.append(1) or gang(*given))
        copied = index.start(engine, [files], FLAT)
        assert (started, copied.holds, copied.copied) == ([], (), 2 * 4 * 450 * 24)
        found = copied.search(files.folder, queries, 9)
        for settings in (schema.Index(shards=1), schema.Index(resources={"highmem": 1}), wide, FLAT):
            if settings is FLAT:
                monkeypatch.setattr(index, "AUTO_COPIED_BYTES", 4 * 450 * 24 - 1)
            held = index.start(engine, [files], settings)
            assert (started.pop(), started, len(held.holds), held.copied) == (1, [], 1, 0)
            other = held.search(files.folder, queries, 9)
            np.testing.assert_array_equal(other.neighbours.row, found.neighbours.row)
            np.testing.assert_array_equal(other.distance(slice(None)), found.distance(slice(None)))


def test_banks_that_are_not_searched_now_count_where_small_ones_are_told(
    tmp_path, monkeypatch, vectors
) -> None:
    files, other = bank(tmp_path, vectors), bank(tmp_path, vectors[:200])
    monkeypatch.setattr(index, "AUTO_COPIED_BYTES", 4 * 24 * 649)
    with opened("inline", threads=1) as engine:
        assert index.start(engine, [files], FLAT, [files]).holds == ()
        assert len(index.start(engine, [files], FLAT, [files, other]).holds) == 1


@pytest.mark.parametrize(
    ("threads", "operations", "expected"),
    [(8, 10**8, 1), (8, 50_000, 4), (8, 1000, 8), (64, 1000, 16), (1, 1000, 1)],
)
def test_flat_shards_are_as_many_as_there_is_work_and_cpus(
    monkeypatch, threads, operations, expected
) -> None:
    monkeypatch.setattr(index, "AUTO_SHARD_OPERATIONS", operations)
    with opened("inline", threads=threads) as engine:
        assert index.shards_of(engine, [(20_000, 5)], schema.Index()) == expected
        assert index.shards_of(engine, [(20_000, 5)], schema.Index(kind="IVF4,Flat")) == 1
        assert index.shards_of(engine, [(20_000, 5)], schema.Index(shards=3)) == 3


class Room:
    """An engine with room for so many shards of half a CPU, and a CPU beside them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def capacity(self, *_: object, spare: int) -> int:
        return self.count

    def cpus(self) -> float:
        return 1 + self.count / 2

    def threads(self, _: object) -> int:
        return 1

    def holds(self, _: object, count: int, spare: int) -> bool:
        return count <= self.count

    def nodes(self) -> dict[str, dict[str, dict[str, float]]]:
        return {"head": {"resources": {"CPU": 8, "memory": 2**34}}}


IMAGENET_1K, IMAGENET_21K = [(1_281_167, 2048)] * 2, [(14_197_122, 2048)] * 2


@pytest.mark.parametrize(
    ("sizes", "gpus", "room", "expected"),
    [
        *((IMAGENET_1K, 1, room, count) for room, count in ((1, 1), (2, 2), (8, 8), (64, 16))),
        *((IMAGENET_1K, 0, room, count) for room, count in ((1, 1), (2, 2), (8, 5), (64, 16))),
        *((IMAGENET_21K, 1, room, count) for room, count in ((1, 1), (8, 8), (64, 28))),
    ],
)
def test_flat_shards_of_any_size_are_no_more_than_there_is_room_for(sizes, gpus, room, expected) -> None:
    settings = schema.Index(gpus_per_shard=gpus)
    assert index.shards_of(Room(room), sizes, settings) == expected
    index._require_room(Room(room), expected, settings)


def test_an_index_that_finds_no_room_is_refused_before_there_are_banks(caplog) -> None:
    message = (
        r"index\.shards: 3 shards of 0\.5 CPU and 1 GPU each find no room .*room for 2\. Set index\.shards to"
    )
    with pytest.raises(UserError, match=message):
        index.require(Room(2), IMAGENET_1K, schema.Index(gpus_per_shard=1, shards=3))
    index.require(Room(2), IMAGENET_1K, schema.Index())
    assert "those of a node may hold 22.0 GiB, the largest node has 16.0 GiB" in caplog.text
    index.require(Room(0), [(450, 24)] * 2, schema.Index())  # each process that scores has a copy
    index.require(Room(0), [], schema.Index(shards=3))


def test_of_a_trained_kind_whose_banks_may_be_smaller_than_known_it_is_said(caplog) -> None:
    index.require(Room(2), IMAGENET_1K, schema.Index(kind="IVF4096,SQ8"))
    assert "index.shards: up to 3 will be needed, this cluster has room for 2" in caplog.text


def test_nodes_that_no_shard_can_be_on_do_not_count_for_its_memory(caplog) -> None:
    class Mixed(Room):
        def nodes(self) -> dict[str, dict[str, dict[str, float]]]:
            without = {f"cpus-{number}": {"resources": {"CPU": 8, "memory": 2**37}} for number in range(8)}
            return {**without, "gpus": {"resources": {"CPU": 8, "GPU": 2, "memory": 2**33}}}

    index._tell_of_memory(Mixed(2), IMAGENET_1K, 2, schema.Index(gpus_per_shard=1))
    assert "the largest node has 8.0 GiB" in caplog.text


@pytest.mark.parametrize("kind", ["HNSW16", "NSG16"])
def test_a_graph_is_built_of_all_vectors_at_once(tmp_path, vectors, queries, kind) -> None:
    (one,), (many,) = (
        shards(bank(tmp_path / str(pieces), vectors, pieces=pieces), 1, kind=kind) for pieces in (1, 4)
    )
    found = [search([shard], queries, 5).row for shard in (one, many)]
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="needs a machine without a GPU")
def test_a_faiss_without_gpus_is_refused_before_there_are_banks(on_ray) -> None:
    for settings in ({"device": "cuda"}, {"gpus_per_shard": 1}):
        with pytest.raises(UserError, match=r"index\.device: cuda was asked for, but this FAISS sees no GPU"):
            index.require(on_ray, [(450, 24)], schema.Index(**settings))


def test_flat_vectors_that_are_too_many_for_the_shards_there_is_room_for_are_searched_all_the_same(
    on_ray, tmp_path, monkeypatch, vectors, queries
) -> None:
    for name in ("AUTO_SHARD_BYTES", "AUTO_COPIED_BYTES"):
        monkeypatch.setattr(index, name, 1000)
    files = bank(tmp_path, vectors)
    searched = index.start(on_ray, [files], FLAT)
    try:
        assert len(searched.holds) == 4  # halves of two CPUs of three; not 44
        row = searched.search(files.folder, queries, 9).neighbours.row
    finally:
        searched.stop()
    np.testing.assert_array_equal(row, search(shards(files, 1), queries, 9).row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 5}, "5 shards of 0.5 CPU and 0 GPU each find no room beside a CPU for scoring"),
        ({"shards": 1000}, "smallest bank has 450 rows"),
        (
            {"gpus_per_shard": 3, "device": "cpu"},
            "one actor needs 0.5 CPU and 3 GPU on one node beside 1 CPU for tasks; the cluster's nodes",
        ),
    ],
)
def test_shards_that_do_not_fit_the_cluster_are_refused(on_ray, tmp_path, vectors, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        index.start(on_ray, [bank(tmp_path, vectors)], schema.Index(**settings))
