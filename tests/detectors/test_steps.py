"""Steps before scores of logits."""

import pickle

import numpy as np
import pytest

from pipeline import detectors
from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors._steps import Step, combined
from pipeline.detectors.dice import Dice
from pipeline.detectors.energy import Energy
from pipeline.detectors.gradnorm import GradNorm
from pipeline.detectors.knn import Knn
from pipeline.detectors.maxlogit import MaxLogit
from pipeline.detectors.msp import Msp
from pipeline.detectors.react import React
from pipeline.detectors.vim import Vim
from pipeline.errors import UserError
from pipeline.learned.logits import logsumexp

STEPS = [name for name in detectors.names() if issubclass(detectors.get(name), Step)]


def masked(rows, p):
    weight = rows.weight.astype(np.float64)
    contribution = weight * rows.train[FEATURE].astype(np.float64).mean(axis=0)
    return weight * (contribution > np.percentile(contribution, p))


def test_the_known_steps_are_found():
    assert {"ash", "dice", "react", "scale", "vra"} <= set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_by_itself_is_the_energy_after_it(rows, name):
    step = detectors.get(name)()
    assert rows.score(step).tobytes() == rows.score(combined(Energy(), [step])).tobytes()


def test_dice_has_the_bits_of_the_masked_layer(rows):
    feature = rows.query[FEATURE].astype(np.float64)
    scorer = Dice(p=70).fit(rows.training(Dice()))
    expected = -logsumexp(feature @ scorer.weight.T + rows.bias.astype(np.float64))
    np.testing.assert_array_equal(scorer.weight, masked(rows, 70))
    assert rows.score(Dice(p=70)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("score", [Energy(temperature=2), Msp(), MaxLogit(), GradNorm()])
def test_every_score_of_logits_follows_clipping_and_sparsity(rows, score):
    feature = rows.query[FEATURE].astype(np.float64)
    bound = np.percentile(rows.train[FEATURE].astype(np.float64), 80)
    clipped = np.minimum(feature, bound)
    logits = clipped @ masked(rows, 10).T + rows.bias.astype(np.float64)
    expected = score.fit(rows.training(score))({FEATURE: clipped, LOGITS: logits})
    for steps in ([React(p=80), Dice(p=10)], [Dice(p=10), React(p=80)]):  # the mean of DICE is not clipped
        np.testing.assert_allclose(rows.score(combined(score, steps)), expected, rtol=1e-10)


def test_a_combination_is_pickled_and_names_all_it_depends_on(real):
    both = combined(Energy(temperature=2), [React(p=80), Dice(p=10)])
    assert both.model_dump() == {
        "score": {"energy": {"temperature": 2.0}},
        "steps": [{"react": {"p": 80.0, "c": None}}, {"dice": {"p": 10.0}}],
    }
    assert both.name == "react + dice + energy"
    assert both.caption == "ReAct (2021) + DICE (2022) + Energy (2020)"
    scorer = both.fit(real.training(both))
    assert pickle.loads(pickle.dumps(scorer))(real.query).tobytes() == scorer(real.query).tobytes()


@pytest.mark.parametrize("score", [Knn(), Vim(), Dice(), combined(Msp(), [React()])])
def test_scores_that_do_not_follow_from_logits_alone_are_refused(score):
    with pytest.raises(UserError, match="cannot follow steps; only a score of logits"):
        combined(score, [React()])


def test_what_is_no_step_is_refused():
    with pytest.raises(UserError, match="knn is no step"):
        combined(Energy(), [React(), Knn()])
