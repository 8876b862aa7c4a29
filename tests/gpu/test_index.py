"""Neighbours by FAISS on a GPU are those of a CPU: exact search has one answer, up to ties."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.stages.index import BankFiles
from tests.stages.test_index import bank, exact_distance, search, shards

pytestmark = pytest.mark.gpu

_log = logging.getLogger(__name__)

TIE = 1e-5
"""Unit vectors whose distances differ by less may come in any order: FAISS ranks by ‖a‖² + ‖b‖² - 2ab in
float32, whose rounding is some 1e-7 of 2."""


def unit(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal((rows, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    some = unit(np.random.default_rng(0), 20_000, 256)
    return np.concatenate([some, some[:200]])  # every tie is real


@pytest.fixture(scope="module")
def queries() -> NDArray[np.float32]:
    return unit(np.random.default_rng(1), 512, 256)


@pytest.fixture
def files(tmp_path: Path, vectors: NDArray[np.float32]) -> BankFiles:
    return bank(tmp_path, vectors)


@pytest.mark.parametrize("k", [1, 50, 1000])
@pytest.mark.parametrize("of", [1, 3])
def test_neighbours_are_those_of_the_cpu(
    files: BankFiles, vectors: NDArray[np.float32], queries: NDArray[np.float32], of: int, k: int
) -> None:
    expected = search(shards(files, 1), queries, k)
    found = search(shards(files, of, device="cuda"), queries, k)
    np.testing.assert_allclose(found.distance, expected.distance, rtol=0, atol=TIE)
    other = found.row != expected.row
    _log.info("%.1e of the neighbours stand in another place", other.mean())
    assert other.mean() < 0.05
    exact = exact_distance(queries, vectors, found.row)
    np.testing.assert_array_equal(found.distance, exact)
    assert all(len(set(row)) == k for row in found.row.tolist())


def test_a_search_gives_the_same_bits_again(files: BankFiles, queries: NDArray[np.float32]) -> None:
    one, other = (search(shards(files, 2, device="cuda"), queries, 50) for _ in range(2))
    np.testing.assert_array_equal(one.row, other.row)
    np.testing.assert_array_equal(one.distance, other.distance)


def test_distances_are_exact_where_faiss_own_are_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    vectors = (rng.normal(size=(100, 16)) * 1e-4 + 10).astype(np.float32)
    queries = vectors[:32] + np.float32(1e-5)
    found = search(shards(bank(tmp_path, vectors), 2, device="cuda"), queries, 3)
    np.testing.assert_array_equal(found.distance, exact_distance(queries, vectors, found.row))


def test_an_approximate_index_finds_what_it_finds_on_the_cpu(
    files: BankFiles, queries: NDArray[np.float32]
) -> None:
    """Trained on the CPU, so that lists are the same; a query between two lists may go to the other."""
    expected, found = (
        search(shards(files, 1, kind="IVF16,Flat", device=device), queries, 10) for device in ("cpu", "cuda")
    )
    same = (np.abs(found.distance - expected.distance) <= TIE).all(axis=1)
    assert same.mean() > 0.99


def test_vectors_of_16_bits_find_almost_all_that_the_exact_index_finds(
    files: BankFiles, queries: NDArray[np.float32]
) -> None:
    exact = search(shards(files, 1), queries, 10).row
    found = search(shards(files, 2, kind="SQfp16", device="cuda"), queries, 10).row
    common = [len(set(one) & set(other)) for one, other in zip(exact.tolist(), found.tolist(), strict=True)]
    assert np.mean(common) > 9.5


def test_a_kind_that_gpus_do_not_have_is_a_clear_error(files: BankFiles) -> None:
    with pytest.raises(UserError, match=r"index\.kind: FAISS has no 'HNSW8,Flat' on GPUs"):
        shards(files, 1, kind="HNSW8,Flat", device="cuda")
