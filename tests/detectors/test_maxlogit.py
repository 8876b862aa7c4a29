import numpy as np

from pipeline.columns import LOGITS
from pipeline.detectors.maxlogit import MaxLogit


def test_the_score_is_the_negative_largest_logit(rows):
    expected = [-max(float(z) for z in logits) for logits in rows.query[LOGITS]]
    np.testing.assert_array_equal(rows.score(MaxLogit()), expected)


def test_large_logits_are_kept_exactly():
    logits = np.array([[1e4, 9999.0, -1e4], [-1e4, -1e4 - 1, -2e4]])
    np.testing.assert_array_equal(MaxLogit().fit(None)({LOGITS: logits}), [-1e4, 1e4])
