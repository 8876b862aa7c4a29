from __future__ import annotations

import pickle

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.learned import statistics
from pipeline.learned.percentiles import Histogram, Percentiles
from pipeline.learned.statistics import Classes, Head, Scatter, Softmax, Statistic, Statistics, normalize

HEAD = Head(np.zeros((4, 7), np.float32), np.zeros(4, np.float32))
WANTED: list[Statistic] = [
    Classes(),
    Classes(correct=True),
    Classes(column=LOGITS, correct=True),
    Classes(unit=True),
    Scatter(),
    Scatter(unit=True),
    Softmax(),
    Histogram(),
    Percentiles((0.0, 10.0, 50.0, 90.0, 100.0)),
]


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 4, 200).astype(np.int32)
    label[label == 2] = 3  # class 2 has no rows
    prediction = np.where(rng.random(200) < 0.7, label, 0).astype(np.int32)
    prediction[prediction < 0] = 1
    return {
        "feature": rng.exponential(size=(200, 7)).astype(np.float32),
        "logits": rng.normal(size=(200, 4)).astype(np.float32),
        "label": label,
        "prediction": prediction,
    }


def cut(batch: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    rows = len(batch["label"])
    return [
        {name: values[start : start + size] for name, values in batch.items()}
        for start in range(0, rows, size)
    ]


def merged(batches, wanted: list[Statistic], head: Head = HEAD) -> Statistics:
    """Statistics as the pipeline computes them: batch by batch, merged in order."""

    def sweep(group, known):
        measures = pickle.loads(pickle.dumps([each.measure(head, known) for each in group]))
        total = [measure(batches[0]) for measure in measures]
        for batch in batches[1:]:
            total = [part.merge(measure(batch)) for part, measure in zip(total, measures, strict=True)]
        return [part.whole() for part in total]

    return statistics.compute(wanted, sweep)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("column", ["feature", "logits"])
@pytest.mark.parametrize("unit", [False, True])
def test_class_sums_equal_loops_over_the_rows(batch, column, unit, correct) -> None:
    wanted = Classes(column=column, unit=unit, correct=correct)
    found = statistics.of({name: batch[name] for name in wanted.columns}, [wanted], HEAD)[wanted]
    values = batch[column].astype(np.float64)
    counted = 0
    for label in range(4):
        rows = [row for row in range(200) if batch["label"][row] == label]
        rows = [row for row in rows if not correct or batch["prediction"][row] == label]
        length = [np.linalg.norm(values[row]) if unit else 1 for row in rows]
        total = sum(
            (values[row] / each for row, each in zip(rows, length, strict=True)), np.zeros(values.shape[1])
        )
        assert found.class_count[label] == len(rows)
        np.testing.assert_allclose(found.class_sum[label], total, rtol=1e-12, atol=1e-13)
        counted += len(rows)
    assert found.class_count.sum() == counted
    assert found.count == (counted if correct else 200)
    np.testing.assert_allclose(
        found.class_mean, (found.class_sum / np.maximum(found.class_count, 1)[:, None])[[0, 1, 3]]
    )


@pytest.mark.parametrize("wanted", [Classes(), Classes(correct=True), Softmax()])
def test_sums_of_some_rows_hold_no_more_classes_than_these_have(batch, wanted) -> None:
    rows = {name: values[:3] for name, values in batch.items()}
    many = {**rows, "logits": np.pad(rows["logits"], ((0, 0), (0, 996)), constant_values=-np.inf)}
    head = Head(np.zeros((1000, 7), np.float32), np.zeros(1000, np.float32))
    part = wanted.measure(head, Statistics())(many)
    assert len(part.classes) <= 3
    assert max(value.size for value in part.arrays().values()) <= 3 * 1000
    few = wanted.measure(HEAD, Statistics())(rows).whole().arrays()
    for name, value in part.whole().arrays().items():
        common = tuple(slice(0, size) for size in few[name].shape)
        np.testing.assert_allclose(value[common], few[name], rtol=1e-15)
        assert np.count_nonzero(value) == np.count_nonzero(few[name])


def test_class_sums_are_added_in_the_order_of_the_parts(batch) -> None:
    parts = [Classes().measure(HEAD, Statistics())(each) for each in cut(batch, 30)]
    total, expected = parts[0], parts[0].whole().class_sum
    for part in parts[1:]:
        total, expected = total.merge(part), expected + part.whole().class_sum
    np.testing.assert_array_equal(total.whole().class_sum, expected)


@pytest.mark.parametrize("wanted", [Classes(), Classes(column=LOGITS, correct=True), Softmax()])
def test_sums_added_in_place_have_the_bits_of_sums_added_class_by_class(batch, wanted) -> None:
    pieces = [wanted.measure(HEAD, Statistics())(each) for each in cut(batch, 3)]
    slow: dict[int, tuple[int, np.ndarray]] = {}
    for piece in pieces:
        for label, count, total in zip(piece.classes.tolist(), piece.count, piece.total.copy(), strict=True):
            before = slow.get(label, (0, np.zeros(piece.total.shape[1])))
            slow[label] = before[0] + count, before[1] + total
    for total in (pieces[0], pieces[0].roomy()):
        for piece in pieces[1:]:
            total = total.merge(piece)
        stored = total.arrays()
        assert stored["classes"].tolist() == sorted(slow)
        np.testing.assert_array_equal(stored["count"], [slow[label][0] for label in sorted(slow)])
        np.testing.assert_array_equal(stored["total"], np.stack([slow[label][1] for label in sorted(slow)]))


def test_the_mean_is_that_of_all_rows_and_class_means_leave_out_classes_without_rows(batch) -> None:
    found = statistics.of(batch, [Classes()], HEAD)[Classes()]
    rows = batch["feature"].astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-14)
    expected = [rows[batch["label"] == label].mean(axis=0) for label in (0, 1, 3)]
    np.testing.assert_allclose(found.class_mean, expected, rtol=1e-14)


def test_rows_without_a_label_count_in_the_mean_only(batch) -> None:
    batch["label"][:] = -1
    found = statistics.of(batch, [Classes()], HEAD)[Classes()]
    assert found.class_count.sum() == 0
    np.testing.assert_allclose(found.mean, batch["feature"].astype(np.float64).mean(axis=0), rtol=1e-14)


@pytest.mark.parametrize("size", [1, 30, 199])
def test_merging_parts_gives_the_statistics_of_the_whole(batch, size) -> None:
    found, whole = merged(cut(batch, size), WANTED), statistics.of(batch, WANTED, HEAD)
    for statistic in WANTED:
        for name, value in whole[statistic].arrays().items():
            np.testing.assert_allclose(found[statistic].arrays()[name], value, rtol=1e-11, atol=1e-12)


def test_scatter_is_the_covariance(batch) -> None:
    for unit in (False, True):
        found = merged(cut(batch, 30), [Scatter(unit)])[Scatter(unit)]
        rows = batch["feature"].astype(np.float64)
        rows = normalize(rows) if unit else rows
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, ddof=0), rtol=1e-11, atol=1e-15)


def test_a_mean_far_from_zero_costs_the_covariance_no_digits(batch) -> None:
    shift = np.float32(2**20)
    near = np.round(batch["feature"] * 8) / 8  # exact in float32 after the shift
    far = {**batch, "feature": (near + shift).astype(np.float32)}
    found = merged(cut(far, 30), [Scatter()])[Scatter()]
    # Σ h hᵀ - n μ μᵀ would be wrong in the second digit
    np.testing.assert_allclose(found.covariance, np.cov(near.astype(np.float64).T, ddof=0), atol=1e-10)


def test_softmax_sums_equal_a_loop(batch) -> None:
    found = merged(cut(batch, 30), [Softmax()])[Softmax()]
    for predicted in range(4):
        rows = batch["logits"][batch["prediction"] == predicted].astype(np.float64)
        total = sum((np.exp(row) / np.exp(row).sum() for row in rows), np.zeros(4))
        assert found.count[predicted] == len(rows)
        np.testing.assert_allclose(found.sum[predicted], total, rtol=1e-12)


def test_a_statistic_is_measured_after_what_it_builds_on_and_once() -> None:
    passes = []

    def sweep(group, known):
        passes.append(list(group))
        assert all(before in known.found for each in group for before in each.after())
        return [Histogram().part(np.zeros(1, np.int64)) for _ in group]

    found = statistics.compute([Percentiles((1.0,)), Scatter(), Scatter(), Percentiles((2.0,))], sweep)
    assert passes == [[Histogram(), Scatter()], [Percentiles((1.0,)), Percentiles((2.0,))]]
    assert set(found.found) == {Histogram(), Scatter(), Percentiles((1.0,)), Percentiles((2.0,))}
    assert statistics.compute([], sweep).found == {}


def test_every_statistic_has_an_identity_of_its_own() -> None:
    identities = [each.identity for each in (*WANTED, Percentiles((10.0,)), Percentiles((10.5,)))]
    assert all(identities.count(identity) == 1 for identity in identities)


def test_a_spectrum_is_found_once_for_every_change(batch, monkeypatch) -> None:
    moments = statistics.of(batch, [Scatter()], HEAD)[Scatter()]
    eigh, decomposed = np.linalg.eigh, []
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: decomposed.append(matrix) or eigh(matrix))
    origin = np.outer(moments.mean, moments.mean)
    for change in (None, origin, origin.copy(), None, -origin):
        values, vectors = moments.spectrum(change)
        changed = moments.covariance + (0 if change is None else change)
        np.testing.assert_allclose((vectors * values) @ vectors.T, changed, atol=1e-12)
        assert (np.diff(values) >= 0).all()
    assert len(decomposed) == 3
