"""Ensembles against their formulas by slow loops, and what their own p-values promise, in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.columns import CALIBRATION
from pipeline.detectors.ensemble import Ensemble
from pipeline.metrics.conformal import Calibration

COMBINE = ("fisher", "harmonic", "mean", "rank", "majority")


def drawn(seed: int, n: int, members: int, ties: bool = False) -> dict[str, np.ndarray]:
    """Scores of members that go together."""
    random = np.random.default_rng(seed)
    common = random.normal(size=n)
    scores = {f"m{j}": common + random.normal(size=n) for j in range(members)}
    return {label: np.round(values, 1) if ties else values for label, values in scores.items()}


def scored(combine: str, held: dict[str, np.ndarray], rows: dict[str, np.ndarray], own: bool) -> np.ndarray:
    detector = Ensemble(members=tuple(held), combine=combine)
    count = len(next(iter(rows.values())))
    return detector.calibrated(held)({**rows, CALIBRATION: np.full(count, own)})


def slow(combine: str, held: dict[str, np.ndarray], rows: dict[str, np.ndarray], own: bool) -> list[float]:
    """The formulas, image by image."""
    found = []
    for number in range(len(next(iter(rows.values())))):
        ps, ranks = [], []
        for label, scores in held.items():
            score = rows[label][number]
            n, higher = len(scores), sum(c >= score for c in scores)
            ps.append((higher + (not own)) / (n + 1))
            below, equal = sum(c < score for c in scores), sum(c == score for c in scores)
            ranks.append((below + equal / 2 + (1 if own else 1 / 2)) / (n + 1))
        found.append(
            {
                "fisher": -2 * sum(map(math.log, ps)),
                "harmonic": sum(1 / p for p in ps) / len(ps),
                "mean": 1 - sum(ps) / len(ps),
                "rank": sum(ranks) / len(ranks),
                "majority": 1 - sorted(ps)[len(ps) // 2],
            }[combine]
        )
    return found


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("members", [2, 3])
def test_scores_are_those_of_the_formula(combine: str, ties: bool, members: int) -> None:
    held, rows = drawn(0, 60, members, ties), drawn(1, 40, members, ties)
    np.testing.assert_allclose(
        scored(combine, held, rows, False), slow(combine, held, rows, False), rtol=1e-12
    )
    np.testing.assert_allclose(scored(combine, held, held, True), slow(combine, held, held, True), rtol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
def test_a_score_that_a_member_lacks_is_lacking(combine: str) -> None:
    rows = drawn(1, 5, 3)
    rows["m1"][2] = np.nan
    found = scored(combine, drawn(0, 30, 3), rows, False)
    assert np.isnan(found).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("members", [3, 4])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_majority_flags_where_most_members_do(members: int, rate: float) -> None:
    held, rows = drawn(0, 199, members), drawn(1, 300, members)
    votes = sum(Calibration(held[label]).flags(rate, rows[label]).astype(int) for label in held)
    at_rate = 1 - scored("majority", held, rows, False) <= rate + 1e-12
    assert at_rate.tolist() == (votes > members / 2).tolist()


def test_a_member_with_equal_scores_votes_for_neither_side_by_rank_and_for_id_by_p_value() -> None:
    held, rows = {"flat": np.zeros(9), "m": np.arange(9.0)}, {"flat": np.zeros(1), "m": np.array([4.0])}
    assert scored("rank", held, rows, False) == [0.5]
    assert scored("mean", held, rows, False) == [pytest.approx(1 - (1 + 0.6) / 2)]


def test_without_equal_scores_rank_and_mean_give_one_order() -> None:
    held, rows = drawn(0, 60, 3), drawn(1, 100, 3)
    mean, rank = (scored(combine, held, rows, False) for combine in ("mean", "rank"))
    np.testing.assert_allclose(mean - rank, (mean - rank)[0], atol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_calibration_images_are_never_below_those_among_all_images(
    combine: str, ties: bool
) -> None:
    """Among all n + 1, a new image counts for itself and may count for each calibration image."""
    for seed in range(20):
        both = drawn(seed, 31, 3, ties)
        held = {label: values[:-1] for label, values in both.items()}
        new = {label: values[-1:] for label, values in both.items()}
        n = 30
        whole = {label: scores for label, scores in both.items()}
        exact = [
            _of_bag(combine, [(whole[label], whole[label][number]) for label in whole])
            for number in range(n + 1)
        ]
        kept = scored(combine, held, held, True)
        assert (kept >= np.array(exact[:n]) - 1e-12).all()
        assert scored(combine, held, new, False)[0] == pytest.approx(exact[n], rel=1e-12)


def _of_bag(combine: str, members: list[tuple[np.ndarray, float]]) -> float:
    """The score of one of n + 1 images, each ranked among all of them."""
    ps = [float(np.mean(bag >= score)) for bag, score in members]
    ranks = [float(np.mean(bag < score) + np.mean(bag == score) / 2) for bag, score in members]
    return {
        "fisher": -2 * sum(map(math.log, ps)),
        "harmonic": float(np.mean([1 / p for p in ps])),
        "mean": 1 - float(np.mean(ps)),
        "rank": float(np.mean(ranks)),
        "majority": 1 - sorted(ps)[len(ps) // 2],
    }[combine]


@pytest.mark.parametrize("combine", COMBINE)
def test_false_alarms_of_an_ensemble_keep_to_the_rate(combine: str) -> None:
    """Though its members were calibrated on the same images as itself."""
    flagged, rate, trials = [], 0.1, 400
    for seed in range(trials):
        both = drawn(seed, 49 + 20, 3)
        held = {label: values[:49] for label, values in both.items()}
        rows = {label: values[49:] for label, values in both.items()}
        calibration = Calibration(scored(combine, held, held, True))
        flagged.append(calibration.flags(rate, scored(combine, held, rows, False)).mean())
    assert np.mean(flagged) <= rate + 3 * np.std(flagged) / math.sqrt(trials)
    assert np.mean(flagged) > 0.06  # cautious, not idle
