import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.relation import Draw, Drawn, Hashes, Relation, hashes
from pipeline.learned.statistics import of

CHOICES = [{}, {"power": 4}, {"power": 0.5, "threshold": 0.2}, {"threshold": 0}, {"size": 70}]


def slow_relation(rows, drawn, power, threshold):
    """Every pair of a query and a drawn row, one at a time."""

    def unit(row):
        return [x / math.hypot(*row) for x in row]

    def probabilities(row):
        exponentials = [math.exp(z - max(row)) for z in row]
        return [each / math.fsum(exponentials) for each in exponentials]

    def inner(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def nodes(batch, positions):
        return [
            (unit(batch[FEATURE][i].tolist()), probabilities(batch[LOGITS][i].astype(float).tolist()))
            for i in positions
        ]

    bank, scores = nodes(rows.train, drawn), []
    for feature, probability in nodes(rows.query, range(20)):
        relations = [max(inner(feature, h), 0) * inner(probability, p) for h, p in bank]
        scores.append(-math.fsum(r**power for r in relations if r > threshold) / len(bank))
    return scores


@pytest.mark.parametrize("chosen", CHOICES)
def test_the_score_is_the_mean_relation_to_drawn_rows(rows, chosen):
    detector = Relation(**chosen)
    drawn = np.argsort(hashes(rows.train[FEATURE], 0))[: detector.size]
    expected = slow_relation(rows, drawn, detector.power, detector.threshold)
    np.testing.assert_allclose(rows.score(detector)[:20], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("size", [1, 40, 599, 600, 1000])
def test_the_draw_does_not_depend_on_how_rows_are_sliced(real, size):
    whole = of(real.train, Relation(size=size).statistics(), None)[Draw(size, 0)]
    slices = [slice(0, 1), slice(1, 300), slice(300, 310), slice(310, 600)]
    parts = [{name: column[part] for name, column in real.train.items()} for part in slices]
    known = of(real.train, [Hashes(size, 0)], None)
    total, *others = [Draw(size, 0).measure(None, known)(part) for part in parts]
    for other in others:
        total = total.merge(other)
    assert len(whole.hashed) == min(size, 600)
    for name, value in whole.arrays().items():
        np.testing.assert_array_equal(total.arrays()[name], value)
        assert total.arrays()[name].dtype == value.dtype


def test_rows_of_any_order_give_the_same_draw_and_another_seed_gives_another(real):
    turned = {name: column[::-1] for name, column in real.train.items()}
    draws = [
        of(batch, [Draw(100, seed)], None)[Draw(100, seed)]
        for batch, seed in [(real.train, 0), (turned, 0), (real.train, 1)]
    ]
    np.testing.assert_array_equal(draws[0].feature, draws[1].feature)
    shared = set(map(bytes, draws[0].feature)) & set(map(bytes, draws[2].feature))
    assert 5 < len(shared) < 35  # 100 * 100 / 600 by chance


def test_no_more_rows_than_wanted_are_kept_where_all_are_equal(make_rows):
    rows = make_rows()
    train = {**rows.train, FEATURE: np.ones_like(rows.train[FEATURE])}
    drawn = of(train, [Draw(30, 0)], None)[Draw(30, 0)]
    assert isinstance(drawn, Drawn)
    twice = drawn.merge(drawn)
    assert len(drawn.feature) == len(twice.feature) == len(twice.probability) == 30


def test_a_row_unlike_all_training_rows_is_related_to_none(make_rows):
    rows = make_rows()
    train = {**rows.train, FEATURE: np.abs(rows.train[FEATURE])}
    away = {**rows.query, FEATURE: -np.abs(rows.query[FEATURE])}
    assert (replace(rows, train=train, query=away).score(Relation(threshold=0)) == 0).all()
