"""All metrics by name, and what they have in common: scores are checked and counted.

One metric more is a file beside this one and a line in `against_ood` or `FAILURES`. Reads no files and knows
no detector.
"""

import re
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import ArrayLike

from pipeline.columns import Float, Mask
from pipeline.errors import UserError
from pipeline.metrics.augrc import AUGRC
from pipeline.metrics.aupr import AUPR
from pipeline.metrics.aurc import AURC
from pipeline.metrics.auroc import AUROC
from pipeline.metrics.base import Counted, Estimate, Metric
from pipeline.metrics.detection_error import DetectionError
from pipeline.metrics.fpr import FPR
from pipeline.metrics.intervals import wilson
from pipeline.metrics.oscr import OSCR

LEVEL = 0.95
"""Share that FPR is measured at unless another one is given."""
LOWEST, HIGHEST = 0.5, 0.9999
"""Between these lie the shares that FPR may be measured at: 0.95 in a name that counts percent is a slip."""

FAILURES: tuple[Metric, ...] = (AURC(), AUGRC())
"""Metrics of ID rows alone: whether the score tells those that the classifier has wrong."""


def against_ood(level: float = LEVEL) -> tuple[Metric, ...]:
    """Metrics of ID against OOD rows, in the order of all tables.

    Args:
        level: of FPR, in (0, 1).
    """
    return (
        AUROC(),
        AUPR("in"),
        AUPR("out"),
        FPR("id", level),
        FPR("ood", level),
        DetectionError(),
        OSCR(),
    )


def named(name: str) -> Metric:
    """The metric of a name, as in fpr95_id.

    Raises:
        KeyError: there is none, or it is FPR at a share below 0.5 or above 0.9999.
    """
    level = level_of(name)
    if not LOWEST <= level <= HIGHEST:
        raise KeyError(name)
    return {metric.name: metric for metric in (*against_ood(level), *FAILURES)}[name]


def level_of(name: str) -> float:
    """The share that FPR of a name is measured at; the usual one for other metrics."""
    found = re.fullmatch(r"fpr(\d+(?:\.\d+)?)_(?:id|ood)", name)
    return float(Fraction(found[1]) / 100) if found else LEVEL


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


def accuracy(correct: int, total: int) -> Estimate:
    """Share of correct predictions with its Wilson interval.

    Raises:
        ValueError: unless 0 <= correct <= total and total >= 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"accuracy: got {correct} correct of {total}; expected 0 <= correct <= total > 0.")
    value = correct / total
    low, high = wilson(value, total)
    return Estimate(value, min(low, value), max(high, value))


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


def counted(inside: Float, outside: Float | None = None, right: Mask | None = None) -> Counted:
    """Rows at each of the distinct scores of all.

    Args:
        inside: (N,) scores of ID rows.
        outside: (M,) scores of OOD rows.
        right: (N,) which ID rows the classifier has right, if it is known.
    """
    nothing = np.empty(0)
    outside = nothing if outside is None else outside
    distinct, ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    of_id, of_ood = ranks[: len(inside)], ranks[len(inside) :]
    kinds = of_id, of_ood, of_id[right] if right is not None else of_id[:0]
    return Counted(*(np.bincount(kind, minlength=len(distinct)) for kind in kinds))
