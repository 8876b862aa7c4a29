import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import FEATURE
from pipeline.detectors.react import React
from pipeline.detectors.vra import Vra
from tests import slow


@pytest.mark.parametrize(("low", "high"), [(10, 90), (60, 95), (0, 100), (70, 70)])
def test_the_score_is_the_energy_of_rectified_features(rows, low, high):
    lowest, highest = slow.percentile(rows, low), slow.percentile(rows, high)

    def rectified(h):
        return 0.0 if h < lowest else min(h, highest)

    expected = [
        slow.energy(slow.logits(rows, [rectified(h) for h in feature]))
        for feature in rows.query[FEATURE][:40].tolist()
    ]
    np.testing.assert_allclose(rows.score(Vra(low=low, high=high))[:40], expected, rtol=1e-10)


def test_without_a_lower_bound_it_is_react(real):
    np.testing.assert_array_equal(real.score(Vra(low=0, high=90)), real.score(React(p=90)))


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match=r"low is 90\.0 but high is 10\.0"):
        Vra(low=90, high=10)
