from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import FEATURE, LABEL
from pipeline.detectors.base import Pooled
from pipeline.detectors.mahalanobis_ensemble import MahalanobisEnsemble
from pipeline.detectors.mds import Mds
from pipeline.errors import UserError
from tests import slow

POOLED = Pooled().column


def by_stage(rows):
    """The rows with the pooled maps of one stage as their feature, for every stage."""
    start = 0
    for width in rows.stages.values():
        part = slice(start, start := start + width)
        yield replace(
            rows,
            train={**rows.train, FEATURE: rows.train[POOLED][:, part]},
            query={**rows.query, FEATURE: rows.query[POOLED][:, part]},
        )


def own_class_mean(stage):
    """Mean distance of training rows to their own class."""
    label = stage.train[LABEL]
    centred = stage.train[FEATURE].astype(np.float64)
    for c in np.unique(label):
        centred[label == c] -= centred[label == c].mean(axis=0)
    within = centred.T @ centred / len(centred)
    values, vectors = np.linalg.eigh(within)
    floor = 1e-12 * stage.train[FEATURE].astype(np.float64).var(axis=0).sum()
    kept = values > floor
    return np.mean([(((row @ vectors)[kept]) ** 2 / values[kept]).sum() for row in centred])


def test_the_score_is_the_sum_of_the_distances_over_their_means(rows):
    expected = sum(slow.mahalanobis(stage)[0] / own_class_mean(stage) for stage in by_stage(rows))
    np.testing.assert_allclose(rows.score(MahalanobisEnsemble()), expected, rtol=1e-6)


def test_given_weights_take_the_place_of_the_means(rows):
    weights = tuple(float(number) for number in range(-1, len(rows.stages) - 1))
    distances = [stage.score(Mds()) for stage in by_stage(rows)]
    expected = sum(weight * distance for weight, distance in zip(weights, distances, strict=True))
    np.testing.assert_allclose(
        rows.score(MahalanobisEnsemble(weights=weights)), expected, rtol=1e-9, atol=1e-9
    )


def test_a_weight_of_one_stage_alone_gives_its_mds(rows):
    for number, stage in enumerate(by_stage(rows)):
        weights = tuple(float(other == number) for other in range(len(rows.stages)))
        score = rows.score(MahalanobisEnsemble(weights=weights))
        np.testing.assert_allclose(score, stage.score(Mds()), rtol=1e-9)


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_a_wrong_number_of_weights_is_refused(make_rows, weights):
    with pytest.raises(
        UserError, match=rf"weights: {len(weights)} given; expected one for each of early, late"
    ):
        make_rows().score(MahalanobisEnsemble(weights=weights))


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(ValidationError, match="weights"):
        MahalanobisEnsemble(weights=(1.0, float("nan")))


def test_training_rows_without_labels_are_refused(make_rows):
    rows = make_rows()
    label = rows.train[LABEL].copy()
    label[:4] = -1
    with pytest.raises(
        UserError, match="mahalanobis_ensemble: the covariance within classes needs labels, got 4"
    ):
        replace(rows, train={**rows.train, LABEL: label}).score(MahalanobisEnsemble())


def test_a_stage_without_variance_is_refused_by_name(make_rows):
    rows = make_rows()
    pooled = rows.train[POOLED].copy()
    pooled[:, :8] = 1
    flat = replace(rows, train={**rows.train, POOLED: pooled})
    with pytest.raises(UserError, match="stage early: the variance of the 200 training rows within classes"):
        flat.score(MahalanobisEnsemble())
