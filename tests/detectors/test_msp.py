from decimal import Decimal

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.msp import Msp


def slow_msp(logits, temperature):
    powers = [(Decimal(float(z)) / Decimal(temperature)).exp() for z in logits]
    return -float(max(powers) / sum(powers))


@pytest.mark.parametrize("temperature", [1, 2.5])
def test_the_score_is_the_negative_probability_of_the_predicted_class(rows, temperature):
    expected = [slow_msp(logits, temperature) for logits in rows.query[LOGITS]]
    np.testing.assert_allclose(rows.score(Msp(temperature=temperature)), expected, rtol=1e-12)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 9999.0, -1e4], [-1e4, -1e4, -1e4], [1e4, -1e4, 0.0]])
    expected = [slow_msp(row, 1) for row in logits]
    score = Msp().fit(None)({LOGITS: logits})
    np.testing.assert_allclose(score, expected, rtol=1e-12)
