import math

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.gen import Gen
from tests import slow


@pytest.mark.parametrize(("gamma", "m"), [(0.1, 100), (0.1, 3), (0.5, 1), (1, 2)])
def test_the_score_is_the_logarithm_of_the_generalised_entropy_of_the_largest_probabilities(rows, gamma, m):
    logits = rows.query[LOGITS].astype(np.float64).tolist()
    expected = [slow.gen(row, gamma, m) for row in logits[:10]]
    np.testing.assert_allclose(rows.score(Gen(gamma=gamma, m=m))[:10], expected, rtol=1e-9)


@pytest.mark.parametrize("gap", [1, 36, 37, 40, 100, 700, 9000])
def test_certain_predictions_keep_their_order(gap):
    expected = slow.gen([0.0, -gap], 0.1, 2)
    np.testing.assert_allclose(Gen().fit(None)({LOGITS: np.array([[0.0, -gap]])}), [expected], rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_equal_logits_spread_over_all_classes(classes):
    batch = {LOGITS: np.full((1, classes), 3, dtype=np.float32)}
    expected = math.log(min(classes, 100) * (1 / classes * (1 - 1 / classes)) ** 0.1)
    np.testing.assert_allclose(Gen().fit(None)(batch), [expected], rtol=1e-12)
