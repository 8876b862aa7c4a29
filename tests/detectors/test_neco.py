from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.neco import Neco
from pipeline.errors import UserError


def slow_neco(rows, dim, standardise=True, of_feature=False, times_logit=False):
    """The authors' steps, one image at a time: standardise, project, compare lengths."""
    train = rows.train[FEATURE].astype(np.float64)
    mean, scale = train.mean(axis=0), train.std(axis=0) if standardise else np.ones(train.shape[1])
    scale[scale == 0] = 1
    _, _, direction = np.linalg.svd((train - mean) / scale, full_matrices=False)
    scores = []
    for row, logits in zip(rows.query[FEATURE].astype(np.float64), rows.query[LOGITS], strict=True):
        standardised = (row - mean) / scale
        inside = sum((standardised @ each) ** 2 for each in direction[:dim]) ** 0.5
        share = inside / np.linalg.norm(row if of_feature else standardised)
        scores.append(-share * (float(max(logits)) if times_logit else 1))
    return scores


@pytest.mark.parametrize("dim", [1, 5, 16])
def test_the_score_is_the_share_of_the_standardised_feature_inside(rows, dim):
    signed = bool((rows.train[FEATURE] < 0).any())
    expected = slow_neco(rows, dim, times_logit=signed)
    np.testing.assert_allclose(rows.score(Neco(dim=dim)), expected, rtol=1e-6)


def test_only_signed_features_are_multiplied_by_the_largest_logit_unless_told(real, make_rows):
    assert (real.score(Neco(dim=5)) >= -1).all()
    for rows in (real, make_rows()):
        for times_logit in (True, False):
            found = rows.score(Neco(dim=5, max_logit=times_logit))
            np.testing.assert_allclose(found, slow_neco(rows, 5, times_logit=times_logit), rtol=1e-6)


@pytest.mark.parametrize("standardise", [True, False])
def test_the_length_of_the_feature_divides_where_the_authors_take_it(rows, standardise):
    detector = Neco(dim=5, length="feature", standardise=standardise, max_logit=True)
    expected = slow_neco(rows, 5, standardise, of_feature=True, times_logit=True)
    np.testing.assert_allclose(rows.score(detector), expected, rtol=1e-6)


def test_it_is_not_maxlogit_behind_a_relu(real):
    """Of features that are not centred the share is 1 and a little, whatever the image."""
    ratio = real.score(Neco())
    assert ratio.std() > 0.01
    raw = real.query[FEATURE].astype(np.float64)
    _, _, direction = np.linalg.svd(raw - raw.mean(axis=0), full_matrices=False)
    inside = np.linalg.norm(raw @ direction[:64].T, axis=1) / np.linalg.norm(raw, axis=1)
    assert inside.std() < ratio.std() / 3


def test_directions_hold_a_share_of_the_variance(make_rows):
    rows = make_rows(rows=400)
    train = rows.train[FEATURE].astype(np.float64)
    held = np.cumsum(np.linalg.eigvalsh(np.corrcoef(train.T))[::-1])
    for share in (0.1, 0.5, 0.9):
        dim = next(d for d in range(1, 17) if held[d - 1] >= share * held[-1])
        np.testing.assert_array_equal(rows.score(Neco(share=share)), rows.score(Neco(dim=dim)))
    np.testing.assert_array_equal(rows.score(Neco(share=0.9)), rows.score(Neco()))


def test_dim_and_share_together_are_refused():
    with pytest.raises(ValidationError, match=r"dim is 5 and share is 0\.9; expected one of the two"):
        Neco(dim=5, share=0.9)


def test_more_directions_than_the_feature_has_are_refused(make_rows):
    with pytest.raises(UserError, match="dim is 17 but the feature has 16 dimensions"):
        make_rows(dim=16).score(Neco(dim=17))


def test_more_directions_than_the_rows_vary_in_are_refused(make_rows):
    rows = make_rows()
    few = replace(rows, train={name: column[:9] for name, column in rows.train.items()})
    with pytest.raises(UserError, match=r"dim is 9, .* 9 rows were found to vary in 8 of 16"):
        few.score(Neco(dim=9))
    assert np.isfinite(few.score(Neco(dim=8))).all()


def test_a_dead_dimension_is_not_divided_by_zero(make_rows):
    rows = make_rows()
    feature = rows.train[FEATURE].copy()
    feature[:, 2] = 3
    dead = replace(rows, train={**rows.train, FEATURE: feature})
    np.testing.assert_allclose(dead.score(Neco(dim=5)), slow_neco(dead, 5, times_logit=True), rtol=1e-6)
