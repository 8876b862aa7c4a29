"""The share of one set that is mistaken where a share of the other, such as 95 %, is not: FPR95."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Counts, Metric
from pipeline.metrics.intervals import Rate

_NEAR = 64
"""Scores among which the next turn of a curve mostly is."""


@dataclass(frozen=True)
class FPR(Metric):
    """The false positive rate at a true positive rate, with ID or OOD as the positive class.

    * id: share of OOD <= t at the smallest t with >= `level` of ID <= t: OOD accepted where ID is kept. FPR95
      of the papers.
    * ood: share of ID >= t at the largest t with >= `level` of OOD >= t: ID rejected where OOD is caught.
      FPR95 of OpenOOD since August 2023, which reads it off scikit-learn's `roc_curve`. That leaves out the
      inside of straight lines: where the next lower scores have as many rows of each set, t is the last one.
    """

    positive: Literal["id", "ood"]
    level: float = 0.95
    """In (0, 1), read as the decimal it prints as."""

    higher_is_better = False

    @property
    def percent(self) -> str:
        """The level, as in FPR95."""
        return f"{float(100 * self._share):.10g}"

    @property
    def _share(self) -> Fraction:
        return Fraction(str(self.level))

    @property
    def name(self) -> str:
        """As in fpr95_id."""
        return f"fpr{self.percent}_{self.positive}"

    @property
    def label(self) -> str:
        """For readers."""
        return f"FPR{self.percent}, {'ID kept' if self.positive == 'id' else 'OOD caught'}"

    @property
    def meaning(self) -> str:
        """A sentence or two."""
        if self.positive == "id":
            return (
                f"With {self.percent}% of the ID images kept, the share of OOD images accepted. "
                "The convention of the papers."
            )
        return (
            f"With {self.percent}% of the OOD images caught, the share of ID images rejected. "
            "The convention of OpenOOD."
        )

    def _ranked(self, rows: Counted) -> Counted:
        """Rows with the positive class as `inside`, most positive first."""
        return rows if self.positive == "id" else rows.from_above

    def value(self, rows: Counted) -> Float:
        """(...) float64, one division of integers."""
        ranked = self._ranked(rows)
        hits, alarms = ranked.inside_upto, ranked.outside_upto
        share = self._share
        at = (share.denominator * hits >= share.numerator * hits[..., -1:]).argmax(-1)
        if self.positive == "ood":
            at = _corners(ranked.inside, ranked.outside, np.asarray(at))
        return np.asarray(np.take_along_axis(alarms, at[..., None], -1)[..., 0] / alarms[..., -1])

    def varies(self, rows: Counted) -> bool:
        """Not where the threshold is the last of its rows, as that of fewer than 20 is at 95 %.

        An extreme of resamples varies otherwise than one of draws: Bickel and Freedman, Some asymptotic
        theory for the bootstrap, Annals of Statistics 1981, section 6.
        """
        return int(self._ranked(rows).n_inside) * (1 - self._share) >= 1

    def uncertain(self, value: float, rows: Counted) -> Rate:
        """The rate at the limits of the quantile."""
        return Rate.at(value, self.level, self._ranked(rows), shared=self.positive == "id")


def _corners(positive: Counts, negative: Counts, first: NDArray[np.intp]) -> NDArray[np.intp]:
    """(...) the first scores from `first` on that `roc_curve` keeps: their step differs from the next one."""
    corners = np.empty_like(first)
    for place in np.ndindex(first.shape):
        corners[place] = _corner(positive[place], negative[place], int(first[place]))
    return corners


def _corner(positive: Counts, negative: Counts, first: int) -> int:
    if not positive[:first].any() and not negative[:first].any():  # the ends of the curve are kept
        return first
    for end in (first + _NEAR, len(positive)):
        later = first + np.flatnonzero(positive[first:end] | negative[first:end])
        up, along = positive[later], negative[later]
        turns = later[:-1][(up[1:] != up[:-1]) | (along[1:] != along[:-1])]
        if len(turns):
            return int(turns[0])
    return int(later[-1])
