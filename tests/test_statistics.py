from __future__ import annotations

import numpy as np
import pytest

from pipeline.statistics import Statistics


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 4, 200).astype(np.int32)
    label[label == 2] = 3  # class 2 has no rows
    prediction = np.where(rng.random(200) < 0.7, label, 0).astype(np.int32)
    return {
        "feature": rng.exponential(size=(200, 7)).astype(np.float32),
        "label": label,
        "prediction": prediction,
    }


def test_statistics_equal_loops_over_the_rows(batch) -> None:
    found = Statistics.of(batch, classes=4)
    for label in range(4):
        rows = [row for row in range(200) if batch["label"][row] == label]
        correct = [row for row in rows if batch["prediction"][row] == label]
        assert found.class_count[label] == len(rows)
        assert found.correct_count[label] == len(correct)
        total = sum((batch["feature"][row].astype(np.float64) for row in rows), np.zeros(7))
        np.testing.assert_allclose(found.class_sum[label], total, rtol=1e-14)
        right = sum((batch["feature"][row].astype(np.float64) for row in correct), np.zeros(7))
        np.testing.assert_allclose(found.correct_sum[label], right, rtol=1e-14)
    assert found.count == 200
    np.testing.assert_allclose(found.mean, batch["feature"].astype(np.float64).mean(axis=0), rtol=1e-14)


def test_class_means_leave_out_classes_without_rows(batch) -> None:
    found = Statistics.of(batch, classes=4)
    expected = [
        batch["feature"][batch["label"] == label].astype(np.float64).mean(axis=0) for label in (0, 1, 3)
    ]
    np.testing.assert_allclose(found.class_mean, expected, rtol=1e-14)


def test_merging_parts_gives_the_statistics_of_the_whole(batch) -> None:
    parts = [
        Statistics.of({name: values[start : start + 30] for name, values in batch.items()}, 4)
        for start in range(0, 200, 30)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = Statistics.of(batch, 4)
    for name, value in vars(whole).items():
        np.testing.assert_allclose(getattr(merged, name), value, rtol=1e-13)


def test_rows_without_a_label_count_in_the_mean_only(batch) -> None:
    batch["label"][:] = -1
    found = Statistics.of(batch, classes=4)
    assert found.class_count.sum() == 0
    np.testing.assert_allclose(found.mean, batch["feature"].astype(np.float64).mean(axis=0), rtol=1e-14)
