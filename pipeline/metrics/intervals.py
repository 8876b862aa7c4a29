"""Confidence intervals of metrics in closed form: no resampling, no seed, one pass over counted scores.

Every interval is about the draw of the rows, which are taken to be independent; not about training the
classifier again. None has zero width: equal or separated scores of a few rows leave the truth open.

* Averages over rows and pairs (AUROC, average precision): the variance of DeLong et al. 1988 ("Comparing the
  areas under two or more correlated receiver operating characteristic curves", Biometrics 44) from what each
  row adds to the value, on the logit scale, with a quantile of Student's t whose degrees of freedom come from
  the fourth moments: few rows decide near 0 and 1. Never wider than what is possible for so many rows: the
  variance of an AUROC is at most value (1 - value) / (rows of the smaller set), so Wilson's interval of it.
* A rate at a quantile of the other set (FPR95): Wilson's interval of the rate, and the rates at the limits of
  the quantile by order statistics, joined by squares (Zou and Donner 2008, "Construction of confidence limits
  about effect measures", Statistics in Medicine 27).
* A smallest mean of two rates (detection error): Wilson's intervals of both, joined likewise, moved by the
  bias of a minimum.

The mean of several OOD sets is treated as one value of the rows of all; the sets share the ID rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, pi, sqrt
from typing import NamedTuple

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.metrics import Counts, Estimate

LEVEL = 0.95
"""Of all intervals."""
_TAIL = (1 - LEVEL) / 2
Z = 1.959963984540054
"""Standard errors on either side of an estimate in a 95 % interval."""


def wilson(value: float, rows: float) -> tuple[float, float]:
    """Wilson's interval of a share in [0, 1] of so many rows, which need not be a whole number."""
    centre, slack = value + Z**2 / (2 * rows), Z * sqrt(value * (1 - value) / rows + (Z / rows) ** 2 / 4)
    scale = 1 + Z**2 / rows
    return max((centre - slack) / scale, 0.0), min((centre + slack) / scale, 1.0)


class Average(NamedTuple):
    """A metric that is an average over rows, and what each row adds to it."""

    value: float
    inside: Float
    """(T,) of an ID row at each distinct ID score, with mean 0 over the rows."""
    outside: Float
    """(U,) of an OOD row at each distinct OOD score, likewise."""


class Rate(NamedTuple):
    """The share of one set at a quantile of the other, and at the limits of this quantile."""

    value: float
    rows: int
    """Of the set whose share it is."""
    low: float
    high: float
    shared: bool
    """Whether the quantile is one of the ID rows, which all OOD sets share; otherwise the share is."""


class Minimum(NamedTuple):
    """A smallest mean of two error rates: of OOD and of ID rows."""

    value: float
    outside: float
    n_outside: int
    inside: float
    n_inside: int


def average(parts: Sequence[Average], inside: Counts, outside: Sequence[Counts]) -> Estimate:
    """The mean of an `Average` over OOD sets, whose (T,) and (U,) rows are counted at distinct scores."""
    value = float(np.mean([part.value for part in parts]))
    added = [(inside, np.mean([part.inside for part in parts], axis=0))]
    added += [(counts, part.outside / len(parts)) for counts, part in zip(outside, parts, strict=True)]
    smallest = min(int(counts.sum()) for counts, _ in added)
    variance = spread = 0.0
    for counts, each in added:
        rows, squares = int(counts.sum()), each**2
        second, fourth = float((counts * squares).sum()), float((counts * squares**2).sum())
        variance += second / rows**2
        spread += (fourth - second**2 / rows) / rows**4
    low, high = wilson(value, smallest)
    rounding = 1e-24
    if smallest > 1 and variance > rounding and 0 < value < 1:
        from scipy.special import stdtrit

        freedom = max(2 * variance**2 / spread, 2.0) if spread > 0 else 2.0
        step = float(stdtrit(freedom, 1 - _TAIL)) * sqrt(variance) / (value * (1 - value))
        odds = log(value / (1 - value))
        low, high = max(low, _share(odds - step)), min(high, _share(odds + step))
    return _estimate(value, low, high)


def rate(parts: Sequence[Rate]) -> Estimate:
    """The mean of a `Rate` over OOD sets."""
    values = np.array([part.value for part in parts])
    own = np.abs(np.array([wilson(part.value, part.rows) for part in parts]) - values[:, None])
    at_quantile = np.abs(
        np.array([(min(p.low, p.value), max(p.high, p.value)) for p in parts]) - values[:, None]
    )
    shared, apart = (at_quantile, own) if parts[0].shared else (own, at_quantile)
    below, above = np.hypot(shared.mean(axis=0), np.sqrt((apart**2).sum(axis=0)) / len(parts))
    value = float(values.mean())
    return _estimate(value, value - below, value + above)


def minimum(parts: Sequence[Minimum]) -> Estimate:
    """The mean of a `Minimum` over OOD sets.

    The upper limit is moved by the bias of a minimum, the lower one by half of it: at hundreds of rows the
    bias is smaller than in the limit.
    """
    value = float(np.mean([part.value for part in parts]))
    outside = np.array([np.subtract(wilson(p.outside, p.n_outside), p.outside) for p in parts])
    inside = np.array([np.subtract(wilson(p.inside, p.n_inside), p.inside) for p in parts])
    below, above = np.hypot(np.sqrt((outside**2).sum(axis=0)) / len(parts), inside.mean(axis=0)) / 2
    bias = float(np.mean([_bias(part) for part in parts]))
    return _estimate(value, value - below + bias / 2, value + above + bias)


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

    return rank(1 - _TAIL), rank(_TAIL)


def averages(id_counts: Counts, ood_counts: Counts) -> dict[str, Average]:
    """AUROC and average precisions with what every row adds, from (T,) rows at every score, ascending."""
    n_id, n_ood = id_counts.sum(), ood_counts.sum()
    below, above = id_counts.cumsum() - id_counts / 2, n_ood - ood_counts.cumsum() + ood_counts / 2
    value = float((ood_counts * below).sum() / (n_id * n_ood))
    positive_in = _precision(id_counts, ood_counts)
    positive_out = _precision(ood_counts[::-1], id_counts[::-1])
    added = {
        "auroc": (value, above / n_ood - value, below / n_id - value),
        "aupr_in": positive_in,
        "aupr_out": (positive_out[0], positive_out[2][::-1], positive_out[1][::-1]),
    }
    return {
        name: Average(value, inside[id_counts > 0], outside[ood_counts > 0])
        for name, (value, inside, outside) in added.items()
    }


def _precision(positive: Counts, negative: Counts) -> tuple[float, Float, Float]:
    """Average precision and what positive and negative rows add to it; (T,) rows, most positive first.

    The derivatives of the sum over positive rows of hits / (hits + alarms).
    """
    hits, alarms = positive.cumsum(), negative.cumsum()
    n_hits, n_alarms, found = hits[-1], alarms[-1], (hits + alarms).astype(np.float64)
    precision = hits / found
    value = float((positive * precision).sum() / n_hits)
    by_hit, by_alarm = (np.cumsum((positive * part / found**2)[::-1])[::-1] for part in (alarms, hits))
    added = precision + by_hit
    lost = -by_alarm * (n_alarms / n_hits)
    return value, added - (positive * added).sum() / n_hits, lost - (negative * lost).sum() / n_alarms


def rate_at(value: float, level: float, positive: Counts, negative: Counts, shared: bool) -> Rate:
    """The share of negative rows at the quantile `level` of the positive ones; (T,), most positive first."""
    hits, alarms = positive.cumsum(), negative.cumsum()
    n_hits, n_alarms = int(hits[-1]), int(alarms[-1])

    def share(rank: float) -> float:
        whole = np.floor(rank) + np.arange(2)
        at = alarms[np.minimum(hits.searchsorted(whole), len(hits) - 1)] / n_alarms
        shares = np.where(whole < 1, 0.0, np.where(whole > n_hits, 1.0, at))
        return float(shares[0] + (rank - whole[0]) * (shares[1] - shares[0]))

    low, high = map(share, quantile_ranks(n_hits, level))
    return Rate(value, n_alarms, low, high, shared)


def minimum_of(value: float, id_counts: Counts, ood_counts: Counts) -> Minimum:
    """The smallest mean of the error rates and both of them there; (T,) rows at every score, ascending."""
    accepted, kept = ood_counts.cumsum(), id_counts.cumsum()
    n_ood, n_id = int(accepted[-1]), int(kept[-1])
    best = int((accepted * n_id - kept * n_ood).argmin())
    return Minimum(value, float(accepted[best] / n_ood), n_ood, float(1 - kept[best] / n_id), n_id)


def _share(odds: float) -> float:
    return 1 / (1 + exp(-odds)) if odds > -700 else 0.0


def _estimate(value: float, low: float, high: float) -> Estimate:
    """An interval in [0, 1] that holds the value."""
    return Estimate(value, max(min(float(low), value), 0.0), min(max(float(high), value), 1.0))
