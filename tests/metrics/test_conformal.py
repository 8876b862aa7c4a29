"""Conformal p-values and thresholds against their definitions, and their promise in simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from pipeline.metrics.conformal import Calibration, discoveries, needed
from pipeline.results.verify._calibration import largest

RATES = (0.01, 0.05, 0.1, 0.3)


def drawn(seed: int, n: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    found = random.normal(size=(2, n))
    calibration, tested = np.round(found, 1) if ties else found
    return calibration, tested


@pytest.mark.parametrize("ties", [False, True])
def test_p_values_count_calibration_scores_that_are_at_least_as_high(ties: bool) -> None:
    calibration, tested = drawn(0, 200, ties)
    slow = [(1 + sum(c >= t for c in calibration)) / 201 for t in tested]
    assert Calibration(calibration).p_values(tested).tolist() == slow


@pytest.mark.parametrize("n", [1, 9, 19, 20, 99, 100, 199])
@pytest.mark.parametrize("ties", [False, True])
def test_flags_are_the_p_values_that_do_not_exceed_the_rate(n: int, ties: bool) -> None:
    calibration, _ = drawn(n, n, ties)
    _, tested = drawn(1, 500, ties)
    found = Calibration(calibration)
    for rate in RATES:
        flagged = found.flags(rate, tested)
        # In integers: (1 + above) / (n + 1) <= rate.
        above = np.array([np.sum(calibration >= each) for each in tested])
        assert flagged.tolist() == ((1 + above) * 100 <= round(rate * 100) * (n + 1)).tolist()
        assert flagged.tolist() == (tested > found.thresholds(rate)[-1]).tolist()


def test_the_threshold_is_the_conformal_quantile() -> None:
    found = Calibration(np.arange(1.0, 100.0))  # 99 scores: (n + 1)(1 - rate) = 95
    assert found.thresholds(0.05) == {-1: 95.0}


def test_too_few_calibration_images_flag_nothing() -> None:
    assert [needed(rate) for rate in (0.01, 0.05, 0.3, 0.5)] == [99, 19, 3, 1]
    for rate in (0.01, 0.05):
        enough = needed(rate)
        assert Calibration(np.zeros(enough)).flags(rate, np.ones(1)).tolist() == [True]
        assert Calibration(np.zeros(enough - 1)).thresholds(rate) == {-1: math.inf}


def test_scores_that_are_not_finite_do_not_count() -> None:
    found = Calibration(np.array([1.0, np.nan, 2.0, np.inf]))
    assert found.p_values(np.array([1.5, np.nan, np.inf])).tolist()[0] == 2 / 3
    assert np.isnan(found.p_values(np.array([np.nan, np.inf]))).all()
    assert found.flags(0.5, np.array([np.nan, np.inf, 3.0])).tolist() == [False, False, True]


def test_by_class_each_image_is_compared_with_its_own() -> None:
    random = np.random.default_rng(3)
    classes = random.integers(0, 3, 300)
    scores = random.normal(size=300) + 10 * classes
    found = Calibration(scores, classes)
    tested, predicted = random.normal(size=50) + 10, random.integers(0, 4, 50)
    slow = [
        (1 + sum(scores[classes == c] >= t)) / (1 + sum(classes == c))
        for t, c in zip(tested, predicted, strict=True)
    ]
    assert found.p_values(tested, predicted).tolist() == slow
    assert found.p_values(tested, predicted)[predicted == 3].tolist() == [1.0] * sum(predicted == 3)
    assert set(found.thresholds(0.05)) == {0, 1, 2}


@pytest.mark.parametrize("n", [50, 200, 1000, 5000])
def test_false_alarms_keep_to_the_rate(n: int) -> None:
    """Over many calibration sets, the mean share of false alarms is ⌊a(n + 1)⌋ / (n + 1), a or just below."""
    random = np.random.default_rng(n)
    trials = 500
    for rate in (0.05, 0.1):
        flagged = [
            Calibration(random.normal(size=n)).flags(rate, random.normal(size=20)).mean()
            for _ in range(trials)
        ]
        truth = math.floor(rate * (n + 1) + 1e-9) / (n + 1)
        assert truth <= rate
        assert np.mean(flagged) == pytest.approx(truth, abs=4 * np.std(flagged) / math.sqrt(trials))


def test_by_class_false_alarms_keep_to_the_rate_in_every_class() -> None:
    """Where one threshold for all does not: the classes have scores of their own."""
    random, trials, rate = np.random.default_rng(0), 300, 0.1
    classes = np.repeat([0, 1, 2], [100, 40, 60])
    by_class, whole = np.empty((2, trials, 3))
    for trial in range(trials):
        scores, tested = random.normal(size=(2, 200)) * (1 + classes)
        for flags, found in (
            (Calibration(scores, classes).flags(rate, tested, classes), by_class),
            (Calibration(scores).flags(rate, tested), whole),
        ):
            found[trial] = [flags[classes == each].mean() for each in range(3)]
    for each, count in enumerate((100, 40, 60)):
        truth = math.floor(rate * (count + 1) + 1e-9) / (count + 1)
        slack = 4 * by_class[:, each].std() / math.sqrt(trials)
        assert by_class[:, each].mean() == pytest.approx(truth, abs=slack)
    assert whole.mean(axis=0)[2] > 1.5 * rate


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.5, 0.005])  # of 5: limits 0.01, 0.02, 0.03, 0.04, 0.05
    assert discoveries(p, 0.05).tolist() == [True, True, True, False, False, True]
    assert discoveries(p, 0.01).tolist() == [False] * 6
    assert discoveries(np.empty(0), 0.05).tolist() == []
    assert discoveries(np.full(3, np.nan), 0.05).tolist() == [False] * 3


@pytest.mark.parametrize("rate", [0.01, 0.025, 0.05, 0.1, 0.15, 0.3])
def test_p_values_that_equal_their_limit_are_discovered(rate: float) -> None:
    """They often do: both are fractions of whole numbers, as 1/40 and 0.025 · 43/43."""
    random = np.random.default_rng(7)
    for _ in range(500):
        size, n = int(random.integers(1, 50)), int(random.choice([9, 19, 39, 99, 199]))
        above = np.sort(random.integers(1, max(2, int(2 * rate * (n + 1))) + 1, size))
        good = [
            k for k, m in enumerate(above, 1) if Fraction(int(m), n + 1) <= Fraction(str(rate)) * k / size
        ]
        last = above[good[-1] - 1] if good else 0
        assert discoveries(above / (n + 1), rate).tolist() == (above <= last).tolist()
        assert largest(above / (n + 1), rate) == last / (n + 1)


@pytest.mark.parametrize("rate", [0, 1, 1.5, -0.1, math.nan])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    found = Calibration(np.arange(100.0))
    for asked in (found.thresholds, needed, lambda rate: found.flags(rate, np.ones(1))):
        with pytest.raises(ValueError, match="expected a number between 0 and 1"):
            asked(rate)


def test_a_rate_may_be_a_number_of_numpy() -> None:
    found = Calibration(np.arange(1.0, 100.0))
    assert found.thresholds(np.float64(0.05)) == found.thresholds(0.05)


def test_few_discoveries_are_false() -> None:
    random = np.random.default_rng(5)
    shares = []
    for _ in range(400):
        found = Calibration(random.normal(size=1000))
        p = found.p_values(np.concatenate([random.normal(size=150), random.normal(4, 1, size=50)]))
        named = discoveries(p, 0.1)
        shares.append(named[:150].sum() / max(named.sum(), 1))
    assert np.mean(shares) <= 0.1 * 150 / 200 + 4 * np.std(shares) / 20
    assert np.mean(shares) > 0.04  # it names many
