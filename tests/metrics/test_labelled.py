"""OSCR, AURC and AUGRC follow their definitions, whatever the ties, and know how sure they are."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.errors import UserError
from pipeline.metrics.comparisons import Result, compare, failures
from pipeline.metrics.pairs import differences, sample, sample_failures
from tests.metrics import labelled
from tests.metrics.coverage import FAILURE_CASES, Errors


def of_failures(scores, right) -> dict[str, Result]:
    return {result.metric: result for result in failures("id", scores, right)}


def oscr(inside, right, outside) -> Result:
    return next(each for each in compare(inside, {"o": outside}, {}, right) if each.metric == "oscr")


def test_values_follow_the_definitions_whatever_the_ties() -> None:
    for inside, right, outside in labelled.cases():
        found = of_failures(inside, right)
        assert found["augrc"].value == float(labelled.augrc(inside, right)), (inside, right)
        assert found["aurc"].value == pytest.approx(float(labelled.aurc(inside, right)), abs=1e-14)
        assert oscr(inside, right, outside).value == float(labelled.oscr(inside, right, outside))


def test_aurc_of_ties_is_the_mean_over_all_orders() -> None:
    scores, right = [0, 1, 1, 1, 2], [True, False, True, True, False]
    orders = [(0, *order, 4) for order in permutations((1, 2, 3))]
    means = [np.mean([np.mean([not right[i] for i in order[:k]]) for k in range(1, 6)]) for order in orders]
    assert of_failures(scores, right)["aurc"].value == pytest.approx(np.mean(means), abs=1e-15)


def test_augrc_is_what_its_paper_says_of_the_auroc_of_failures_and_the_accuracy() -> None:
    rng = np.random.default_rng(0)
    right, scores = rng.random(500) < 0.8, rng.normal(size=500).round(1)
    a, auroc = right.mean(), roc_auc_score(~right, scores)
    expected = (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2
    assert of_failures(scores, right)["augrc"].value == pytest.approx(expected, abs=1e-12)


def test_degenerate_rows_have_the_values_worked_out_by_hand_and_intervals_that_are_no_points() -> None:
    distinct, equal = np.arange(40.0), np.zeros(40)
    half = distinct < 20
    for scores, right, aurc, augrc in (
        (distinct, half | True, 0, 0),
        (distinct, half & False, 1, 0.5),
        (equal, half, 0.5, 0.25),
        (distinct, half, sum((k - 20) / k for k in range(21, 41)) / 40, 0.125),
        (-distinct, half, (20 + sum(20 / k for k in range(21, 41))) / 40, 0.375),
    ):
        found = of_failures(scores, right)
        assert (found["aurc"].value, found["augrc"].value) == pytest.approx((aurc, augrc), abs=1e-12)
        for result in found.values():
            assert 0 <= result.ci_low <= result.value <= result.ci_high <= 1
            assert result.ci_high - result.ci_low > 0.01, result
    assert oscr(distinct, half | True, distinct + 40).value == 1
    assert oscr(distinct, half & False, distinct + 40).value == 0
    assert oscr(equal, half, equal).value == 0.25


def test_all_right_oscr_is_the_auroc_with_its_interval() -> None:
    rng = np.random.default_rng(1)
    results = compare(rng.normal(size=60), {"o": rng.normal(1, 1, 50)}, {}, np.ones(60, bool))
    auroc, found = (next(each for each in results if each.metric == name) for name in ("auroc", "oscr"))
    assert (found.value, found.ci_low) == pytest.approx((auroc.value, auroc.ci_low), abs=1e-12)


def test_without_labels_there_is_no_oscr_and_rows_that_cannot_be_ranked_are_refused() -> None:
    assert "oscr" not in [result.metric for result in compare([0.0], {"o": [1.0]}, {})]
    with pytest.raises(UserError, match=r"'id'.*1 NaN or infinite of 2"):
        failures("id", [0.0, np.nan], [True, False])


@pytest.mark.parametrize("case", FAILURE_CASES[:2], ids=str)
def test_95_percent_of_the_intervals_hold_the_truth(case: Errors) -> None:
    assert (case.held(repeats=250) > 0.91).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILURE_CASES, ids=str)
def test_coverage_is_at_least_93_percent(case: Errors) -> None:
    assert (case.held(repeats=1000) > 0.93 - 3 * np.sqrt(0.95 * 0.05 / 1000)).all()


@pytest.mark.parametrize("n", [150, 1300], ids=["rows", "groups of rows"])
def test_the_error_of_a_difference_is_that_of_a_paired_bootstrap(n: int) -> None:
    rng = np.random.default_rng(2)
    right = rng.random(n) < 0.8
    base, ood = rng.normal(size=n) + ~right, rng.normal(2, 1, n)
    scores = {name: base + noise * rng.normal(size=n) for name, noise in (("a", 0.3), ("b", 0.8))}
    samples = {
        name: [sample_failures("id", each, right), *sample(each, {"o": ood}, {}, right=right)]
        for name, each in scores.items()
    }
    found = {each.metric: each for each in differences(samples)}
    replicates = []
    for _ in range(40):
        rows, others = rng.integers(0, n, (2, n))
        a, b = (
            [
                *(each.value for each in failures("id", x[rows], right[rows])),
                oscr(x[rows], right[rows], ood[others]).value,
            ]
            for x in scores.values()
        )
        replicates.append(np.subtract(a, b))
    for metric, expected in zip(("aurc", "augrc", "oscr"), np.std(replicates, axis=0), strict=True):
        assert (found[metric].ci_high - found[metric].ci_low) / 3.92 == pytest.approx(expected, rel=0.35), (
            metric
        )
    exact = of_failures(scores["a"], right)["aurc"].value - of_failures(scores["b"], right)["aurc"].value
    assert found["aurc"].difference == pytest.approx(exact, abs=1e-12)
