import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LABEL
from pipeline.detectors.cosine import Cosine
from pipeline.errors import UserError


def slow_cosine(rows, direction):
    """One image, one class at a time."""
    if direction == "weight":
        vectors = rows.weight.tolist()
    else:
        vectors = []
        for label in range(len(rows.bias)):
            members = rows.train[FEATURE][rows.train[LABEL] == label].tolist()
            if members:
                vectors.append([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
    scores = []
    for feature in rows.query[FEATURE][:40].tolist():
        cosines = [
            math.fsum(a * b for a, b in zip(feature, vector, strict=True))
            / math.hypot(*feature)
            / math.hypot(*vector)
            for vector in vectors
        ]
        scores.append(-max(cosines))
    return scores


@pytest.mark.parametrize("direction", ["mean", "weight"])
def test_the_score_is_the_negative_largest_cosine_to_a_class(rows, direction):
    score = rows.score(Cosine(direction=direction))
    np.testing.assert_allclose(score[:40], slow_cosine(rows, direction), rtol=1e-9, atol=1e-12)
    assert (np.abs(score) <= 1 + 1e-12).all()


def test_a_class_without_training_rows_is_left_out(make_rows):
    rows = make_rows()
    some = {name: column[rows.train[LABEL] != 3] for name, column in rows.train.items()}
    without = replace(rows, train=some)
    np.testing.assert_allclose(without.score(Cosine())[:40], slow_cosine(without, "mean"), rtol=1e-9)


def test_class_means_without_labels_are_refused(make_rows):
    rows = make_rows()
    unlabelled = {**rows.train, LABEL: np.full_like(rows.train[LABEL], -1)}
    with pytest.raises(UserError, match="set direction to weight"):
        replace(rows, train=unlabelled).score(Cosine())
    assert np.isfinite(replace(rows, train=unlabelled).score(Cosine(direction="weight"))).all()
