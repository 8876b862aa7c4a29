import math

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.entropy import Entropy
from tests import slow


@pytest.mark.parametrize("temperature", [0.5, 1, 1000])
def test_the_score_is_the_logarithm_of_the_entropy_of_the_softmax(rows, temperature):
    expected = [slow.entropy(row, temperature) for row in rows.query[LOGITS][:40].astype(np.float64).tolist()]
    np.testing.assert_allclose(rows.score(Entropy(temperature=temperature))[:40], expected, rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_equal_logits_have_the_highest_entropy(classes):
    batch = {LOGITS: np.full((1, classes), 7, dtype=np.float32)}
    np.testing.assert_allclose(Entropy().fit(None)(batch), [math.log(math.log(classes))], rtol=1e-12)


def test_certain_predictions_keep_their_order():
    logits = np.array([[1e4, 0, -1e4], [2e3, 0, -1e4], [50, 0, -1e4], [36, 0, -1e4], [1, 0, -1]])
    score = Entropy().fit(None)({LOGITS: logits})
    np.testing.assert_allclose(score, [slow.entropy(row) for row in logits], rtol=1e-12)
    assert (np.diff(score) > 0).all()
