from collections import defaultdict
from fractions import Fraction
from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipeline.errors import UserError
from pipeline.metrics.base import Counted
from pipeline.metrics.comparisons import compare
from pipeline.metrics.metrics import FAILURES, accuracy, against_ood, named, threshold
from tests.metrics.coverage import UNLABELLED


def values(id_scores, ood_scores):
    return {result.metric: result.value for result in compare(id_scores, {"ood": ood_scores}, {})}


def by_dataset(results):
    table = defaultdict(dict)
    for result in results:
        table[result.dataset][result.metric] = result
    return table


def from_definitions(id_scores, ood_scores):
    """Every metric as an exact fraction, by loops over pairs and thresholds."""

    def average_precision(positives, negatives):
        total, found = Fraction(0), 0
        for t in sorted(set(positives), reverse=True):
            hits = sum(s >= t for s in positives)
            alarms = sum(s >= t for s in negatives)
            total += Fraction(hits - found, len(positives)) * Fraction(hits, hits + alarms)
            found = hits
        return total

    def fpr95(positives, negatives):
        reaching = [
            t
            for t in positives
            if Fraction(sum(s >= t for s in positives), len(positives)) >= Fraction(95, 100)
        ]
        return Fraction(sum(s >= max(reaching) for s in negatives), len(negatives))

    def at_a_corner(positives, negatives):
        scores = sorted({*positives, *negatives}, reverse=True)
        steps = [(positives.count(t), negatives.count(t)) for t in scores]
        curve = [tuple(map(sum, zip(*steps[: i + 1], strict=True))) for i in range(len(steps))]
        kept = [
            point for i, point in enumerate(curve) if i in (0, len(curve) - 1) or steps[i] != steps[i + 1]
        ]
        return next(
            Fraction(alarms, len(negatives)) for hits, alarms in kept if 100 * hits >= 95 * len(positives)
        )

    n, m = len(id_scores), len(ood_scores)
    ordered = sum(Fraction((o > i) + (o >= i), 2) for i in id_scores for o in ood_scores)
    rates = [
        (Fraction(sum(o >= t for o in ood_scores), m) + Fraction(sum(i < t for i in id_scores), n)) / 2
        for t in [*id_scores, *ood_scores]
    ]
    id_negated, ood_negated = [-s for s in id_scores], [-s for s in ood_scores]
    return {
        "auroc": ordered / (n * m),
        "aupr_in": average_precision(id_negated, ood_negated),
        "aupr_out": average_precision(ood_scores, id_scores),
        "fpr95_id": fpr95(id_negated, ood_negated),
        "fpr95_ood": at_a_corner(ood_scores, id_scores),
        "detection_error": 1 - max(rates),
    }


def from_sklearn(id_scores, ood_scores):
    score = np.concatenate([id_scores, ood_scores])
    is_ood = np.arange(len(score)) >= len(id_scores)

    def fpr95(positive, score, drop_intermediate=False):
        fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=drop_intermediate)
        return fpr[np.argmax(tpr >= 0.95)]

    fpr, tpr, _ = roc_curve(is_ood, score, drop_intermediate=False)
    return {
        "auroc": roc_auc_score(is_ood, score),
        "aupr_in": average_precision_score(~is_ood, -score),
        "aupr_out": average_precision_score(is_ood, score),
        "fpr95_id": fpr95(~is_ood, -score),
        "fpr95_ood": fpr95(is_ood, score, drop_intermediate=True),
        "detection_error": 1 - (tpr + 1 - fpr).max() / 2,
    }


def small_cases():
    """Integer scores, from nearly all tied to nearly all distinct, with sizes down to one row."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        n, m = rng.integers(1, 45, size=2)
        levels = int(rng.choice([1, 2, 3, 5, 10, 1000]))
        yield rng.integers(0, levels, n), rng.integers(0, levels, m) + rng.integers(0, 2)


def large_cases():
    rng = np.random.default_rng(1)
    id_scores, ood_scores = rng.normal(0, 1, 3000), rng.normal(1, 1.5, 700)
    saturated = np.minimum(id_scores, 0.2), np.minimum(ood_scores, 0.2)
    return {
        "distinct": (id_scores, ood_scores),
        "heavy ties": (id_scores.round(1), ood_scores.round(1)),
        "saturated": saturated,
        "around 1e6": (1e6 + 1e-9 * (100 * id_scores).round(), 1e6 + 1e-9 * (100 * ood_scores).round()),
        "of size 1e6": (1e6 * id_scores, 1e6 * ood_scores),
        "of size 1e-12": (1e-12 * id_scores, 1e-12 * ood_scores),
        "worse than chance": (ood_scores, id_scores),
        "exactly 95 % at a tie": (
            np.repeat([0.0, 1.0], [1900, 100]),
            np.repeat([0.0, 1.0, 2.0], [50, 900, 50]),
        ),
        "separated": (np.arange(3000.0), np.arange(3000.0, 7000.0)),
        "one ID row": (id_scores[:1], ood_scores),
        "one OOD row": (id_scores, ood_scores[:1]),
    }


def test_values_follow_the_definitions_exactly_whatever_the_ties():
    for id_scores, ood_scores in small_cases():
        ours, truth = values(id_scores, ood_scores), from_definitions(id_scores.tolist(), ood_scores.tolist())
        for metric in ("auroc", "fpr95_id", "fpr95_ood", "detection_error"):
            assert ours[metric] == float(truth[metric]), (metric, id_scores, ood_scores)
        for metric in ("aupr_in", "aupr_out"):
            assert ours[metric] == pytest.approx(float(truth[metric]), rel=1e-14), (id_scores, ood_scores)


@pytest.mark.parametrize("case", large_cases())
def test_values_agree_with_scikit_learn(case):
    id_scores, ood_scores = large_cases()[case]
    assert values(id_scores, ood_scores) == pytest.approx(from_sklearn(id_scores, ood_scores), abs=1e-12)


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "expected"),
    [
        ([0.0, 1.0], [2.0, 3.0, 4.0], [1, 1, 1, 0, 0, 0]),
        ([1.0], [2.0], [1, 1, 1, 0, 0, 0]),
        ([5.0] * 3, [5.0], [0.5, 0.75, 0.25, 1, 1, 0.5]),
        ([2.0, 3.0], [0.0, 1.0], [0, (1 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2, 1, 1, 0.5]),
        ([0.0, -0.0], [0.0], [0.5, 2 / 3, 1 / 3, 1, 1, 0.5]),
    ],
    ids=["separated", "single rows", "all equal", "reversed", "signed zeros"],
)
def test_extreme_inputs_give_the_values_worked_out_by_hand(id_scores, ood_scores, expected):
    assert list(values(id_scores, ood_scores).values()) == pytest.approx(expected, rel=1e-15)


def test_95_percent_is_reached_by_19_of_20_rows_and_not_by_18():
    id_scores = np.arange(20.0)
    assert values(id_scores, [18.0, 18.5])["fpr95_id"] == 0.5
    assert values(id_scores, [17.5, 18.0, 19.0])["fpr95_id"] == pytest.approx(2 / 3)
    assert values([0.5, 1.5, 2.5], np.arange(20.0))["fpr95_ood"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("level", [0.9, 0.999, 0.57])
def test_fpr_is_measured_at_the_level_asked_for_which_is_in_its_name(level):
    id_scores, ood_scores = large_cases()["heavy ties"]
    found = {result.metric: result for result in compare(id_scores, {"o": ood_scores}, {}, level=level)}
    percent = f"{100 * level:g}"
    every = roc_curve(
        np.arange(3700) < 3000, -np.concatenate([id_scores, ood_scores]), drop_intermediate=False
    )
    result = found[f"fpr{percent}_id"]
    assert result.value == pytest.approx(every[0][np.argmax(every[1] >= level)])
    assert result.ci_low < result.value < result.ci_high
    assert named(f"fpr{percent}_ood").label == f"FPR{percent}, OOD caught"


def test_every_metric_is_found_by_its_name_and_no_other_is():
    for metric in (*against_ood(), *against_ood(0.995), *FAILURES):
        assert (named(metric.name).name, named(metric.name).label) == (metric.name, metric.label)
    impossible = ("fpr950_id", "fpr0_id", "fpr100_ood", "fpr0.95_id", "fpr95.0_id", "fpr99.999_id")
    for name in ("fpr95", "fpr95_in", "auc", *impossible):
        with pytest.raises(KeyError):
            named(name)


def test_a_stack_of_counts_gives_the_metrics_of_each_row_and_ignores_scores_without_rows():
    rng = np.random.default_rng(2)
    id_counts, ood_counts = rng.integers(0, 4, (2, 3, 5, 12))
    counts = Counted(id_counts, ood_counts)
    stacked = np.stack([metric.value(counts) for metric in against_ood() if not metric.needs_labels], axis=-1)
    assert stacked.shape == (3, 5, len(UNLABELLED))
    for position in np.ndindex(3, 5):
        here = id_counts[position], ood_counts[position]
        rows = [np.repeat(np.arange(12.0), counts) for counts in here]
        assert stacked[position] == pytest.approx(list(values(*rows).values()), rel=1e-14)


def test_the_order_of_the_rows_changes_no_bit():
    rng = np.random.default_rng(3)
    id_scores = rng.normal(size=4000).round(3)
    ood_scores = {"a": rng.normal(1, 1, 900).round(3), "b": rng.normal(2, 1, 300)}
    shuffled = {name: rng.permutation(scores) for name, scores in ood_scores.items()}
    groups = {"both": ["a", "b"]}
    results = compare(id_scores, ood_scores, groups)
    assert results == compare(rng.permutation(id_scores), shuffled, groups)


def test_results_come_by_dataset_and_then_by_group_with_the_metrics_in_order():
    ood_scores = {"b": [1.0, 2.0], "a": [3.0], "c": [0.0]}
    results = compare([0.0, 1.0], ood_scores, {"near": ["a", "b"], "far": ["c"]})
    expected = [(name, metric) for name in ("b", "a", "c", "near", "far") for metric in UNLABELLED]
    assert [(result.dataset, result.metric) for result in results] == expected
    assert {result.n_id for result in results} == {2}
    assert [result.n_ood for result in results[:: len(UNLABELLED)]] == [2, 1, 1, 3, 1]


def test_a_group_is_the_unweighted_mean_of_its_datasets_and_not_wider_than_the_widest():
    rng = np.random.default_rng(4)
    ood_scores = {name: rng.normal(shift, 1, size) for name, shift, size in [("a", 0.5, 60), ("b", 1, 900)]}
    table = by_dataset(compare(rng.normal(size=500), ood_scores, {"near": ["a", "b"], "far": ["b"]}))
    for metric in UNLABELLED:
        a, b, near, far = (table[name][metric] for name in ("a", "b", "near", "far"))
        assert near.value == (a.value + b.value) / 2
        assert 0 < near.ci_high - near.ci_low <= max(a.ci_high - a.ci_low, b.ci_high - b.ci_low)
        assert (far.value, far.ci_low, far.ci_high) == (b.value, b.ci_low, b.ci_high)


@pytest.mark.parametrize(
    ("scores", "found"),
    [([0.0, float("nan"), float("inf")], "2 NaN or infinite of 3"), ([], r"shape \(0,\)")],
    ids=["not finite", "empty"],
)
def test_bad_scores_are_refused_with_the_name_of_their_dataset(scores, found):
    with pytest.raises(UserError, match=f"'ninco'.*{found}"):
        compare([0.0], {"fine": [1.0], "ninco": scores}, {})
    with pytest.raises(UserError, match=f"ID data.*{found}"):
        compare(scores, {"fine": [1.0]}, {})
    with pytest.raises(UserError, match=f"ID data.*{found}"):
        threshold(scores)


@pytest.mark.parametrize("members", [[], ["a", "b"]], ids=["empty", "unknown member"])
def test_a_group_must_name_datasets_that_are_there(members):
    with pytest.raises(ValueError, match="group 'near'"):
        compare([0.0], {"a": [1.0]}, {"near": members})


def test_the_threshold_keeps_95_percent_of_id_and_the_next_lower_score_does_not():
    rng = np.random.default_rng(8)
    for n in [*range(1, 60), 100, 380, 1000, 1940]:
        scores = rng.normal(size=n).round(int(rng.integers(0, 4)))
        t = threshold(scores)
        assert t in scores
        assert 100 * (scores <= t).sum() >= 95 * n
        assert 100 * (scores < t).sum() < 95 * n


def test_the_threshold_is_the_one_of_fpr95_id():
    for id_scores, ood_scores in [*small_cases(), *large_cases().values()]:
        assert values(id_scores, ood_scores)["fpr95_id"] == (ood_scores <= threshold(id_scores)).mean()


def test_the_acceptance_is_read_as_a_decimal():
    scores = np.arange(100.0)
    assert 0.07 * 100 > 7
    assert [threshold(scores, share) for share in (0.07, 0.001, 1.0)] == [6, 0, 99]


@pytest.mark.parametrize("acceptance", [0.0, 1.01, float("nan")])
def test_an_acceptance_out_of_range_is_refused(acceptance):
    with pytest.raises(ValueError, match="acceptance"):
        threshold([1.0], acceptance)


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (1, 1), (13, 50), (34290, 45000)])
def test_accuracy_has_the_wilson_interval(correct, total):
    p, z = correct / total, NormalDist().inv_cdf(0.975)
    centre, spread = p + z**2 / (2 * total), z * sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    bounds = [(centre + sign * spread) / (1 + z**2 / total) for sign in (-1, 1)]
    result = accuracy(correct, total)
    assert result == pytest.approx((p, *bounds), abs=1e-9)
    assert 0 <= result.ci_low <= result.value <= result.ci_high <= 1


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_accuracy_of_impossible_counts_is_refused(correct, total):
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        accuracy(correct, total)
