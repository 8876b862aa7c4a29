import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.base import bank_of
from pipeline.detectors.nnguide import LargestEnergy, NnGuide


def slow_nnguide(rows, k, kept):
    """Every inner product, one at a time; the largest are averaged."""

    def unit(row):
        return [x / math.hypot(*row) for x in row]

    train = [unit(row) for row in rows.train[FEATURE][kept].tolist()]
    weights = logsumexp(rows.train[LOGITS][kept].astype(np.float64), axis=1)
    energies = logsumexp(rows.query[LOGITS][:20].astype(np.float64), axis=1)
    scores = []
    for feature, energy in zip(rows.query[FEATURE][:20].tolist(), energies, strict=True):
        direction = unit(feature)
        similar = sorted(
            weight * math.fsum(a * b for a, b in zip(direction, other, strict=True))
            for other, weight in zip(train, weights, strict=True)
        )
        scores.append(-energy * math.fsum(similar[-k:]) / k)
    return scores


@pytest.mark.parametrize(("k", "share"), [(1, 1), (10, 1), (3, 0.2)])
def test_the_score_is_the_energy_times_the_mean_of_the_largest_inner_products(rows, k, share):
    detector = NnGuide(k=k, share=share)
    kept = bank_of(detector.fit(rows.training(detector))).keep(rows.train)
    np.testing.assert_allclose(rows.score(detector)[:20], slow_nnguide(rows, k, kept), rtol=1e-6, atol=1e-6)


def test_negative_energies_of_training_rows_push_away(make_rows):
    rows = make_rows()
    low = {**rows.train, LOGITS: rows.train[LOGITS] - np.float32(20)}
    shifted = replace(rows, train=low)
    score = shifted.score(NnGuide(k=5))[:20]
    np.testing.assert_allclose(score, slow_nnguide(shifted, 5, slice(None)), rtol=1e-6, atol=1e-5)


def test_the_draw_has_about_the_wanted_size_and_depends_on_the_seed_alone(real):
    draws = {}
    for seed in (0, 1):
        detector = NnGuide(share=0.2, seed=seed)
        keep = bank_of(detector.fit(real.training(detector))).keep
        draws[seed] = keep(real.train)
        halves = [
            {name: column[part] for name, column in real.train.items()}
            for part in (slice(300), slice(300, None))
        ]
        np.testing.assert_array_equal(np.concatenate([keep(half) for half in halves]), draws[seed])
        assert 80 < draws[seed].sum() < 160
    assert (draws[0] != draws[1]).any()


def test_the_largest_energy_is_that_of_all_parts(rows):
    measure = LargestEnergy().measure(None, None)
    parts = [{LOGITS: rows.train[LOGITS][part]} for part in (slice(50), slice(50, None))]
    merged = measure(parts[0]).merge(measure(parts[1]))
    expected = max(abs(logsumexp(row)) for row in rows.train[LOGITS].astype(np.float64))
    np.testing.assert_allclose(merged.energy, expected, rtol=1e-12)
