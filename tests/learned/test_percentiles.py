from __future__ import annotations

import numpy as np
import pytest

from pipeline.learned.percentiles import DimensionPercentiles, Histogram, Percentiles
from pipeline.learned.statistics import Head
from tests.learned.test_statistics import cut, merged

SIGNED = np.random.default_rng(1).normal(size=(97, 7)).astype(np.float32)


@pytest.mark.parametrize(
    "feature",
    [
        SIGNED,
        np.maximum(SIGNED, 0),
        SIGNED * 1e-40,
        SIGNED * 1e30,
        np.where(SIGNED > 0, np.float32(-0.0), np.float32(0)),
        np.float32(1) + np.arange(679, dtype=np.float32).reshape(97, 7) * 2**-23,  # neighbours in float32
        SIGNED[:1, :1],
        SIGNED[:1],
    ],
)
def test_percentiles_are_those_of_all_entries(feature) -> None:
    wanted = Percentiles((0.0, 0.5, 10.0, 33.3, 50.0, 90.0, 99.9, 100.0))
    found = merged(cut({"feature": feature, "label": feature[:, 0]}, 10), [wanted])[wanted]
    expected = np.percentile(feature.astype(np.float64), wanted.p)
    np.testing.assert_allclose(found.value, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "feature",
    [
        SIGNED,
        np.maximum(SIGNED, 0),
        SIGNED * 1e-40,
        SIGNED * 1e30 * np.arange(7, dtype=np.float32),
        np.where(SIGNED > 0, np.float32(-0.0), np.float32(0)),
        np.float32(1) + np.arange(679, dtype=np.float32).reshape(97, 7) * 2**-23,
        SIGNED[:1, :1],
        SIGNED[:1],
    ],
)
def test_percentiles_of_dimensions_are_those_of_their_entries(feature) -> None:
    wanted = DimensionPercentiles((0.0, 0.5, 33.3, 60.0, 95.0, 100.0))
    weight = np.zeros((3, feature.shape[1]), np.float32)
    head = Head(weight, np.zeros(3, np.float32))
    found = merged(cut({"feature": feature, "label": feature[:, 0]}, 10), [wanted], head)[wanted]
    expected = np.percentile(feature.astype(np.float64), wanted.p, axis=0)
    np.testing.assert_allclose(found.value, expected, rtol=1e-14, atol=0)


def test_entries_below_zero_and_above_a_number_are_counted() -> None:
    counts = merged(cut({"feature": SIGNED, "label": SIGNED[:, 0]}, 10), [Histogram()])[Histogram()]
    assert counts.negative == (SIGNED < 0).sum()
    assert counts.above(0) == (SIGNED > 0).sum()
    assert (SIGNED > 0.51).sum() <= counts.above(0.5) <= (SIGNED > 0.5).sum()
