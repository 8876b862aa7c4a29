import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors.react import React
from tests import slow


@pytest.mark.parametrize("p", [0, 50, 90, 99.7, 100])
def test_the_score_is_the_energy_of_clipped_features(rows, p):
    bound = slow.percentile(rows, p)
    expected = [
        slow.energy(slow.logits(rows, [min(h, bound) for h in feature]))
        for feature in rows.query[FEATURE][:40].tolist()
    ]
    np.testing.assert_allclose(rows.score(React(p=p))[:40], expected, rtol=1e-10)
