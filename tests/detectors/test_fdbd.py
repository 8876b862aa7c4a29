import math
from dataclasses import replace

import numpy as np

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.fdbd import Fdbd


def slow_fdbd(rows):
    """Distance to the boundary of the predicted class with each other class, one at a time."""
    train = rows.train[FEATURE].astype(np.float64)
    mean = [math.fsum(column) / len(train) for column in train.T.tolist()]
    weight = rows.weight.astype(np.float64)
    scores = []
    for feature, logits in zip(
        rows.query[FEATURE][:40].tolist(), rows.query[LOGITS][:40].astype(np.float64), strict=True
    ):
        top = int(np.argmax(logits))
        distances = []
        for other in range(len(logits)):
            length = math.dist(weight[top], weight[other])
            if length > 0:
                distances.append(abs(logits[top] - logits[other]) / length)
        scores.append(-math.fsum(distances) / len(distances) / math.dist(feature, mean))
    return scores


def test_the_score_is_the_mean_distance_to_the_boundaries_over_that_to_the_mean(rows):
    np.testing.assert_allclose(rows.score(Fdbd())[:40], slow_fdbd(rows), rtol=1e-9)


def test_classes_with_equal_weights_have_no_boundary(make_rows):
    rows = make_rows()
    weight = rows.weight.copy()
    weight[2] = weight[5]
    same = replace(rows, weight=weight)
    np.testing.assert_allclose(same.score(Fdbd())[:40], slow_fdbd(same), rtol=1e-9)
    none = replace(rows, weight=np.ones_like(weight))
    np.testing.assert_array_equal(none.score(Fdbd()), 0)


def test_a_feature_at_the_training_mean_scores_highest(make_rows):
    rows = make_rows()
    train = {**rows.train, FEATURE: np.ones_like(rows.train[FEATURE])}
    scorer = Fdbd().fit(replace(rows, train=train).training(Fdbd()))
    query = {**rows.query, FEATURE: rows.query[FEATURE].copy()}
    query[FEATURE][0] = 1
    score = scorer(query)
    assert score[0] == 0 == score.max()
