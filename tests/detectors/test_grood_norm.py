from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.special import expit

from pipeline.columns import FEATURE, LABEL, SharedBatch
from pipeline.detectors import grood
from pipeline.detectors.base import Mixup, bank_of
from pipeline.detectors.grood import Grood
from pipeline.detectors.grood_norm import GroodNorm, GroodNormScorer


def slow_log_odds(feature, classes, ood):
    """Of the softmax over negative distances, with 60 digits."""
    with localcontext(prec=60):

        def distance(prototype):
            pairs = zip(feature.tolist(), prototype.tolist(), strict=True)
            return sum((Decimal(h) - Decimal(p)) ** 2 for h, p in pairs).sqrt()

        to_ood = distance(ood)
        return -float(sum((to_ood - distance(prototype)).exp() for prototype in classes).ln())


def prototypes(rows):
    feature, label = rows.train[FEATURE].astype(np.float64), rows.train[LABEL]
    return [feature[label == c].mean(axis=0) for c in range(len(rows.bias))]


def test_the_score_is_the_log_odds_of_the_ood_prototype(rows):
    classes, ood = prototypes(rows), rows.results[Mixup]["mean"]
    expected = [slow_log_odds(h, classes, ood) for h in rows.query[FEATURE][::10]]
    np.testing.assert_allclose(rows.score(GroodNorm())[::10], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1e4, 1e9, 1e15])
def test_long_features_keep_all_digits(make_rows, factor):
    rows = make_rows()
    query = {**rows.query, FEATURE: (factor * rows.query[FEATURE][:20]).astype(np.float32)}
    classes, ood = prototypes(rows), rows.results[Mixup]["mean"]
    expected = [slow_log_odds(h, classes, ood) for h in query[FEATURE]]
    np.testing.assert_allclose(replace(rows, query=query).score(GroodNorm()), expected, rtol=1e-10)


def test_networks_with_long_features_keep_the_order(make_rows):
    near = make_rows()
    batches = {
        name: {**getattr(near, name), FEATURE: 1000 * getattr(near, name)[FEATURE]}
        for name in ("train", "query")
    }
    results = {**near.results, Mixup: {**near.results[Mixup], "mean": 1000 * near.results[Mixup]["mean"]}}
    rows = replace(near, results=results, **batches)
    classes, ood = prototypes(rows), rows.results[Mixup]["mean"]
    expected = [slow_log_odds(h, classes, ood) for h in rows.query[FEATURE][:40]]
    score = rows.score(GroodNorm())
    np.testing.assert_allclose(score[:40], expected, rtol=1e-9)
    assert len(set(score)) == len(score)


@pytest.mark.parametrize("prototype", ["mixup", "noise", "proto_mean", "ood_val"])
def test_the_score_is_the_log_odds_of_the_length_of_groods_gradient(rows, prototype):
    grood = Grood(prototype=prototype)
    gradient = grood.fit(rows.training(grood)).bank.embed(rows.query)
    score = rows.score(GroodNorm(prototype=prototype))
    length = np.linalg.norm(gradient.astype(np.float64), axis=1)
    np.testing.assert_allclose(expit(score), length, rtol=1e-6)


def test_its_products_are_shared_with_grood_and_have_the_same_bits(rows, monkeypatch):
    scorer = Grood().fit(rows.training(Grood()))
    own = GroodNormScorer(scorer.prototypes)
    expected = scorer.bank.queries(rows.query), own(rows.query)
    sums, compute = [], grood.logsumexp
    monkeypatch.setattr(grood, "logsumexp", lambda values: (sums.append(1), compute(values))[1])
    batch = SharedBatch(rows.query)
    found = scorer.bank.queries(batch), own(batch.adding({}))
    assert sums == [1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_its_pass_is_shared_with_grood():
    assert (
        GroodNorm(mixup_layer="layer2", samples=30).passes()
        == Grood(mixup_layer="layer2", samples=30).passes()
    )


def test_it_needs_no_neighbours(make_rows):
    rows = make_rows()
    assert bank_of(GroodNorm().fit(rows.training(GroodNorm()))) is None
