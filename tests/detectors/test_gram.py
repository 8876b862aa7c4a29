import zlib
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import PREDICTION
from pipeline.detectors.base import Pooled
from pipeline.detectors.gram import Deviations, Gram, Ranges, held_out
from pipeline.errors import UserError
from pipeline.learned.statistics import Head, Statistics

POOLED = Pooled().column


def gram_rows(vector, widths, orders):
    """For every stage the sums of the rows of (f^q f^qᵀ), to the power 1 / q, of all orders."""
    stages, start = [], 0
    for width in widths:
        own, found = vector[start : start + width].astype(np.float64), []
        start += width
        for order in orders:
            for row in np.outer(own**order, own**order):
                found.append(np.sign(row.sum()) * abs(row.sum()) ** (1 / order))
        stages.append(np.array(found))
    return stages


def slow_gram(rows, orders=(1, 2, 3, 4, 5), count=40):
    """Deviations of the query from ranges by predicted class, over their mean on a tenth of the training."""
    widths = list(rows.stages.values())
    grams = [gram_rows(vector, widths, orders) for vector in rows.train[POOLED]]
    chosen = [zlib.crc32(vector.tobytes()) % 10 != 0 for vector in rows.train[POOLED]]
    kept = [
        (prediction, gram)
        for prediction, gram, take in zip(rows.train[PREDICTION], grams, chosen, strict=True)
        if take
    ]

    def deviations(prediction, found):
        known = [gram for other, gram in kept if other == prediction] or [gram for _, gram in kept]
        total = []
        for stage, values in enumerate(found):
            low = np.min([gram[stage] for gram in known], axis=0)
            high = np.max([gram[stage] for gram in known], axis=0)
            deviation = 0.0
            for value, smallest, largest in zip(values, low, high, strict=True):
                if value < smallest:
                    deviation += (smallest - value) / abs(smallest + 1e-6)
                if value > largest:
                    deviation += (value - largest) / abs(largest + 1e-6)
            total.append(deviation)
        return np.array(total)

    held = [
        deviations(prediction, gram)
        for prediction, gram, take in zip(rows.train[PREDICTION], grams, chosen, strict=True)
        if not take
    ]
    mean = np.mean(held, axis=0)
    query = zip(rows.query[PREDICTION][:count], rows.query[POOLED][:count], strict=True)
    return [
        (deviations(p, gram_rows(v, widths, orders)) / np.where(mean > 0, mean, 1)).sum() for p, v in query
    ]


@pytest.mark.parametrize("orders", [(1, 2, 3, 4, 5), (2,), (3, 1)])
def test_the_score_is_the_deviation_from_the_ranges_of_the_predicted_class(rows, orders):
    expected = slow_gram(rows, orders)
    assert max(expected) > 0
    np.testing.assert_allclose(rows.score(Gram(orders=orders))[:40], expected, rtol=1e-9)


def test_a_class_that_no_training_row_was_predicted_as_has_the_range_of_all(make_rows):
    rows = make_rows()
    keep = ~np.isin(rows.train[PREDICTION], [2, 6])
    fewer = replace(rows, train={name: column[keep] for name, column in rows.train.items()})
    assert {2, 6} <= set(rows.query[PREDICTION][:40])
    np.testing.assert_allclose(fewer.score(Gram())[:40], slow_gram(fewer), rtol=1e-9)


def test_a_training_row_that_counts_deviates_by_nothing(rows):
    own = replace(rows, query=rows.train).score(Gram())
    held = held_out(rows.train[POOLED])
    np.testing.assert_array_equal(own[~held], 0)
    assert own[held].max() > 0


def test_a_tenth_of_the_rows_is_held_out_whatever_stands_beside_them():
    rows = np.random.default_rng(0).normal(size=(20_000, 6)).astype(np.float32)
    held = held_out(rows)
    assert abs(held.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(held_out(rows[::-3]), held[::-3])
    np.testing.assert_array_equal(held_out(np.asfortranarray(rows)), held)


@pytest.mark.parametrize("by", ["row", "prediction"])
def test_merged_statistics_of_three_parts_are_those_of_all_rows(rows, by):
    order = np.arange(len(rows.train[PREDICTION]))
    if by == "prediction":  # most classes are missing in every part
        order = np.argsort(rows.train[PREDICTION], kind="stable")
    parts = [{name: column[part] for name, column in rows.train.items()} for part in np.array_split(order, 3)]
    head, orders = Head(rows.weight, rows.bias, tuple(rows.stages.values())), (1, 2, 3)
    measure = Ranges(orders).measure(head, Statistics())
    merged, whole = reduce(lambda a, b: a.merge(b), map(measure, parts)), measure(rows.train)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(merged.arrays()[name], array)

    measure = Deviations(orders).measure(head, Statistics({Ranges(orders): whole}))
    merged, whole = reduce(lambda a, b: a.merge(b), map(measure, parts)), measure(rows.train)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12)


def test_parts_without_rows_to_learn_from_change_nothing(make_rows):
    rows = make_rows()
    head, held = Head(rows.weight, rows.bias, (8, 8)), held_out(rows.train[POOLED])
    measure = Ranges((1, 2)).measure(head, Statistics())
    some, none = ({name: column[part] for name, column in rows.train.items()} for part in (~held, held))
    for merged in (measure(some).merge(measure(none)), measure(none).merge(measure(some))):
        np.testing.assert_array_equal(merged.low, measure(rows.train).low)
        np.testing.assert_array_equal(merged.high, measure(rows.train).high)


def test_training_images_that_are_all_held_out_are_too_few(make_rows):
    rows = make_rows()
    held = {name: column[held_out(rows.train[POOLED])] for name, column in rows.train.items()}
    with pytest.raises(UserError, match="too few training images"):
        Gram().fit(replace(rows, train=held).training(Gram()))


def test_orders_one_to_five_are_taken_by_default():
    assert Gram().orders == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("orders", [(), (0,), (1, -2), (1000,)])
def test_orders_without_a_meaning_are_refused(orders):
    with pytest.raises(ValidationError, match="orders"):
        Gram(orders=orders)
