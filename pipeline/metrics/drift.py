"""Whether new images are like those that thresholds were calibrated on: all together, and over time.

All together: the two-sample test of Kolmogorov and Smirnov. Over time: control charts of the share that is
flagged, Shewhart's p-chart for large changes and the CUSUM of Page (Continuous inspection schemes,
Biometrika 1954) for small ones that last; Montgomery, Introduction to Statistical Quality Control, ch. 7, 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import Float
from pipeline.metrics.conformal import exact

BEYOND = 0.00135
"""Probability that a share in control is above the limit of the p-chart, as of three standard deviations."""

SLACK, DECISION = 0.5, 5.0
"""Of the CUSUM, in standard deviations: half the change that is looked for, and the sum that is a signal; in
control it comes once in about 930 dates."""

FEWEST = 30
"""Scores of a set from which on the asymptotic p-value of a distance is near the exact one."""

_TAIL = 0.025


class Ranks:
    """Where scores lie among those of calibration images: enough for the distance of both distributions."""

    def __init__(self, calibration: Float) -> None:
        """Begin without scores.

        Args:
            calibration: (n,) scores; those that are not finite do not count.
        """
        there = calibration[np.isfinite(calibration)]
        self._points, counts = np.unique(there, return_counts=True)
        self._share = np.concatenate([[0], np.cumsum(counts)]) / max(len(there), 1)
        self._size = len(there)
        self._counts = np.zeros(2 * len(self._points) + 1, np.int64)
        """Scores below the first point, at it, between it and the second, and so on."""

    def add(self, scores: Float) -> None:
        """Take (N,) scores in; those that are not finite do not count."""
        there = scores[np.isfinite(scores)]
        places = np.searchsorted(self._points, there, "left") + np.searchsorted(self._points, there, "right")
        self._counts += np.bincount(places, minlength=len(self._counts))

    @property
    def rows(self) -> int:
        """Scores that were taken in."""
        return int(self._counts.sum())

    def distance(self) -> tuple[float, float | None]:
        """Largest difference of the distribution functions, 0 of no scores, and its p-value.

        It is the asymptotic one, and None where one of the sets has fewer than `FEWEST` scores.
        """
        if not self.rows or not self._size:
            return 0.0, None
        upto = np.cumsum(self._counts) / self.rows
        below, at = abs(upto[:-1:2] - self._share[:-1]), abs(upto[1::2] - self._share[1:])
        found = float(max(below.max(), at.max()))
        if min(self.rows, self._size) < FEWEST:
            return found, None
        from scipy.stats import kstwo

        effective = self.rows * self._size / (self.rows + self._size)
        return found, float(np.clip(kstwo.sf(found, max(round(effective), 1)), 0, 1))

    def above(self) -> float:
        """Share of the scores above the median of the calibration ones, half of those at it; NaN of none.

        Of an even number, all between the two in the middle is the median.
        """
        if not self.rows or not self._size:
            return math.nan
        middle = int(np.searchsorted(self._share[1:], 0.5))
        place = 2 * middle + (2 if self._share[middle + 1] == 0.5 else 1)
        return float((self._counts[place + 1 :].sum() + self._counts[place] / 2) / self.rows)


@dataclass(frozen=True)
class Point:
    """One date of a control chart."""

    date: str
    images: int
    flagged: int
    most: int
    """Flags that the p-chart lets pass."""
    cusum: float
    """Sum of what lies above the centre, in standard deviations."""

    @property
    def signals(self) -> bool:
        """Whether one of the charts is out of control."""
        return self.flagged > self.most or self.cusum > DECISION


def centre(rate: float, calibration: int) -> float:
    """The largest share of ID images that such a threshold may flag, at 97.5 %.

    The threshold at a false-alarm rate is an order statistic of n calibration scores; of new ID images it
    flags a share from the beta distribution with parameters k = ⌊rate (n + 1)⌋ and n + 1 - k. Charts begin
    there, so that a threshold that came out low is not taken for a drift.

    Args:
        rate: false-alarm rate in (0, 1).
        calibration: n.
    """
    from scipy.special import betaincinv

    k = math.floor(exact(rate) * (calibration + 1))
    return float(betaincinv(k, calibration + 1 - k, 1 - _TAIL)) if k else 0.0


def chart(
    dates: Sequence[str], images: NDArray[np.int64], flagged: NDArray[np.int64], middle: float
) -> list[Point]:
    """Both charts of the share that is flagged, date by date; they look for more flags, not for fewer.

    Args:
        dates: (T,) in order.
        images: (T,) at each date, at least 1.
        flagged: (T,) of them.
        middle: share that is flagged in control, in (0, 1).
    """
    from scipy.special import bdtr

    found, total = [], 0.0
    for date, count, hits in zip(dates, images.tolist(), flagged.tolist(), strict=True):
        deviation = math.sqrt(count * middle * (1 - middle))
        total = max(0.0, total + (hits - count * middle) / deviation - SLACK)
        ranks = np.arange(count + 1, dtype=float)
        most = int(np.searchsorted(bdtr(ranks, count, middle), 1 - BEYOND))
        found.append(Point(date, count, hits, most, total))
    return found
