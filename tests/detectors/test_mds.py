"""MDS, and what holds for its relatives `rmds`, `mds_l2` and `rmds_l2` as well."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LABEL
from pipeline.detectors.mds import Mds
from pipeline.detectors.mds_l2 import MdsL2
from pipeline.detectors.rmds import Rmds
from pipeline.detectors.rmds_l2 import RmdsL2
from pipeline.errors import UserError
from tests import slow


def test_the_score_is_the_distance_to_the_nearest_class_mean(rows):
    np.testing.assert_allclose(rows.score(Mds()), slow.mahalanobis(rows)[0], rtol=1e-6)


def degenerate(rows, how):
    feature, label = rows.train[FEATURE].copy(), rows.train[LABEL].copy()
    if how == "a dead and a doubled dimension":
        feature[:, 0], feature[:, 1] = 0, feature[:, 2]
    if how == "a class of one row":
        label[1:][label[1:] == label[0]] = (label[0] + 1) % 7
    if how == "a class without rows":
        label[label == 3] = 4
    return replace(rows, train={**rows.train, FEATURE: feature, LABEL: label})


@pytest.mark.parametrize("kind", [Mds, MdsL2, Rmds, RmdsL2])
@pytest.mark.parametrize(
    "how",
    [
        "a dead and a doubled dimension",
        "a class of one row",
        "a class without rows",
    ],
)
def test_singular_covariances_are_inverted_where_there_is_variance(make_rows, kind, how):
    rows = degenerate(make_rows(), how)
    own, background = slow.mahalanobis(rows, kind.unit)
    expected = own - background if kind.relative else own
    assert np.abs(own).max() < 1e6
    np.testing.assert_allclose(rows.score(kind()), expected, rtol=1e-6, atol=1e-6)


def test_a_mean_far_from_zero_changes_nothing(make_rows):
    near = make_rows()
    train, query = (np.round(part[FEATURE] * 64) / 64 for part in (near.train, near.query))

    def at(shift):
        columns = [(train + shift).astype(np.float32), (query + shift).astype(np.float32)]
        batches = [
            {**part, FEATURE: each} for part, each in zip((near.train, near.query), columns, strict=True)
        ]
        return replace(near, train=batches[0], query=batches[1])

    for kind in (Mds, Rmds):
        np.testing.assert_allclose(at(2**14).score(kind()), at(0).score(kind()), rtol=1e-7, atol=1e-9)


def test_training_rows_without_labels_are_refused(make_rows):
    rows = make_rows()
    label = rows.train[LABEL].copy()
    label[:3] = -1
    with pytest.raises(UserError, match="mds: the covariance within classes needs labels, got 3"):
        replace(rows, train={**rows.train, LABEL: label}).score(Mds())


@pytest.mark.parametrize("kind", [Mds, MdsL2, Rmds, RmdsL2])
@pytest.mark.parametrize("rows", [9, 23])
def test_too_few_rows_for_a_covariance_are_refused(make_rows, kind, rows):
    some = make_rows()
    label = np.arange(rows, dtype=np.int32) % 7
    few = replace(some, train={**some.train, FEATURE: some.train[FEATURE][:rows], LABEL: label})
    message = f"16 dimensions takes more rows than dimensions and classes together, got {rows} training rows"
    with pytest.raises(UserError, match=message):
        few.score(kind())


@pytest.mark.parametrize(("share", "refused"), [(1e-9, False), (1e-12, True), (0, True)])
def test_variance_within_classes_that_is_rounding_is_refused(make_rows, share, refused):
    """Features in float64 here: those that are stored have no such digits."""
    some = make_rows()
    means = 100 * np.random.default_rng(3).normal(size=(7, 16))
    within = np.random.default_rng(4).normal(size=some.train[FEATURE].shape) * 100 * share**0.5
    feature = means[some.train[LABEL]] + within
    query = {**some.query, FEATURE: feature + within[::-1]}
    rows = replace(some, train={**some.train, FEATURE: feature}, query=query)
    if refused:
        with pytest.raises(UserError, match=r"within classes is .* cannot be told from rounding in 16"):
            rows.score(Mds())
    else:
        np.testing.assert_allclose(rows.score(Mds()), slow.mahalanobis(rows)[0], rtol=1e-3)
