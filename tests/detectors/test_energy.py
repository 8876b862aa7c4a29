from decimal import Decimal

import numpy as np
import pytest

from pipeline.columns import LOGITS
from pipeline.detectors.energy import Energy


def slow_energy(logits, temperature):
    scale = Decimal(temperature)
    return -float(scale * sum((Decimal(float(z)) / scale).exp() for z in logits).ln())


@pytest.mark.parametrize("temperature", [1, 2.5])
def test_the_score_is_the_free_energy(rows, temperature):
    expected = [slow_energy(logits, temperature) for logits in rows.query[LOGITS]]
    np.testing.assert_allclose(rows.score(Energy(temperature=temperature)), expected, rtol=1e-12)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 9999.0, -1e4], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]])
    expected = [slow_energy(row, 1) for row in logits]
    np.testing.assert_allclose(Energy().fit(None)({LOGITS: logits}), expected, rtol=1e-12)
