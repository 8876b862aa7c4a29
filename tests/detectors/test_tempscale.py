from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.columns import LABEL, LOGITS
from pipeline.detectors.tempscale import TempScale


def nll(rows, temperature):
    logits = rows.train[LOGITS].astype(np.float64) / temperature
    return -sum(log_softmax(row)[label] for row, label in zip(logits, rows.train[LABEL], strict=True))


@pytest.mark.parametrize("sharper", [0.1, 0.37, 1, 4])
def test_the_temperature_minimises_the_nll_of_the_training_rows(rows, sharper):
    train = {**rows.train, LOGITS: rows.train[LOGITS] * np.float32(sharper)}
    rows = replace(rows, train=train)
    found = TempScale().fit(rows.training(TempScale())).temperature
    best = minimize_scalar(
        lambda log: nll(rows, np.exp(log)),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert nll(rows, found) <= best.fun * (1 + 1e-12)
    step = 1e-4
    slope = (nll(rows, found * (1 + step)) - nll(rows, found * (1 - step))) / (2 * step)
    curvature = (nll(rows, found * (1 + step)) + nll(rows, found * (1 - step)) - 2 * nll(rows, found)) / (
        step**2
    )
    assert abs(slope / curvature) < 1e-5


def test_the_score_is_msp_at_that_temperature(rows):
    temperature = TempScale().fit(rows.training(TempScale())).temperature
    expected = -softmax(rows.query[LOGITS].astype(np.float64) / temperature, axis=1).max(axis=1)
    np.testing.assert_allclose(rows.score(TempScale()), expected, rtol=1e-12)


def test_a_classifier_that_is_always_right_or_never_gets_the_temperature_at_a_bound(make_rows):
    rows = make_rows()
    for label, bound in ((rows.train[LOGITS].argmax(axis=1), 0.05), (rows.train[LOGITS].argmin(axis=1), 20)):
        right = replace(rows, train={**rows.train, LABEL: label.astype(np.int32)})
        assert TempScale().fit(right.training(TempScale())).temperature == pytest.approx(bound)
