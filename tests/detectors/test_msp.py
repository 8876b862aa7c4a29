import math

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.msp import Msp
from tests import slow


@pytest.mark.parametrize("temperature", [1, 2.5])
def test_the_score_is_the_logarithm_of_what_the_predicted_class_leaves(rows, temperature):
    expected = [slow.msp(logits, temperature) for logits in rows.query[LOGITS]]
    np.testing.assert_allclose(rows.score(Msp(temperature=temperature)), expected, rtol=1e-12)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 9999.0, -1e4], [-1e4, -1e4, -1e4], [1e4, -1e4, 0.0]])
    expected = [slow.msp(row) for row in logits]
    np.testing.assert_allclose(Msp().fit(None)({LOGITS: logits}), expected, rtol=1e-12)


def test_the_exponential_is_the_probability_of_the_other_classes():
    batch = {LOGITS: np.log([[0.2, 0.5, 0.3]])}
    np.testing.assert_allclose(np.exp(Msp().fit(None)(batch)), [0.5], rtol=1e-12)


def test_predictions_that_round_to_certain_keep_their_order():
    gaps = np.arange(30, 3000, 7.0)
    score = Msp().fit(None)({LOGITS: np.stack([np.zeros_like(gaps), -gaps], axis=1)})
    assert len(set(score)) == len(gaps)
    assert (np.diff(score) < 0).all()
    assert score[-1] == pytest.approx(-gaps[-1]) and math.exp(score[-1]) == 0
