import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.entropy import Entropy


def slow_entropy(logits, temperature):
    """The definition with so many digits that nothing is lost in the logarithm of a p near 1."""
    with localcontext(prec=60):
        shares = [((Decimal(z) - Decimal(max(logits))) / Decimal(temperature)).exp() for z in logits]
        probabilities = [share / sum(shares) for share in shares]
        return float(-sum(p * p.ln() for p in probabilities))


@pytest.mark.parametrize("temperature", [0.5, 1, 1000])
def test_the_score_is_the_entropy_of_the_softmax(rows, temperature):
    expected = [slow_entropy(row, temperature) for row in rows.query[LOGITS][:40].astype(np.float64).tolist()]
    np.testing.assert_allclose(rows.score(Entropy(temperature=temperature))[:40], expected, rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_equal_logits_have_the_highest_entropy(classes):
    batch = {LOGITS: np.full((1, classes), 7, dtype=np.float32)}
    np.testing.assert_allclose(Entropy().fit(None)(batch), [math.log(classes)], rtol=1e-12)


def test_a_certain_prediction_has_no_entropy():
    np.testing.assert_array_equal(Entropy().fit(None)({LOGITS: np.array([[1e4, 0, -1e4]])}), [0])
