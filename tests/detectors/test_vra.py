from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import FEATURE
from pipeline.detectors.react import React
from pipeline.detectors.vra import Vra
from tests import slow


def slow_vra(rows, low, high):
    """Energy of features of which entries below `low` (D,) are 0 and those above `high` (D,) are that."""
    expected = []
    for feature in rows.query[FEATURE][:40].tolist():
        entries = zip(feature, low, high, strict=True)
        rectified = [0.0 if h < a else float(min(h, c)) for h, a, c in entries]
        expected.append(slow.energy(slow.logits(rows, rectified)))
    return expected


@pytest.mark.parametrize(("low", "high"), [(60, 95), (60, 90), (0, 100), (70, 70)])
def test_the_score_is_the_energy_of_features_between_percentiles_of_each_dimension(rows, low, high):
    columns = rows.train[FEATURE].astype(np.float64).T
    bounds = [[np.percentile(column, p) for column in columns] for p in (low, high)]
    score = rows.score(Vra(low=low, high=high))
    np.testing.assert_allclose(score[:40], slow_vra(rows, *bounds), rtol=1e-10)


def test_given_bounds_take_the_place_of_percentiles(rows):
    width = rows.weight.shape[1]
    expected = slow_vra(rows, [0.5] * width, [1] * width)
    np.testing.assert_allclose(rows.score(Vra(a=0.5, c=1))[:40], expected, rtol=1e-10)
    assert not Vra(a=0.5, c=1).needs_train()
    above = [np.percentile(column, 95) for column in rows.train[FEATURE].astype(np.float64).T]
    expected = slow_vra(rows, [0.5] * width, above)
    np.testing.assert_allclose(rows.score(Vra(a=0.5))[:40], expected, rtol=1e-10)


def test_without_a_lower_bound_it_is_react(real):
    np.testing.assert_array_equal(real.score(Vra(a=-1e6, c=1)), real.score(React(c=1)))


def test_an_upper_percentile_that_leaves_nothing_of_most_dimensions_is_noticed(make_rows):
    rows = make_rows()
    sparse = np.where(np.random.default_rng(0).random(rows.train[FEATURE].shape) < 0.02, 1, 0)
    rows = replace(rows, train={**rows.train, FEATURE: sparse.astype(np.float32)})
    (notice,) = Vra().notices(rows.training(Vra()))
    assert "high = 95 is 0 or less in 16 of 16 dimensions" in notice
    assert Vra(high=100).notices(rows.training(Vra(high=100))) == ()
    assert Vra(a=0, c=1).notices(rows.training(Vra(a=0, c=1))) == ()


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match=r"low is 90\.0 but high is 10\.0"):
        Vra(low=90, high=10)
    with pytest.raises(ValidationError, match=r"a is 2\.0 but c is 1\.0"):
        Vra(a=2, c=1)
