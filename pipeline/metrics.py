"""How well a detector's scores tell OOD rows from ID rows, with intervals from a bootstrap of the rows.

A score is higher for rows that look more OOD. Rows are counted at distinct scores, so ties are never split
and nothing depends on the order of the rows. Reads no files and knows no detector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from pipeline.columns import Float
from pipeline.errors import UserError

METRICS: tuple[str, ...] = ("auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood", "detection_error")
"""Names of the metrics in the order of the last axis of `metrics_at`, which defines them."""

_BINS = 2048

Counts = NDArray[np.int64]


class Estimate(NamedTuple):
    """A share in [0, 1] and its confidence interval, which holds the value."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Result:
    """One of `METRICS` on one OOD dataset, or its mean over the group that `dataset` names."""

    dataset: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n_id: int
    n_ood: int


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap of the rows, at a cost that does not grow with them.

    Neighbouring distinct scores share a bin where there are more than 2048; bins hold about equal shares of
    the sets. A resample is a multinomial draw of the counts of the bins. One resample of the ID rows serves
    all OOD datasets, as one ID set does in the means. What the bins change in the metric of the data is
    taken off every replicate.

    Limits: the interval is about the draw of the rows, not about training the classifier again. Rows are
    taken to be independent. It shrinks to the value, up to the bins, where resampling cannot change it:
    full separation, equal scores, a single row on each side. With S sets a bin may hold S / 2048 of one of
    them; an FPR95, which is read at one score, then moves in such steps.
    """

    resamples: int = 500
    level: float = 0.95
    seed: int = 0

    def draw(self, counts: Counts, rng: np.random.Generator) -> Counts:
        """(R, T) counts of R resamples, with replacement, of the rows counted in (T,) `counts`."""
        return rng.multinomial(counts.sum(), counts / counts.sum(), size=self.resamples)

    def interval(self, value: float, replicates: Float) -> Estimate:
        """The value and the percentiles of its (R,) replicates, moved where needed to hold the value."""
        tail = (1 - self.level) / 2
        low, high = np.clip(np.quantile(replicates, [tail, 1 - tail]), 0, 1)
        return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def compare(
    id_scores: ArrayLike,
    ood_scores: Mapping[str, ArrayLike],
    groups: Mapping[str, Sequence[str]],
    bootstrap: Bootstrap = Bootstrap(),
) -> list[Result]:
    """All metrics of one detector on every OOD dataset, and their unweighted means over every group.

    Args:
        id_scores: (N,) finite float, higher = more OOD.
        ood_scores: dataset -> (M,) finite float, higher = more OOD.
        groups: group -> names of its datasets, at least one.
        bootstrap: how the confidence intervals are made; the values are exact.

    Returns:
        Datasets and then groups, in the order given; `METRICS` within each.

    Raises:
        UserError: if a dataset is empty or has a score that is NaN or infinite.
        ValueError: if a group is empty or names an unknown dataset.

    Cost:
        One sort. Memory for a count of every distinct score in every dataset, and for resamples x bins.
    """
    names = list(ood_scores)
    members = [(name, [i]) for i, name in enumerate(names)]
    members += [(group, _positions(group, datasets, names)) for group, datasets in groups.items()]
    scores = [_checked(id_scores, "the ID data"), *(_checked(ood_scores[name], repr(name)) for name in names)]
    n_id, *n_ood = map(len, scores)
    values, replicates = _replicate(_count(scores), bootstrap)
    results = []
    for name, chosen in members:
        value, draws = values[chosen].mean(axis=0), replicates[chosen].mean(axis=0)
        size = sum(n_ood[i] for i in chosen)
        for i, metric in enumerate(METRICS):
            results.append(Result(name, metric, *bootstrap.interval(value[i], draws[:, i]), n_id, size))
    return results


def metrics_at(id_counts: Counts, ood_counts: Counts) -> Float:
    """All metrics, from the number of rows at every score t in ascending order.

    * auroc: P(OOD > ID) + P(OOD = ID) / 2.
    * aupr_in, aupr_out: average precision (steps, not trapezoids) with ID or with OOD as the positive
      class; depends on the ratio of the sizes.
    * fpr95_id: share of OOD <= t at the smallest t with >= 95 % of ID <= t: OOD accepted where ID is kept.
      FPR95 of the papers.
    * fpr95_ood: share of ID >= t at the largest t with >= 95 % of OOD >= t: ID rejected where OOD is caught.
      FPR95 of OpenOOD since August 2023.
    * detection_error: 1 - max over t of (P(OOD > t) + P(ID <= t)) / 2; both classes weigh the same.

    Args:
        id_counts: (..., T) int64, not all 0; scores that no row has are allowed.
        ood_counts: (..., T) int64, likewise.

    Returns:
        (..., 6) float64 in [0, 1], in the order of `METRICS`. Each but the average precisions is one division
        of integers, which fit below 2**31 rows on each side.
    """
    id_upto, ood_upto = id_counts.cumsum(-1), ood_counts.cumsum(-1)
    n_id, n_ood = id_upto[..., -1:], ood_upto[..., -1:]
    pairs = 2 * (n_id * n_ood)[..., 0]
    auroc = (ood_counts * (2 * id_upto - id_counts)).sum(-1) / pairs
    error = (pairs - (n_id * (n_ood - ood_upto) + n_ood * id_upto).max(-1)) / pairs
    aupr_in, fpr95_id = _retrieve(id_counts, ood_counts)
    aupr_out, fpr95_ood = _retrieve(ood_counts[..., ::-1], id_counts[..., ::-1])
    return np.stack([auroc, aupr_in, aupr_out, fpr95_id, fpr95_ood, error], axis=-1)


def threshold(id_scores: ArrayLike, acceptance: float = 0.95) -> float:
    """The smallest ID score t such that at least the share `acceptance` of the ID scores is <= t.

    A row is OOD if its score is > t. At 0.95 this is the threshold of `fpr95_id`.

    Args:
        id_scores: (N,) finite float, higher = more OOD.
        acceptance: in (0, 1], read as the decimal it prints as.

    Raises:
        UserError: if there are no scores, or one is NaN or infinite.
        ValueError: if `acceptance` is out of range.
    """
    if not 0 < acceptance <= 1:
        raise ValueError(f"acceptance: out of range, got {acceptance}; expected a share in (0, 1].")
    scores = _checked(id_scores, "the ID data")
    rank = ceil(Fraction(str(acceptance)) * len(scores))
    return float(np.partition(scores, rank - 1)[rank - 1])


def accuracy(correct: int, total: int, level: float = 0.95) -> Estimate:
    """Share of correct predictions with its Wilson interval.

    Raises:
        ValueError: unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"accuracy: got {correct} correct of {total}; expected 0 <= correct <= total > 0.")
    interval = binomtest(correct, total).proportion_ci(level, method="wilson")
    value = correct / total
    return Estimate(value, min(float(interval.low), value), max(float(interval.high), value))


def _checked(scores: ArrayLike, where: str) -> Float:
    """The scores as a float64 vector; a UserError if there are none, or one is NaN or infinite."""
    checked = np.asarray(scores, dtype=np.float64)
    if checked.ndim != 1 or not len(checked):
        raise UserError(
            f"scores of {where}: no vector of scores, got shape {checked.shape}; expected at least one row. "
            "Check that the dataset has readable images."
        )
    bad = len(checked) - np.count_nonzero(np.isfinite(checked))
    if bad:
        raise UserError(
            f"scores of {where}: values that cannot be ranked, got {bad} NaN or infinite of {len(checked)}; "
            "expected finite scores. Check the weights and the precision of the features."
        )
    return checked


def _positions(group: str, members: Sequence[str], names: Sequence[str]) -> list[int]:
    """Positions of the members of a group among the datasets."""
    if not members or not set(members) <= set(names):
        raise ValueError(f"group {group!r}: got members {list(members)}; expected some of {list(names)}.")
    return [names.index(member) for member in members]


def _count(scores: Sequence[Float]) -> Counts:
    """(S, T) rows of each of the S sets at each of the T distinct scores of all, ascending."""
    distinct, ranks = np.unique(np.concatenate(scores), return_inverse=True)
    parts = np.split(ranks, np.cumsum([len(part) for part in scores])[:-1])
    return np.stack([np.bincount(part, minlength=len(distinct)) for part in parts])


def _replicate(counts: Counts, bootstrap: Bootstrap) -> tuple[Float, Float]:
    """Exact metrics (D, 6) of the D OOD sets in (1 + D, T) counts, and their replicates (D, R, 6)."""
    rng = np.random.default_rng(bootstrap.seed)
    id_counts, *ood_counts = counts
    id_bins, *ood_bins = np.add.reduceat(counts, _bin_starts(counts), axis=-1)
    id_drawn = bootstrap.draw(id_bins, rng)
    values = np.empty((len(ood_counts), len(METRICS)))
    replicates = np.empty((len(ood_counts), bootstrap.resamples, len(METRICS)))
    for i, (exact, bins) in enumerate(zip(ood_counts, ood_bins, strict=True)):
        values[i] = metrics_at(id_counts, exact)
        shift = values[i] - metrics_at(id_bins, bins)
        replicates[i] = metrics_at(id_drawn, bootstrap.draw(bins, rng)) + shift
    return values, replicates


def _bin_starts(counts: Counts) -> NDArray[np.intp]:
    """First score of each bin, for (S, T) counts; at most 2048 bins of about equal share.

    Every set weighs the same, so that a small dataset does not vanish in a few bins beside a large one.
    """
    if counts.shape[-1] <= _BINS:
        return np.arange(counts.shape[-1])
    share = sum(part / (part.sum() * len(counts)) for part in counts)
    middle = np.cumsum(share) - share / 2
    return np.flatnonzero(np.diff(np.floor(middle * _BINS), prepend=-1))


def _retrieve(positive: Counts, negative: Counts) -> tuple[Float, Float]:
    """Average precision, and FPR where recall first reaches 95 %; (..., T) counts, most positive first."""
    hits, alarms = positive.cumsum(-1), negative.cumsum(-1)
    precision = hits / np.maximum(hits + alarms, 1)
    first = (100 * hits >= 95 * hits[..., -1:]).argmax(-1, keepdims=True)
    rate = np.take_along_axis(alarms, first, -1)[..., 0] / alarms[..., -1]
    return (positive * precision).sum(-1) / hits[..., -1], rate
