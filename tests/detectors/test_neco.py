import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.neco import Neco
from pipeline.errors import UserError


@pytest.mark.parametrize("dim", [1, 5, 16])
def test_the_score_is_the_share_inside_times_the_largest_logit(rows, dim):
    train = rows.train[FEATURE].astype(np.float64)
    _, _, direction = np.linalg.svd(train - train.mean(axis=0), full_matrices=False)
    expected = []
    for row, logits in zip(rows.query[FEATURE].astype(np.float64), rows.query[LOGITS], strict=True):
        inside = sum((row @ each) ** 2 for each in direction[:dim]) ** 0.5
        expected.append(-inside / np.linalg.norm(row) * float(max(logits)))
    np.testing.assert_allclose(rows.score(Neco(dim=dim)), expected, rtol=1e-6)


def test_all_directions_leave_max_logit(make_rows):
    rows = make_rows()
    np.testing.assert_allclose(rows.score(Neco(dim=16)), -rows.query[LOGITS].max(axis=1), rtol=1e-6)


def test_more_directions_than_the_feature_has_are_refused(make_rows):
    with pytest.raises(UserError, match="dim is 17 but the feature has 16 dimensions"):
        make_rows(dim=16).score(Neco(dim=17))
