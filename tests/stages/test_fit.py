from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.engine import Engine
from pipeline.detectors.base import Training
from pipeline.detectors.knn import Knn
from pipeline.detectors.she import She
from pipeline.errors import UserError
from pipeline.learned.percentiles import Histogram, Percentiles
from pipeline.learned.statistics import Classes, ClassSums, Head, Scatter, Softmax, Statistic, Statistics, of
from pipeline.stages import banks, fit, statistics
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.artifacts import Cache


def feature_table(folder: Path, rows: int, parts: list[int]) -> tables.Table:
    """A table of random rows cut into parts at the given places."""
    rng = np.random.default_rng(0)
    columns = {
        "key": np.array([f"k{row}" for row in range(rows)], dtype=object),
        "label": rng.integers(0, 5, rows).astype(np.int32),
        "prediction": rng.integers(0, 5, rows).astype(np.int32),
        "feature": rng.exponential(size=(rows, 6)).astype(np.float32),
        "logits": rng.normal(size=(rows, 5)).astype(np.float32),
    }
    whole = tables.arrow_columns(columns)
    edges = [0, *parts, rows]
    for number, (start, stop) in enumerate(pairwise(edges)):
        tables.write_table(folder / tables.part_name(number), whole.slice(start, stop - start))
    files.write_json(folder / artifacts.RECORD, {"part_rows": np.diff(edges).tolist()})
    return tables.Table.open(folder)


HEAD = Head(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))
WANTED: list[Statistic] = [Classes(), Classes(correct=True), Scatter(), Percentiles((10.0, 90.0)), Softmax()]
NAMES = ["feature", "logits", "label", "prediction"]


def fitted(engine: Engine, cache: Cache, table: tables.Table, wanted: list[Statistic]) -> Statistics:
    return statistics.fit_statistics(
        engine, cache, statistics.Rows([table], [{"table": "of test"}]), wanted, HEAD
    )


def test_statistics_have_the_same_bits_however_rows_lie_in_parts(
    engine, on_ray, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(statistics, "SLICE", 700)
    one = feature_table(tmp_path / "one", 5000, [2500])
    many = feature_table(tmp_path / "many", 5000, [1, 50, 1999, 3000, 4990])
    found = [
        fitted(where, Cache(tmp_path / f"fits{number}"), table, WANTED)
        for number, (where, table) in enumerate(((on_ray, one), (on_ray, many), (engine, many)))
    ]
    whole = of(one.read(0, 5000, NAMES), WANTED, HEAD)
    for statistic in WANTED:
        arrays = [each[statistic].arrays() for each in found]
        for name, expected in whole[statistic].arrays().items():
            np.testing.assert_array_equal(arrays[0][name], arrays[1][name])
            np.testing.assert_array_equal(arrays[0][name], arrays[2][name])
            np.testing.assert_allclose(arrays[0][name], expected, rtol=1e-11)


def test_only_statistics_that_are_not_there_are_computed(engine, tmp_path, monkeypatch) -> None:
    table, cache = feature_table(tmp_path / "table", 100, []), Cache(tmp_path / "fits")
    sweeps = []

    def sweep(engine, rows, group, head, known):
        sweeps.append(group)
        return original(engine, rows, group, head, known)

    original = statistics._sweep
    monkeypatch.setattr(statistics, "_sweep", sweep)
    first = fitted(engine, cache, table, [Classes()])
    for _ in range(2):
        more = fitted(engine, cache, table, [Scatter(), Classes(), Percentiles((50.0,)), Scatter()])
    fitted(engine, Cache(tmp_path / "fits", "frozen"), table, [Scatter(), Percentiles((50.0,))])
    assert sweeps == [[Classes()], [Scatter(), Histogram()], [Percentiles((50.0,))]]
    np.testing.assert_array_equal(first[Classes()].class_sum, more[Classes()].class_sum)
    with pytest.raises(UserError, match="no statistics in the workspace"):
        fitted(engine, Cache(tmp_path / "fits", "frozen"), table, [Percentiles((51.0,))])


def test_tables_one_after_the_other_have_the_statistics_of_all_their_rows(engine, tmp_path) -> None:
    one, two = feature_table(tmp_path / "one", 30, []), feature_table(tmp_path / "two", 50, [])
    rows = statistics.Rows([one, two], [{"table": 1}, {"table": 2}])
    found = statistics.fit_statistics(engine, Cache(tmp_path / "fits"), rows, [Scatter()], HEAD)[Scatter()]
    parts = [one.read(0, 30, ["feature"])["feature"], two.read(0, 50, ["feature"])["feature"]]
    np.testing.assert_allclose(found.covariance, np.cov(np.concatenate(parts).T, ddof=0), rtol=1e-12)


def test_a_bank_holds_the_kept_rows_in_order(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(banks, "SLICE", 300)
    table = feature_table(tmp_path / "table", 1000, [123, 700])
    scorer = Knn(k=3).fit(Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32)))
    files = banks.build_bank(engine, Cache(tmp_path / "fits"), scorer.bank, table, {"some": "identity"})
    found = np.concatenate(list(files.ranges(0, 1000)))
    feature = table.read(0, 1000, ["feature"])["feature"].astype(np.float64)
    expected = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (files.rows, files.width) == (1000, 6)


def test_a_bank_smaller_than_k_is_refused_with_the_detector_named(engine, tmp_path) -> None:
    table = feature_table(tmp_path / "table", 20, [])
    training = Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))
    chosen = {"far": Knn(k=21)}
    with pytest.raises(UserError, match=re.escape("detectors.far: k is 21 but only 20 training rows")):
        fit.fit_detectors(engine, chosen, training, Cache(tmp_path / "fits"), (table, {}))


def test_optional_detectors_that_the_training_rows_do_not_serve_are_left_out(engine, tmp_path) -> None:
    table, nothing = feature_table(tmp_path / "table", 20, []), Classes(correct=True)
    wrong = ClassSums(np.zeros(5, np.int64), np.zeros((5, 6)), np.zeros(6), np.array(0))
    training = Training(HEAD.weight, HEAD.bias, train=Statistics({nothing: wrong}))
    chosen = {"near": Knn(k=20), "far": Knn(k=21), "she": She()}
    for cache in (Cache(tmp_path / "fits"), Cache(tmp_path / "fits", "frozen")):
        found = fit.fit_detectors(engine, chosen, training, cache, (table, {}), {"far", "she"})
        assert list(found.scorers) == list(found.banks) == ["near"]
        assert found.not_applicable["far"].startswith("k is 21 but only 20 training rows enter the bank")
        assert found.not_applicable["she"].startswith("she: patterns need training rows")
    with pytest.raises(UserError, match=r"^detectors\.she: she: patterns need"):
        fit.fit_detectors(engine, chosen, training, Cache(tmp_path / "fits"), (table, {}), {"far"})


def test_a_bank_that_is_not_there_yet_is_no_reason_to_leave_a_detector_out(engine, tmp_path) -> None:
    table = feature_table(tmp_path / "table", 20, [])
    cache, training = Cache(tmp_path / "fits", "frozen"), Training(HEAD.weight, HEAD.bias)
    with pytest.raises(UserError, match="fit: no bank in the workspace"):
        fit.fit_detectors(engine, {"near": Knn(k=1)}, training, cache, (table, {}), {"near"})


def test_an_artefact_is_computed_once_unless_fresh(tmp_path) -> None:
    calls = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"mean": np.arange(3.0), "count": np.array(7)}

    for mode, expected in (("reuse", 1), ("reuse", 1), ("frozen", 1), ("fresh", 2)):
        found = Cache(tmp_path, mode).get("statistics", {"of": "x"}, compute)
        assert len(calls) == expected
        np.testing.assert_array_equal(found["mean"], np.arange(3.0))
        assert int(found["count"]) == 7
    Cache(tmp_path).get("statistics", {"of": "y"}, compute)
    assert len(calls) == 3


def test_a_frozen_cache_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(UserError, match="no statistics in the workspace"):
        Cache(tmp_path, "frozen").get("statistics", {}, dict)


def test_an_artefact_that_failed_is_not_taken_for_complete(tmp_path) -> None:
    def fails() -> dict[str, np.ndarray]:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Cache(tmp_path).get("statistics", {}, fails)
    found = Cache(tmp_path).get("statistics", {}, lambda: {"x": np.ones(1)})
    np.testing.assert_array_equal(found["x"], [1])
