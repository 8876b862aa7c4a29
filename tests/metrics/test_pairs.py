"""Differences of detectors on the same images: errors, p-values, and what is done about many comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from pipeline.metrics import pairs
from pipeline.metrics.pairs import differences, holm, sample
from tests.metrics.coverage import UNLABELLED
from tests.metrics.test_metrics import from_sklearn


def related(rng: np.random.Generator, n: int, m: int, better: float = 0.0) -> dict[str, tuple]:
    """ID and OOD scores of two detectors that see the same images, each with noise of its own."""
    inside, outside = rng.normal(size=n), rng.normal(1.2, 1, m)
    return {
        name: (inside + 0.5 * rng.normal(size=n), outside + shift + 0.5 * rng.normal(size=m))
        for name, shift in (("a", better), ("b", 0.0))
    }


def compared(scores: dict[str, tuple], seed: int = 0) -> dict[str, pairs.Difference]:
    found = {label: sample(inside, {"ood": outside}, {}, seed) for label, (inside, outside) in scores.items()}
    return {each.metric: each for each in differences(found)}


def placements(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    over = (outside[:, None] > inside) + (outside[:, None] == inside) / 2
    return over.mean(axis=0), over.mean(axis=1)


def test_the_error_of_an_auroc_difference_is_delongs() -> None:
    scores = related(np.random.default_rng(0), 300, 200, better=0.2)
    (of_id, of_ood), (other_id, other_ood) = (placements(*each) for each in scores.values())
    error = np.sqrt((of_id - other_id).var(ddof=1) / 300 + (of_ood - other_ood).var(ddof=1) / 200)
    found = compared(scores)["auroc"]
    assert found.difference == pytest.approx(of_id.mean() - other_id.mean(), abs=1e-12)
    assert (found.ci_high - found.ci_low) / 2 == pytest.approx(t(199).ppf(0.975) * error, rel=1e-9)
    assert found.p_value == pytest.approx(2 * t(199).sf(abs(found.difference) / error), rel=1e-9)
    assert found.p_holm == found.p_value


@pytest.mark.parametrize("n", [120, 2000], ids=["rows", "groups of rows"])
def test_the_error_of_other_metrics_is_that_of_a_paired_bootstrap(n: int) -> None:
    rng = np.random.default_rng(1)
    scores = related(rng, n, n, better=0.2)
    replicates = []
    for _ in range(50):
        rows, others = rng.integers(0, n, (2, n))
        a, b = (from_sklearn(x[rows], y[others]) for x, y in scores.values())
        replicates.append([a[metric] - b[metric] for metric in UNLABELLED])
    for metric, expected in zip(UNLABELLED, np.std(replicates, axis=0), strict=True):
        found = compared(scores)[metric]
        assert (found.ci_high - found.ci_low) / 3.92 == pytest.approx(expected, rel=0.35), metric


def test_equal_detectors_are_told_apart_in_5_percent_of_draws_and_better_ones_in_more() -> None:
    rng = np.random.default_rng(2)
    share = {
        better: np.mean(
            [
                [each.p_value < 0.05 for each in compared(related(rng, 150, 150, better)).values()]
                for _ in range(30)
            ],
            axis=0,
        )
        for better in (0.0, 0.6)
    }
    assert (share[0.0] < 0.15).all()
    assert share[0.6][UNLABELLED.index("auroc")] > 0.9


def test_a_detector_is_not_told_from_itself_and_a_guess_is_from_a_perfect_one() -> None:
    inside, outside = np.zeros(50), np.ones(50)
    found = {
        "perfect": sample(inside, {"ood": outside}, {}),
        "same": sample(inside, {"ood": outside}, {}),
        "guess": sample(inside, {"ood": np.zeros(50)}, {}),
    }
    for each in differences(found):
        if each.other == "same":
            assert (each.difference, each.p_value, each.p_holm) == (0, 1, 1)
        else:
            assert each.p_holm < 1e-6, each
            assert -1 <= each.ci_low <= each.difference <= each.ci_high <= 1
            assert each.ci_high - each.ci_low > 0.01


def test_two_images_tell_nothing() -> None:
    found = {
        name: sample([0.0, 1.0], {"ood": ood}, {}) for name, ood in {"a": [2.0, 3.0], "b": [0.0, 1.0]}.items()
    }
    assert min(each.p_value for each in differences(found) if each.metric == "auroc") > 0.01


def test_equal_detectors_are_told_apart_in_few_draws_of_two_images_against_many() -> None:
    rng = np.random.default_rng(5)
    draws = [compared(related(rng, 2, 100, better=0.0))["auroc"].p_value for _ in range(40)]
    assert np.mean(np.array(draws) < 0.05) < 0.1


def test_a_single_image_tells_nothing_however_many_others_there_are() -> None:
    many = np.linspace(0, 1, 300)
    found = {name: sample([at], {"ood": many}, {}) for name, at in {"a": 0.1, "b": 0.9}.items()}
    for each in differences(found):
        assert each.p_value == each.p_holm == 1, each
        assert (each.ci_low, each.ci_high) == (-1, 1) or each.difference == 0, each


@pytest.mark.parametrize("few", ["ID", "OOD"])
def test_a_threshold_that_is_the_last_of_few_images_tells_no_detectors_apart(few: str) -> None:
    """At 95 % it is that of 19 images, and not of 20; of a group, if it is that of one of its datasets."""
    many, first, second = np.linspace(0, 1, 300), np.arange(20) / 1e3, 2 + np.arange(20) / 1e3
    for count, told in ((19, False), (20, True)):
        sets = [(many, each[:count]) if few == "OOD" else (each[:count], many) for each in (first, second)]
        found = {
            name: sample(inside, {"few": outside, "many": many}, {"all": ["few", "many"]})
            for name, (inside, outside) in zip("ab", sets, strict=True)
        }
        by = {(each.dataset, each.metric): each for each in differences(found)}
        metric = f"fpr95_{few.lower()}"
        for dataset in ("few", "all"):
            assert (by[dataset, metric].p_value < 1e-3) is told, (count, dataset)
            assert told or (by[dataset, metric].p_value, by[dataset, metric].ci_low) == (1, -1)
            assert by[dataset, "auroc"].p_value < 1e-3


def test_a_group_shares_the_id_rows_and_its_error_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(3)
    scores = related(rng, 200, 400, better=0.2)
    both = {name: (x, {"one": y[:150], "two": y[150:]}) for name, (x, y) in scores.items()}
    found = {name: sample(x, sets, {"all": ["one", "two"]}) for name, (x, sets) in both.items()}
    group = next(each for each in differences(found) if (each.dataset, each.metric) == ("all", "auroc"))
    deviations = []
    for x, sets in both.values():
        placed = [placements(x, y) for y in sets.values()]
        deviations.append([np.mean([p for p, _ in placed], axis=0), *(q for _, q in placed)])
    id_part, *ood_parts = (a - b for a, b in zip(*deviations, strict=True))
    variance = id_part.var(ddof=1) / 200 + sum(part.var(ddof=1) / len(part) / 4 for part in ood_parts)
    assert (group.ci_high - group.ci_low) / 2 == pytest.approx(t(149).ppf(0.975) * variance**0.5, rel=1e-6)


def test_holm_multiplies_by_the_hypotheses_that_are_left_and_never_lowers() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("n", [7, 3000])
def test_rows_added_up_and_a_product_with_all_bins_give_the_same_bits(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inside, outside), _ = related(np.random.default_rng(0), n, 2 * n).values()
    right = inside < 1.5
    found = []
    for rows in (0, n + 1):  # from which on a product is taken: always, never
        monkeypatch.setattr(pairs, "_SPARSE", rows)
        found += [sample(inside, {"ood": outside}, {}, right=right)[0].replicates]
    assert found[0].tobytes() == found[1].tobytes()


def test_a_seed_gives_the_same_bits() -> None:
    scores = related(np.random.default_rng(4), 3000, 500)
    assert compared(scores, seed=7) == compared(scores, seed=7)
    assert compared(scores, seed=7) != compared(scores, seed=8)
