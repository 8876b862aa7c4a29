import math

import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors.base import Training
from pipeline.detectors.dice import Dice
from pipeline.learned.statistics import Classes, ClassSums, Statistics


def slow_dice(rows, p):
    """Sparsification by definition: one weight, one class, one image at a time."""
    classes, dim = rows.weight.shape
    train = rows.train[FEATURE].tolist()
    mean = [math.fsum(row[j] for row in train) / len(train) for j in range(dim)]
    weight = rows.weight.tolist()
    contribution = [[weight[c][j] * mean[j] for j in range(dim)] for c in range(classes)]
    threshold = np.percentile([v for row in contribution for v in row], p)
    scores = []
    for feature in rows.query[FEATURE][:40].tolist():
        logits = rows.bias.tolist()
        for c in range(classes):
            for j in range(dim):
                if contribution[c][j] > threshold:
                    logits[c] += weight[c][j] * feature[j]
        scores.append(-math.log(math.fsum(math.exp(z) for z in logits)))
    return scores


@pytest.mark.parametrize("p", [0, 70, 90, 99.5])
def test_the_score_is_the_energy_of_the_largest_contributions(rows, p):
    np.testing.assert_allclose(rows.score(Dice(p=p))[:40], slow_dice(rows, p), rtol=1e-10, atol=1e-10)


def test_contributions_equal_to_the_threshold_are_dropped():
    sums = ClassSums(
        class_count=np.array([1, 1]),
        class_sum=np.array([[2.0, 2.0], [0.0, 2.0]]),
        unlabelled_count=np.array(0),
        unlabelled_sum=np.zeros(2),
    )
    weight = np.array([[1, 0.5], [1, 2]], dtype=np.float32)
    bias = np.array([0.25, -0.5], dtype=np.float32)
    scorer = Dice(p=50).fit(Training(weight=weight, bias=bias, train=Statistics({Classes(): sums})))
    # Mean feature (1, 2): the contributions are 1, 1, 1 and 4, their median 1.
    expected = -math.log(math.exp(0.25) + math.exp(-0.5 + 2 * 3))
    np.testing.assert_allclose(
        scorer({FEATURE: np.array([[5, 3]], dtype=np.float32)}), [expected], rtol=1e-12
    )
