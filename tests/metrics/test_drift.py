"""Distances of distributions against SciPy; control charts against formulas, and how often they call."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.metrics.drift import BEYOND, DECISION, SLACK, Ranks, centre, chart


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", [1, 29, 30, 400])
def test_the_distance_is_that_of_scipy_however_the_scores_come(rows: int, ties: bool) -> None:
    rng = np.random.default_rng(rows)
    calibration, scores = rng.normal(size=50), rng.normal(0.5, 2, size=rows)
    if ties:
        calibration, scores = calibration.round(), scores.round()
    found = Ranks(np.append(calibration, np.nan))
    for part in np.array_split(np.append(scores, np.inf), 3):
        found.add(part)
    expected = stats.ks_2samp(calibration, scores, method="asymp")
    distance, p_value = found.distance()
    assert distance == pytest.approx(expected.statistic, rel=1e-12)
    assert p_value == (None if rows < 30 else pytest.approx(expected.pvalue, rel=1e-9))
    assert found.rows == rows


def test_scores_above_the_median_of_the_calibration_images_are_counted() -> None:
    ranks = Ranks(np.array([1.0, 2.0, 3.0]))
    ranks.add(np.array([0.5, 2.0, 2.5, 9.0]))
    assert ranks.above() == (2 + 1 / 2) / 4


def test_of_an_even_number_all_between_the_two_in_the_middle_is_the_median() -> None:
    ranks = Ranks(np.array([1.0, 2.0, 4.0, 5.0]))
    ranks.add(np.array([2.0, 2.5, 3.5, 4.0, 4.5, 9.0]))
    assert ranks.above() == (3 + 2 / 2) / 6
    tied = Ranks(np.array([1.0, 2.0, 2.0, 5.0]))
    tied.add(np.array([1.5, 2.0, 3.0]))
    assert tied.above() == (1 + 1 / 2) / 3


def test_of_no_scores_nothing_is_said() -> None:
    for calibration, scores in ([1.0, 2.0], []), ([np.nan], [1.0]):
        ranks = Ranks(np.array(calibration))
        ranks.add(np.array(scores))
        assert ranks.distance() == (0.0, None)
        assert math.isnan(ranks.above())


def test_the_centre_is_what_a_threshold_flags_at_most() -> None:
    """In 97.5 % of calibrations, the share of new images above the threshold is below it."""
    rng, n, rate = np.random.default_rng(0), 199, 0.05
    found = [np.sort(rng.uniform(size=n))[n - int(rate * (n + 1))] for _ in range(4000)]
    below = np.mean(1 - np.array(found) <= centre(rate, n))
    assert below == pytest.approx(0.975, abs=0.01)


def test_charts_are_those_of_the_formulas() -> None:
    images, flagged, middle = np.array([100, 50, 80]), np.array([9, 3, 30]), 0.06
    points = chart(["a", "b", "c"], images, flagged, middle)
    total = 0.0
    for point, count, hits in zip(points, images, flagged, strict=True):
        total = max(0, total + (hits - count * middle) / np.sqrt(count * middle * (1 - middle)) - SLACK)
        assert point.cusum == pytest.approx(total)
        assert stats.binom.sf(point.most, count, middle) <= BEYOND
        assert stats.binom.sf(point.most - 1, count, middle) > BEYOND
        assert point.signals == (hits > point.most or total > DECISION)
    assert [point.signals for point in points] == [False, False, True]


def test_in_control_few_dates_are_signals_and_a_lasting_change_is_found() -> None:
    rng, middle, dates = np.random.default_rng(1), 0.05, [str(n) for n in range(30)]
    images = np.full(30, 500)
    calm = [chart(dates, images, rng.binomial(images, middle), middle) for _ in range(300)]
    signalling = np.mean([any(point.signals for point in points) for points in calm])
    assert signalling < 0.15
    higher = [chart(dates, images, rng.binomial(images, 0.07), middle) for _ in range(50)]
    first = [next(n for n, point in enumerate(points) if point.signals) for points in higher]
    assert np.median(first) < 6
