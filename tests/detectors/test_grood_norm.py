import math

import numpy as np
import pytest

from pipeline.columns import FEATURE, LABEL
from pipeline.detectors.base import Mixup, bank_of
from pipeline.detectors.grood import Grood
from pipeline.detectors.grood_norm import GroodNorm


def slow_ood_probability(feature, classes, ood):
    near = [math.exp(-math.dist(feature, prototype)) for prototype in classes]
    strange = math.exp(-math.dist(feature, ood))
    return strange / (math.fsum(near) + strange)


def test_the_score_is_the_softmax_probability_of_the_ood_prototype(rows):
    label = rows.train[LABEL]
    classes = [rows.train[FEATURE][label == c].mean(axis=0, dtype=np.float64) for c in range(len(rows.bias))]
    expected = [slow_ood_probability(h, classes, rows.results[Mixup]["mean"]) for h in rows.query[FEATURE]]
    np.testing.assert_allclose(rows.score(GroodNorm()), expected, rtol=1e-10)


@pytest.mark.parametrize("prototype", ["mixup", "noise", "proto_mean", "ood_val"])
def test_the_score_is_the_length_of_groods_gradient(rows, prototype):
    grood = Grood(prototype=prototype)
    gradient = grood.fit(rows.training(grood)).bank.embed(rows.query)
    score = rows.score(GroodNorm(prototype=prototype))
    np.testing.assert_allclose(score, np.linalg.norm(gradient.astype(np.float64), axis=1), rtol=1e-6)


def test_its_pass_is_shared_with_grood():
    assert (
        GroodNorm(mixup_layer="layer2", samples=30).passes()
        == Grood(mixup_layer="layer2", samples=30).passes()
    )


def test_it_needs_no_neighbours(make_rows):
    rows = make_rows()
    assert bank_of(GroodNorm().fit(rows.training(GroodNorm()))) is None
