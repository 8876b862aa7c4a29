from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pipeline.columns import LABEL, LOGITS
from pipeline.detectors.tempscale import TempScale
from tests import slow


def nll(batch, temperature):
    logits = batch[LOGITS].astype(np.float64) / temperature
    return -sum(log_softmax(row)[label] for row, label in zip(logits, batch[LABEL], strict=True))


def check_minimum(batch, found):
    """Whether a temperature minimises the NLL of some rows."""
    best = minimize_scalar(
        lambda log: nll(batch, np.exp(log)),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert nll(batch, found) <= best.fun * (1 + 1e-12)
    step = 1e-4
    around = nll(batch, found * (1 + step)), nll(batch, found * (1 - step))
    slope = (around[0] - around[1]) / (2 * step)
    curvature = (sum(around) - 2 * nll(batch, found)) / step**2
    assert abs(slope / curvature) < 1e-5


@pytest.mark.parametrize("sharper", [0.1, 0.37, 1, 4])
def test_the_temperature_minimises_the_nll_of_the_training_rows(rows, sharper):
    train = {**rows.train, LOGITS: rows.train[LOGITS] * np.float32(sharper)}
    rows = replace(rows, train=train)
    check_minimum(train, TempScale().fit(rows.training(TempScale())).temperature)


def test_held_out_rows_take_the_place_of_training_rows(rows):
    half = len(rows.train[LABEL]) // 2
    held_out = {name: column[half:] for name, column in rows.train.items()}
    found = TempScale().fit(replace(rows, id_val=held_out).training(TempScale())).temperature
    check_minimum(held_out, found)
    assert found != TempScale().fit(rows.training(TempScale())).temperature


def test_the_score_is_msp_at_that_temperature(rows):
    temperature = TempScale().fit(rows.training(TempScale())).temperature
    expected = [slow.msp(logits, temperature) for logits in rows.query[LOGITS]]
    np.testing.assert_allclose(rows.score(TempScale()), expected, rtol=1e-12)


def test_a_classifier_that_is_always_right_or_never_gets_the_temperature_at_a_bound(make_rows):
    rows = make_rows()
    for label, bound in ((rows.train[LOGITS].argmax(axis=1), 0.05), (rows.train[LOGITS].argmin(axis=1), 20)):
        right = replace(rows, train={**rows.train, LABEL: label.astype(np.int32)})
        assert TempScale().fit(right.training(TempScale())).temperature == pytest.approx(bound)
