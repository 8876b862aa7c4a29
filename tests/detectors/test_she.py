import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LABEL, LOGITS, PREDICTION
from pipeline.detectors.she import She
from pipeline.errors import UserError


def slow_she(rows):
    """Patterns and inner products by definition; a class without correct rows has the pattern 0."""
    columns = (rows.train[FEATURE].tolist(), rows.train[LABEL].tolist(), rows.train[PREDICTION].tolist())
    train = list(zip(*columns, strict=True))
    scores = []
    for feature, logits in zip(rows.query[FEATURE][:40].tolist(), rows.query[LOGITS][:40], strict=True):
        predicted = int(np.argmax(logits))
        kept = [row for row, label, guess in train if label == guess == predicted]
        pattern = [math.fsum(column) / len(kept) for column in zip(*kept, strict=True)] or [0.0] * len(
            feature
        )
        scores.append(-math.fsum(a * b for a, b in zip(feature, pattern, strict=True)))
    return scores


def test_the_score_is_the_inner_product_with_the_mean_of_correct_rows(rows):
    np.testing.assert_allclose(rows.score(She())[:40], slow_she(rows), rtol=1e-9, atol=1e-10)


def test_rows_predicted_as_a_class_without_correct_rows_score_zero(make_rows):
    rows = make_rows()
    wrong = np.where(rows.train[LABEL] == 3, 4, rows.train[PREDICTION]).astype(np.int32)
    without = replace(rows, train={**rows.train, PREDICTION: wrong})
    score = without.score(She())
    of_three = rows.query[PREDICTION] == 3
    assert of_three.any()
    assert (score[of_three] == 0).all()
    np.testing.assert_allclose(score[:40], slow_she(without), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("label", [-1, None])
def test_training_rows_that_are_all_wrong_are_refused(make_rows, label):
    rows = make_rows()
    wrong = (rows.train[PREDICTION] + 1) % len(rows.bias)
    labels = wrong if label is None else np.full_like(wrong, label)
    with pytest.raises(UserError, match="rows that the classifier gets right, got none"):
        replace(rows, train={**rows.train, LABEL: labels}).score(She())
