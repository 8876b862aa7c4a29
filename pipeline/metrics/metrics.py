"""How well a detector's scores tell OOD rows from ID rows, exactly.

A score is higher for rows that look more OOD. Rows are counted at distinct scores, so ties are never split
and nothing depends on the order of the rows. Reads no files and knows no detector.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.columns import Float
from pipeline.errors import UserError

METRICS: tuple[str, ...] = ("auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood", "detection_error")
"""Names of the metrics in the order of the last axis of `metrics_at`, which defines them."""


Counts = NDArray[np.int64]


class Estimate(NamedTuple):
    """A share in [0, 1] and its confidence interval, which holds the value."""

    value: float
    ci_low: float
    ci_high: float


def metrics_at(id_counts: Counts, ood_counts: Counts) -> Float:
    """All metrics, from the number of rows at every score t in ascending order.

    * auroc: P(OOD > ID) + P(OOD = ID) / 2.
    * aupr_in, aupr_out: average precision (steps, not trapezoids) with ID or with OOD as the positive
      class; depends on the ratio of the sizes.
    * fpr95_id: share of OOD <= t at the smallest t with >= 95 % of ID <= t: OOD accepted where ID is kept.
      FPR95 of the papers.
    * fpr95_ood: share of ID >= t at the largest t with >= 95 % of OOD >= t: ID rejected where OOD is caught.
      FPR95 of OpenOOD since August 2023, which reads it off scikit-learn's `roc_curve`. That leaves out the
      inside of straight lines: where the next lower scores have as many rows of each set, t is the last one.
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
    from_above = ood_counts[..., ::-1], id_counts[..., ::-1]
    aupr_in, fpr95_id = _retrieve(id_counts, ood_counts, _reaching(id_counts))
    aupr_out, fpr95_ood = _retrieve(*from_above, _corners(*from_above, _reaching(from_above[0])))
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
    scores = checked(id_scores, "the ID data")
    rank = ceil(Fraction(str(acceptance)) * len(scores))
    return float(np.partition(scores, rank - 1)[rank - 1])


def accuracy(correct: int, total: int, level: float = 0.95) -> Estimate:
    """Share of correct predictions with its Wilson interval.

    Raises:
        ValueError: unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"accuracy: got {correct} correct of {total}; expected 0 <= correct <= total > 0.")
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(correct, total).proportion_ci(level, method="wilson")
    value = correct / total
    return Estimate(value, min(float(interval.low), value), max(float(interval.high), value))


def checked(scores: ArrayLike, where: str) -> Float:
    """The scores as a float64 vector; a UserError if there are none, or one is NaN or infinite."""
    checked = np.asarray(scores, dtype=np.float64)
    if checked.ndim != 1 or not len(checked):
        raise UserError(
            f"scores of {where}: no vector of scores, got shape {checked.shape}; expected at least one row. "
            "Check that the dataset has readable images, and that the detector can score some."
        )
    bad = len(checked) - np.count_nonzero(np.isfinite(checked))
    if bad:
        raise UserError(
            f"scores of {where}: values that cannot be ranked, got {bad} NaN or infinite of {len(checked)}; "
            "expected finite scores. Check the weights and the precision of the features."
        )
    return checked


def counted(scores: Sequence[Float]) -> Counts:
    """(S, T) rows of each of the S sets at each of the T distinct scores of all, ascending."""
    distinct, ranks = np.unique(np.concatenate(scores), return_inverse=True)
    parts = np.split(ranks, np.cumsum([len(part) for part in scores])[:-1])
    return np.stack([np.bincount(part, minlength=len(distinct)) for part in parts])


def _retrieve(positive: Counts, negative: Counts, at: NDArray[np.intp]) -> tuple[Float, Float]:
    """Average precision, and FPR at a (...) score; (..., T) counts, most positive first."""
    hits, alarms = positive.cumsum(-1), negative.cumsum(-1)
    precision = hits / np.maximum(hits + alarms, 1)
    rate = np.take_along_axis(alarms, at[..., None], -1)[..., 0] / alarms[..., -1]
    return (positive * precision).sum(-1) / hits[..., -1], rate


def _reaching(positive: Counts) -> NDArray[np.intp]:
    """(...) the first score at which recall reaches 95 %."""
    hits = positive.cumsum(-1)
    return np.asarray((100 * hits >= 95 * hits[..., -1:]).argmax(-1))


def _corners(positive: Counts, negative: Counts, first: NDArray[np.intp]) -> NDArray[np.intp]:
    """(...) the first scores from `first` on that `roc_curve` keeps: their step differs from the next one."""
    corners = np.empty_like(first)
    for place in np.ndindex(first.shape):
        corners[place] = _corner(positive[place], negative[place], int(first[place]))
    return corners


def _corner(positive: Counts, negative: Counts, first: int) -> int:
    if not positive[:first].any() and not negative[:first].any():  # the ends of the curve are kept
        return first
    later = (first + np.flatnonzero(positive[first:] | negative[first:])).tolist()
    for here, following in pairwise(later):
        if positive[here] != positive[following] or negative[here] != negative[following]:
            return int(here)
    return int(later[-1])
