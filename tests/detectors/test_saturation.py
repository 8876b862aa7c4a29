"""Scores of probabilities keep the order of exact probabilities where these round to 0 and 1."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.entropy import Entropy
from pipeline.detectors.gen import Gen
from pipeline.detectors.msp import Msp
from pipeline.detectors.tempscale import TempScale
from tests import slow


def sharper(rows, factor):
    """The same network with a last layer that is so many times as large."""
    weight, bias = factor * rows.weight, factor * rows.bias

    def through(batch):
        return {**batch, LOGITS: (batch[FEATURE] @ weight.T + bias).astype(np.float32)}

    return replace(rows, weight=weight, bias=bias, train=through(rows.train), query=through(rows.query))


@pytest.mark.parametrize("factor", [20, 200])
@pytest.mark.parametrize(
    ("detector", "exact"),
    [
        (Msp(), slow.msp),
        (TempScale(), slow.msp),
        (Entropy(), slow.entropy),
        (Gen(), lambda logits: slow.gen(logits, 0.1, 100)),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_logits_times_a_factor_leave_the_exact_order(real, detector, exact, factor):
    rows = sharper(real, factor)
    temperature = 1.0
    if isinstance(detector, TempScale):
        temperature = detector.fit(rows.training(detector)).temperature
    some = rows.query[LOGITS][::2].astype(np.float64)
    expected = np.array([exact(row / temperature) for row in some])
    score = rows.score(detector)[::2]
    np.testing.assert_allclose(score, expected, rtol=1e-11)
    order = np.argsort(expected, kind="stable")
    apart = np.diff(expected[order]) > 1e-9 * np.abs(expected[order][1:])
    assert apart.mean() > 0.95
    assert (np.diff(score[order])[apart] > 0).all()
