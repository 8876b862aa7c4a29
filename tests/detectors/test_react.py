from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors._steps import combined
from pipeline.detectors.dice import Dice
from pipeline.detectors.energy import Energy
from pipeline.detectors.react import React
from tests import slow


@pytest.mark.parametrize("p", [0, 50, 90, 99.7, 100])
def test_the_score_is_the_energy_of_clipped_features(rows, p):
    bound = slow.percentile(rows, p)
    expected = [
        slow.energy(slow.logits(rows, [min(h, bound) for h in feature]))
        for feature in rows.query[FEATURE][:40].tolist()
    ]
    np.testing.assert_allclose(rows.score(React(p=p))[:40], expected, rtol=1e-10)


def test_a_given_bound_needs_no_training_rows(rows):
    detector = React(c=1.0)
    assert not detector.needs_train()
    expected = [
        slow.energy(slow.logits(rows, [min(h, 1.0) for h in feature]))
        for feature in rows.query[FEATURE][:40].tolist()
    ]
    np.testing.assert_allclose(rows.score(detector)[:40], expected, rtol=1e-10)


def test_a_given_bound_goes_with_dice(real):
    weight = Dice(p=10).weigh(real.weight.astype(np.float64), real.training(Dice()))
    expected = [
        slow.energy(slow.logits(real, [min(h, 1.0) for h in feature], weight.tolist()))
        for feature in real.query[FEATURE][:40].tolist()
    ]
    score = real.score(combined(Energy(), [React(c=1.0), Dice(p=10)]))
    np.testing.assert_allclose(score[:40], expected, rtol=1e-9)


def test_a_percentile_that_clips_most_activations_is_noticed(make_rows):
    dense = make_rows()
    rare = np.random.default_rng(0).random(dense.train[FEATURE].shape) < 0.15
    sparse = np.where(rare, np.abs(dense.train[FEATURE]), 0).astype(np.float32)
    rows = replace(dense, train={**dense.train, FEATURE: sparse})
    for detector in (React(), combined(Energy(), [React(), Dice()])):
        training = rows.training(detector)
        notice = detector.notices(training)[0]
        assert notice.startswith("p = 90 clips 6") and "give the bound itself as c" in notice
    assert React(p=99).notices(rows.training(React(p=99))) == ()
    assert React(c=0.1).notices(rows.training(React(c=0.1))) == ()
    assert React().notices(dense.training(React())) == ()
