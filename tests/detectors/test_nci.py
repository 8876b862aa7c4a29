import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.nci import Nci


def slow_nci(rows, alpha):
    train = rows.train[FEATURE].astype(np.float64)
    mean = [math.fsum(column) / len(train) for column in train.T.tolist()]
    scores = []
    for feature, logits in zip(rows.query[FEATURE][:40].tolist(), rows.query[LOGITS][:40], strict=True):
        weight = rows.weight[int(np.argmax(logits))].tolist()
        centred = [h - m for h, m in zip(feature, mean, strict=True)]
        proximity = math.fsum(w * x for w, x in zip(weight, centred, strict=True)) / math.hypot(*centred)
        scores.append(-proximity - alpha * math.fsum(map(abs, feature)))
    return scores


@pytest.mark.parametrize("alpha", [0, 0.001, 0.1])
def test_the_score_is_proximity_to_the_weight_and_norm(rows, alpha):
    np.testing.assert_allclose(
        rows.score(Nci(alpha=alpha))[:40], slow_nci(rows, alpha), rtol=1e-9, atol=1e-10
    )


def test_a_feature_at_the_training_mean_has_only_its_norm(make_rows):
    rows = make_rows(dim=16)
    ones = {**rows.train, FEATURE: np.ones_like(rows.train[FEATURE])}
    score = replace(rows, train=ones, query=ones).score(Nci(alpha=0.1))
    np.testing.assert_allclose(score, -1.6, rtol=1e-12)
