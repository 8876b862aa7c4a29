import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import weibull_min

from pipeline.columns import LABEL, LOGITS, PREDICTION
from pipeline.detectors.openmax import OpenMax
from pipeline.errors import UserError


def weibull(values):
    """Shape and scale of maximum likelihood: the root of its derivative."""

    def slope(shape):
        power = (values / max(values)) ** shape
        return sum(power * np.log(values)) / sum(power) - 1 / shape - np.mean(np.log(values))

    shape = brentq(slope, 0.01, 1e4, xtol=1e-13)
    return shape, max(values) * np.mean((values / max(values)) ** shape) ** (1 / shape)


def slow_openmax(rows, tail, alpha):
    """Algorithms 1 and 2 of the paper, one class and one image at a time."""
    logits = rows.train[LOGITS].astype(np.float64)
    models = {}
    for c in range(len(rows.bias)):
        own = logits[(rows.train[LABEL] == c) & (rows.train[PREDICTION] == c)]
        if len(own) == 0:
            continue
        mean = own.mean(axis=0)
        count = tail or min(20, max(2, len(own) // 20))
        farthest = sorted(np.linalg.norm(own - mean, axis=1))[-count:]
        shift = min(farthest) - 1
        models[c] = mean, shift, *weibull(np.array(farthest) - shift)
    scores = []
    for z in rows.query[LOGITS].astype(np.float64):
        weight = np.ones(len(z))
        for i, c in enumerate(np.argsort(-z)[:alpha]):
            if c in models:
                mean, shift, shape, scale = models[c]
                cdf = weibull_min.cdf(np.linalg.norm(z - mean) - shift, shape, scale=scale)
                weight[c] = 1 - (alpha - i) / alpha * cdf
        unknown = float(sum(z * (1 - weight)))
        scores.append(unknown - math.log(sum(math.exp(each) for each in z * weight)))
    return scores


@pytest.mark.parametrize(("tail", "alpha"), [(None, 10), (20, 10), (3, 2), (2, 1)])
def test_the_score_is_the_log_odds_of_the_unknown_class(real, tail, alpha):
    expected = slow_openmax(real, tail, alpha)
    np.testing.assert_allclose(real.score(OpenMax(tail=tail, alpha=alpha)), expected, rtol=1e-6)


def test_a_longer_tail_is_fitted_too(blobs):
    expected = slow_openmax(blobs, 40, 5)
    np.testing.assert_allclose(blobs.score(OpenMax(tail=40)), expected, rtol=1e-6)


def test_a_tail_that_a_class_has_no_rows_for_is_refused(real):
    detector = OpenMax(tail=500)
    message = r"tail is 500, but 10 of 10 classes have fewer correct training rows: class \d has \d+\. Lower"
    with pytest.raises(UserError, match=message):
        detector.fit(real.training(detector))


def test_a_class_without_correct_rows_keeps_its_logit(make_rows):
    rows = make_rows()
    prediction = np.where(rows.train[LABEL] == 3, 4, rows.train[PREDICTION])
    scorer = OpenMax().fit(
        rows.__class__(**{**vars(rows), "train": {**rows.train, PREDICTION: prediction}}).training(OpenMax())
    )
    logits = np.full((1, 7), -5.0)
    logits[0, 3] = 50
    assert np.isinf(scorer.shift[3])
    assert scorer({LOGITS: logits})[0] < -50 + 7 * 6
