"""Confidence intervals of metrics in closed form: no resampling, no seed, one pass over counted scores.

Every interval is about the draw of the rows, which are taken to be independent; not about training the
classifier again. None has zero width: equal or separated scores of a few rows leave the truth open.

* Averages over rows and pairs (AUROC, average precision): the variance of DeLong et al. 1988 ("Comparing the
  areas under two or more correlated receiver operating characteristic curves", Biometrics 44) from what each
  row adds to the value, on the logit scale, with a quantile of Student's t whose degrees of freedom come from
  the fourth moments, for few rows decide near 0 and 1; and are Welch's at most, though two at least,
  for few rows have hardly any fourth moments. Never wider than what is possible for so many rows: the
  variance of an AUROC is at most value (1 - value) / (rows of the smaller set), so Wilson's interval of it.
* A rate at a quantile of the other set (FPR95): Wilson's interval of the rate, and the rates at the limits of
  the quantile by order statistics, joined by squares (Zou and Donner 2008, "Construction of confidence limits
  about effect measures", Statistics in Medicine 27).
* A smallest mean of two rates (detection error): Wilson's intervals of both, joined likewise, moved by the
  bias of a minimum, as far as scores are not tied.
* Areas under risk-coverage curves (AURC, AUGRC): the variance of what each ID row adds (the projection of a
  U-statistic, or the influence function), on the logit scale as above. Never wider than the best and the
  worst ranking give at the limits of Wilson's interval of the error rate.

The mean of several OOD sets is treated as one value of the rows of all; the sets share the ID rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, pi, sqrt
from typing import Self

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Counts, Estimate

LEVEL = 0.95
"""Of all intervals."""
TAIL = (1 - LEVEL) / 2
Z = 1.959963984540054
"""Standard errors on either side of an estimate in a 95 % interval."""


def wilson(value: float, rows: float) -> tuple[float, float]:
    """Wilson's interval of a share in [0, 1] of so many rows, which need not be a whole number."""
    centre, slack = value + Z**2 / (2 * rows), Z * sqrt(value * (1 - value) / rows + (Z / rows) ** 2 / 4)
    scale = 1 + Z**2 / rows
    return max((centre - slack) / scale, 0.0), min((centre + slack) / scale, 1.0)


Added = tuple[Counts, Float]
"""Rows at each of some scores, and what each of these rows adds to a value; with mean 0 over the rows."""


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of a set of the second and fourth powers of what each adds."""

    rows: int
    second: float
    fourth: float

    @classmethod
    def of(cls, added: Sequence[Added]) -> Self:
        """From one or more kinds of rows."""
        rows, second, fourth = 0, 0.0, 0.0
        for counts, each in added:
            squares = each * each
            weighted = counts * squares
            rows += int(counts.sum())
            second += float(weighted.sum())
            fourth += float((weighted * squares).sum())
        return cls(rows, second, fourth)

    @property
    def variance(self) -> float:
        """Of the value, by the draw of these rows; there must be two or more."""
        return self.second / (self.rows * (self.rows - 1))

    @property
    def spread(self) -> float:
        """Variance of that variance: by the fourth powers, but not less than of normal rows.

        The fourth powers of a few rows are hardly larger than the squares of their squares: of two rows they
        would say that the variance is certain.
        """
        by_fourth = (self.fourth - self.second**2 / self.rows) / self.rows**4
        return max(by_fourth, 2 * self.variance**2 / (self.rows - 1))

    def scaled(self, factor: float) -> Moments:
        """Where every row adds so many times as much."""
        return Moments(self.rows, self.second * factor**2, self.fourth * factor**4)


@dataclass(frozen=True)
class Average:
    """A metric that is an average over rows of both sets."""

    value: float
    inside: tuple[Added, ...]
    outside: Moments

    @classmethod
    def of(cls, value: float, inside: Sequence[Added], outside: Added) -> Self:
        """From (T,) counts and (T,) what is added: of one or more kinds of ID rows, and of OOD rows."""
        there = ((counts > 0, counts, each) for counts, each in inside)
        return cls(value, tuple((counts[at], each[at]) for at, counts, each in there), Moments.of([outside]))

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Estimate:
        """The mean over OOD sets, which have the same ID rows."""
        value = float(np.mean([part.value for part in parts]))
        kinds = zip(*(part.inside for part in parts), strict=True)
        inside = [(kind[0][0], sum(each for _, each in kind) / len(kind)) for kind in kinds]
        added = [Moments.of(inside), *(part.outside.scaled(1 / len(parts)) for part in parts)]
        return _on_logit_scale(value, added, *wilson(value, min(each.rows for each in added)))


@dataclass(frozen=True)
class Failures:
    """A metric that is an average over ID rows, and depends on which of them the classifier has right."""

    value: float
    added: Moments
    low: float
    high: float
    """What no ranking of these rows goes beyond, at the limits of Wilson's interval of the error rate."""

    @classmethod
    def of(
        cls,
        value: float,
        right: Added,
        wrong: Added,
        best: Callable[[float], float],
        worst: Callable[[float], float],
    ) -> Self:
        """From what right and wrong rows add, and the value of the best and worst ranking by error rate."""
        added = Moments.of([right, wrong])
        low, high = wilson(int(wrong[0].sum()) / added.rows, added.rows)
        return cls(value, added, best(low), worst(high))

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Estimate:
        """Of one set."""
        (only,) = parts
        return _on_logit_scale(only.value, [only.added], only.low, only.high)


@dataclass(frozen=True)
class Rate:
    """The share of one set at a quantile of the other, and at the limits of this quantile."""

    value: float
    rows: int
    """Of the set whose share it is."""
    low: float
    high: float
    shared: bool
    """Whether the quantile is one of the ID rows, which all OOD sets share; otherwise the share is."""

    @classmethod
    def at(cls, value: float, level: float, ranked: Counted, shared: bool) -> Self:
        """The share of `outside` rows at the quantile `level` of `inside` ones; most positive first."""
        hits, alarms = ranked.inside_upto, ranked.outside_upto
        n_hits, n_alarms = int(hits[-1]), int(alarms[-1])

        def share(rank: float) -> float:
            whole = np.floor(rank) + np.arange(2)
            at = alarms[np.minimum(hits.searchsorted(whole), len(hits) - 1)] / n_alarms
            shares = np.where(whole < 1, 0.0, np.where(whole > n_hits, 1.0, at))
            return float(shares[0] + (rank - whole[0]) * (shares[1] - shares[0]))

        low, high = map(share, quantile_ranks(n_hits, level))
        return cls(value, n_alarms, low, high, shared)

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Estimate:
        """The mean over OOD sets."""
        values = np.array([part.value for part in parts])
        own = np.abs(np.array([wilson(part.value, part.rows) for part in parts]) - values[:, None])
        at_quantile = np.abs(
            np.array([(min(p.low, p.value), max(p.high, p.value)) for p in parts]) - values[:, None]
        )
        shared, apart = (at_quantile, own) if parts[0].shared else (own, at_quantile)
        below, above = np.hypot(shared.mean(axis=0), np.sqrt((apart**2).sum(axis=0)) / len(parts))
        value = float(values.mean())
        return _estimate(value, value - below, value + above)


@dataclass(frozen=True)
class Minimum:
    """A smallest mean of two error rates: of OOD and of ID rows."""

    value: float
    outside: float
    n_outside: int
    inside: float
    n_inside: int
    tied: float
    """Share of the rows whose score is that of the threshold; both sets weigh the same."""

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Estimate:
        """The mean over OOD sets.

        The upper limit is moved by the bias of a minimum, the lower one by half of it: at hundreds of rows
        the bias is smaller than in the limit. Where many rows have one score few thresholds compete, and
        there may be no bias: the lower limit is moved by less.
        """
        value = float(np.mean([part.value for part in parts]))
        outside = np.array([np.subtract(wilson(p.outside, p.n_outside), p.outside) for p in parts])
        inside = np.array([np.subtract(wilson(p.inside, p.n_inside), p.inside) for p in parts])
        below, above = np.hypot(np.sqrt((outside**2).sum(axis=0)) / len(parts), inside.mean(axis=0)) / 2
        most = np.array([_bias(part) for part in parts])
        least = np.maximum(most - [part.tied for part in parts], 0)
        return _estimate(value, value - below + least.mean() / 2, value + above + most.mean())


def _on_logit_scale(value: float, added: Sequence[Moments], low: float, high: float) -> Estimate:
    """The interval of a sum over independent sets of rows, within limits."""
    few = min(each.rows for each in added) < 2
    variance = 0.0 if few else sum(each.variance for each in added)
    rounding = 1e-24
    if variance > rounding and 0 < value < 1:
        from scipy.special import stdtrit

        freedom = max(2 * variance**2 / sum(each.spread for each in added), 2.0)
        step = float(stdtrit(freedom, 1 - TAIL)) * sqrt(variance) / (value * (1 - value))
        odds = log(value / (1 - value))
        low, high = max(low, _share(odds - step)), min(high, _share(odds + step))
    return _estimate(value, low, high)


def _bias(found: Minimum) -> float:
    """How far the smallest mean of two observed error rates lies below that of the true ones, on average.

    The mean of the largest value of a Brownian motion minus a parabola is 0.99619 (Groeneboom 1989, "Brownian
    motion with a parabolic drift and Airy functions"); scale and curvature are those of two normal
    distributions of one variance with this error. Where they are flat, the bias is at most that of the
    Kolmogorov-Smirnov distance of one distribution.
    """
    from scipy.special import ndtri

    noise = 1 / found.n_inside + 1 / found.n_outside
    error = max(found.value, 0.5 / min(found.n_inside, found.n_outside))
    most = sqrt(pi / 32 * noise)
    if error >= 0.5:
        return most
    distance = -2 * float(ndtri(error))
    density = exp(-(distance**2) / 8) / sqrt(2 * pi)
    return float(min(0.99619 * (noise / 4) ** (2 / 3) * (4 * density / distance) ** (1 / 3), most))


def quantile_ranks(rows: int, share: float) -> tuple[float, float]:
    """Ranks, from 1 and not whole, of the order statistics that the quantile of a share lies between.

    An order statistic is at or below the quantile with a probability of the beta distribution (Hutson 1999,
    "Calculating nonparametric confidence intervals for quantiles using fractional order statistics"). 0 or
    `rows` + 1 where no row is far enough out.
    """
    from scipy.special import betainc

    def rank(probability: float) -> float:
        below, above = 0.0, rows + 1.0
        while above - below > 1e-6 * max(rows, 1) ** 0.5:
            middle = (below + above) / 2
            at = float(betainc(middle, rows + 1 - middle, share))
            below, above = (middle, above) if at > probability else (below, middle)
        return (below + above) / 2

    return rank(1 - TAIL), rank(TAIL)


def _share(odds: float) -> float:
    return 1 / (1 + exp(-odds)) if odds > -700 else 0.0


def _estimate(value: float, low: float, high: float) -> Estimate:
    """An interval in [0, 1] that holds the value."""
    return Estimate(value, max(min(float(low), value), 0.0), min(max(float(high), value), 1.0))
