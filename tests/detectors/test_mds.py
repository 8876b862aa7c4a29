"""MDS and its relatives: `rmds`, `mds_l2` and `rmds_l2`."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LABEL
from pipeline.detectors.mds import Mds
from pipeline.detectors.mds_l2 import MdsL2
from pipeline.detectors.rmds import Rmds
from pipeline.detectors.rmds_l2 import RmdsL2
from pipeline.errors import UserError


def slow_distances(rows, unit):
    """Smallest distance to a class mean, and distance to the mean of all; one row, one class at a time."""

    def prepared(feature):
        feature = feature.astype(np.float64)
        return feature / np.linalg.norm(feature, axis=1, keepdims=True) if unit else feature

    train, label, query = prepared(rows.train[FEATURE]), rows.train[LABEL], prepared(rows.query[FEATURE])
    classes = np.unique(label)
    means = [train[label == c].mean(axis=0) for c in classes]
    within, total = np.zeros((train.shape[1],) * 2), np.zeros((train.shape[1],) * 2)
    for row, c in zip(train, label, strict=True):
        offset = row - means[np.searchsorted(classes, c)]
        within += np.outer(offset, offset) / len(train)
        total += np.outer(row - train.mean(axis=0), row - train.mean(axis=0)) / len(train)
    floor = 1e-12 * np.trace(total)
    inverse, common = (
        np.linalg.pinv(each, rcond=floor / (np.linalg.norm(each, 2) + 1e-300), hermitian=True)
        for each in (within, total)
    )
    own, background = [], []
    for row in query:
        own.append(min((row - mean) @ inverse @ (row - mean) for mean in means))
        background.append((row - train.mean(axis=0)) @ common @ (row - train.mean(axis=0)))
    return np.array(own), np.array(background)


@pytest.mark.parametrize("unit", [False, True])
def test_scores_are_the_distances_of_a_loop(rows, unit):
    own, background = slow_distances(rows, unit)
    near, relative = (MdsL2, RmdsL2) if unit else (Mds, Rmds)
    np.testing.assert_allclose(rows.score(near()), own, rtol=1e-6)
    scale = np.abs(own) + np.abs(background)
    assert (np.abs(rows.score(relative()) - (own - background)) <= 1e-6 * scale).all()


def degenerate(rows, how):
    feature, label = rows.train[FEATURE].copy(), rows.train[LABEL].copy()
    if how == "duplicated rows":
        feature[:] = feature[label]
    if how == "a dead and a doubled dimension":
        feature[:, 0], feature[:, 1] = 0, feature[:, 2]
    if how == "a class of one row":
        label[1:][label[1:] == label[0]] = (label[0] + 1) % 7
    if how == "a class without rows":
        label[label == 3] = 4
    if how == "fewer rows than dimensions":
        feature, label = feature[:9], label[:9]
    return replace(rows, train={**rows.train, FEATURE: feature, LABEL: label})


@pytest.mark.parametrize("kind", [Mds, MdsL2, Rmds, RmdsL2])
@pytest.mark.parametrize(
    "how",
    [
        "duplicated rows",
        "a dead and a doubled dimension",
        "a class of one row",
        "a class without rows",
        "fewer rows than dimensions",
    ],
)
def test_singular_covariances_are_inverted_where_there_is_variance(make_rows, kind, how):
    rows = degenerate(make_rows(), how)
    own, background = slow_distances(rows, kind.unit)
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
