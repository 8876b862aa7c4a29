import math
from dataclasses import replace

import numpy as np

from pipeline.columns import LOGITS, PREDICTION
from pipeline.detectors.klmatching import KlMatching
from pipeline.learned.logits import softmax


def slow_kl_matching(rows):
    """Divergence to one class after the other."""
    classes = len(rows.bias)
    known = rows.train if rows.id_val is None else rows.id_val
    probability = softmax(known[LOGITS])
    means = []
    for k in range(classes):
        members = probability[known[PREDICTION] == k].tolist()
        if members:
            means.append([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
        else:
            means.append([1.0 if c == k else 0.0 for c in range(classes)])
    scores = []
    for p in softmax(rows.query[LOGITS][:40]).tolist():
        divergences = [
            math.fsum(
                a * (math.log(a) - math.log(max(b, 2.0**-1022))) for a, b in zip(p, q, strict=True) if a
            )
            for q in means
        ]
        scores.append(min(divergences))
    return scores


def test_the_score_is_the_divergence_from_the_closest_class(rows):
    np.testing.assert_allclose(rows.score(KlMatching())[:40], slow_kl_matching(rows), rtol=1e-9, atol=1e-12)


def test_held_out_rows_take_the_place_of_training_rows(rows):
    held_out = {name: column[:150] for name, column in rows.train.items()}
    calibrated = replace(rows, id_val=held_out)
    found = calibrated.score(KlMatching())[:40]
    np.testing.assert_allclose(found, slow_kl_matching(calibrated), rtol=1e-9, atol=1e-12)
    assert (found != rows.score(KlMatching())[:40]).any()


def test_a_class_that_is_never_predicted_has_its_one_hot_vector(make_rows):
    rows = make_rows()
    prediction = np.where(rows.train[PREDICTION] == 3, 4, rows.train[PREDICTION])
    without = replace(rows, train={**rows.train, PREDICTION: prediction})
    np.testing.assert_allclose(without.score(KlMatching())[:40], slow_kl_matching(without), rtol=1e-9)
    certain = {**rows.query, LOGITS: np.where(np.arange(7) == 3, 1e4, 0.0)[None]}
    assert replace(without, query=certain).score(KlMatching()) == [0]


def test_probabilities_of_zero_give_a_finite_score(make_rows):
    rows = make_rows(classes=2)
    train = {
        **rows.train,
        LOGITS: np.tile(np.array([[1e4, -1e4]]), (200, 1)),
        PREDICTION: np.zeros(200, np.int32),
    }
    query = {**rows.query, LOGITS: np.array([[0.0, 0.0], [-1e4, 1e4], [1e4, -1e4]])}
    score = replace(rows, train=train, query=query).score(KlMatching())
    assert np.isfinite(score).all()
    assert score[0] > score[1] == score[2] == 0
