import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors.residual import Residual
from pipeline.errors import UserError


def slow_residual(rows, dim, feature):
    """Distance to the affine principal subspace, by removing one direction after the other."""
    weight, bias = rows.weight.astype(np.float64), rows.bias.astype(np.float64)
    origin = -np.linalg.lstsq(weight, bias, rcond=None)[0]
    train = rows.train[FEATURE].astype(np.float64) - origin
    _, _, direction = np.linalg.svd(train, full_matrices=False)
    lengths = []
    for row in feature.astype(np.float64) - origin:
        for each in direction[:dim]:
            row = row - (row @ each) * each
        lengths.append(np.linalg.norm(row))
    return np.array(lengths)


@pytest.mark.parametrize("dim", [1, 7, 15])
def test_the_score_is_the_length_outside_the_principal_subspace(rows, dim):
    expected = slow_residual(rows, dim, rows.query[FEATURE])
    np.testing.assert_allclose(rows.score(Residual(dim=dim)), expected, rtol=1e-6)


def test_the_usual_subspace_is_half_of_a_small_feature(real):
    half = real.weight.shape[1] // 2
    if real.weight.shape[1] >= 768:
        half = 512
    np.testing.assert_array_equal(real.score(Residual()), real.score(Residual(dim=half)))


def test_a_subspace_as_large_as_the_feature_is_refused(make_rows):
    rows = make_rows(dim=16)
    with pytest.raises(UserError, match="dim is 16 but the feature has 16 dimensions"):
        rows.score(Residual(dim=16))
