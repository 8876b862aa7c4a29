import math

import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors.ash import Ash
from pipeline.detectors.scale import Scale
from tests import slow


@pytest.mark.parametrize("p", [0, 50, 85, 99])
def test_the_score_is_the_energy_of_scaled_features(rows, p):
    expected = []
    for feature in rows.query[FEATURE][:40].tolist():
        ordered = sorted(feature, reverse=True)
        top = ordered[: max(1, len(feature) - round(len(feature) * p / 100))]
        factor = math.exp(min(max(math.fsum(ordered) / math.fsum(top), -100), 100))
        expected.append(slow.energy(slow.logits(rows, [h * factor for h in feature])))
    np.testing.assert_allclose(rows.score(Scale(p=p))[:40], expected, rtol=1e-9)


def test_it_is_ash_s_where_nothing_is_pruned(real):
    np.testing.assert_allclose(real.score(Scale(p=0)), real.score(Ash(variant="s", p=0)), rtol=1e-13)
