"""Whether one detector is better than another on the same images.

Differences of the AUROC are tested as DeLong et al. 1988 do, those of other metrics by a paired bootstrap:
one draw of the images serves all detectors. Both errors are judged by Student's t. Of all pairs of detectors
on a dataset, p-values of a metric are corrected by Holm 1979 ("A simple sequentially rejective multiple test
procedure").

Rows are cut at random into at most 1024 groups, which stand for the rows: sums over groups vary as sums over
rows do, and a sample has one size whatever the number of rows. Where there are fewer rows, each is a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.columns import Float, Mask
from pipeline.metrics.base import Counted, Counts, Metric
from pipeline.metrics.intervals import TAIL, Z
from pipeline.metrics.metrics import FAILURES, LEVEL, against_ood, checked, counted

GROUPS = 1024
"""Most groups of rows of a set."""
LEVEL_OF_TESTS = 0.05
"""Corrected p-values below tell two detectors apart."""
RESAMPLES = 200
"""Of the paired bootstrap; standard errors are good to 5 %."""
_BINS = 2048
"""Most distinct scores that a resample tells apart."""
_SPARSE = 256
"""Rows of a group from which a product with all bins is quicker than adding rows up."""


@dataclass(frozen=True)
class Sample:
    """One detector on one dataset or group of them, and how its values vary with the draw of the rows."""

    dataset: str
    metrics: tuple[str, ...]
    """Names of M metrics."""
    values: Float
    """(M,) of the rows."""
    added: Float
    """(G,) what every group of rows adds to the AUROC; with mean 0 over those of a set."""
    replicates: Float
    """(R, M) of resamples, the same ones for every detector."""
    varies: tuple[bool, ...]
    """(M,) whether these tell how a value varies."""
    rows: int
    """Of the smallest set."""


@dataclass(frozen=True)
class Difference:
    """One detector against another, by one metric on one dataset or group."""

    detector: str
    other: str
    dataset: str
    metric: str
    difference: float
    """Value of the detector minus that of the other, on the rows that all have scores of."""
    ci_low: float
    ci_high: float
    """95 % interval of this difference alone."""
    p_value: float
    p_holm: float
    """Corrected for all pairs on this dataset."""


def sample(
    id_scores: ArrayLike,
    ood_scores: Mapping[str, ArrayLike],
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
    right: ArrayLike | None = None,
    level: float = LEVEL,
) -> list[Sample]:
    """One detector's samples, by dataset and then by group, which are comparable with those of another.

    Args:
        id_scores: (N,) finite float, higher = more OOD; the same rows in the same order for every detector.
        ood_scores: dataset -> (M,) finite float, likewise.
        groups: group -> names of its datasets, at least one.
        seed: of the draws; the same for every detector.
        right: (N,) bool, which ID rows the classifier puts into their class; without it, metrics that need
            labels are left out.
        level: share at which FPR is measured.

    Raises:
        UserError: if a dataset is empty or has a score that is NaN or infinite.
    """
    inside = checked(id_scores, "the ID data")
    known = None if right is None else np.asarray(right, dtype=np.bool_)
    metrics = [each for each in against_ood(level) if known is not None or not each.needs_labels]
    drawn_inside, ranks = _Draw(len(inside), (seed, 0)), _ranks(inside)
    found, added_inside, added_outside = {}, {}, {}
    for number, (name, given) in enumerate(ood_scores.items(), start=1):
        outside = checked(given, repr(name))
        drawn_outside = _Draw(len(outside), (seed, number))
        rows = counted(inside, outside, known)
        above, below = _placements(rows)
        added_inside[name] = drawn_inside.sums(above[ranks] / len(inside))
        added_outside[name] = drawn_outside.sums(below[_ranks(outside)] / len(outside))
        added = np.concatenate([added_inside[name], added_outside[name]])
        edges = _edges([inside, outside])
        places = edges.searchsorted(inside)
        resampled = Counted(
            drawn_inside.counts(places, len(edges)),
            drawn_outside.counts(edges.searchsorted(outside), len(edges)),
            np.empty(0, np.int64) if known is None else drawn_inside.counts(places, len(edges), known),
        )
        found[name] = _sample(name, metrics, rows, resampled, added, min(len(inside), len(outside)))
    means = []
    for group, names in groups.items():
        members = [found[name] for name in names]
        shared = np.mean([added_inside[name] for name in names], axis=0)
        apart = [added_outside[name] / len(names) for name in names]
        means.append(
            Sample(
                group,
                members[0].metrics,
                np.mean([member.values for member in members], axis=0),
                np.concatenate([shared, *apart]),
                np.mean([member.replicates for member in members], axis=0),
                tuple(map(all, zip(*(member.varies for member in members), strict=True))),
                min(member.rows for member in members),
            )
        )
    return [*found.values(), *means]


def sample_failures(dataset: str, scores: ArrayLike, right: ArrayLike, seed: int = 0) -> Sample:
    """One detector's sample of `FAILURES` on the rows of an ID dataset.

    Args:
        dataset: its name.
        scores: (N,) finite float, higher = less sure; the same rows in the same order for every detector.
        right: (N,) bool, which rows the classifier puts into their class.
        seed: of the draws; the same for every detector.

    Raises:
        UserError: if there is no row, or a score is NaN or infinite.
    """
    inside, known = checked(scores, repr(dataset)), np.asarray(right, dtype=np.bool_)
    drawn, edges = _Draw(len(inside), (seed, 0)), _edges([inside])
    places = edges.searchsorted(inside)
    counts = drawn.counts(places, len(edges))
    resampled = Counted(counts, right=drawn.counts(places, len(edges), known))
    rows = counted(inside, right=known)
    return _sample(dataset, FAILURES, rows, resampled, np.empty(0), len(inside))


def _sample(
    dataset: str, metrics: Sequence[Metric], rows: Counted, resampled: Counted, added: Float, smallest: int
) -> Sample:
    values, replicates = (
        np.stack([metric.value(each) for metric in metrics], axis=-1) for each in (rows, resampled)
    )
    names, varies = zip(*((metric.name, metric.varies(rows)) for metric in metrics), strict=True)
    return Sample(dataset, names, values, added, replicates, varies, smallest)


def _placements(rows: Counted) -> tuple[Float, Float]:
    """What ID rows add to the AUROC at each distinct ID score, and OOD rows at theirs."""
    below = rows.below
    value = (rows.outside * below).sum() / rows.n_outside
    return rows.above[rows.inside > 0] - value, below[rows.outside > 0] - value


def differences(samples: Mapping[str, Sequence[Sample]]) -> Iterator[Difference]:
    """All pairs of detectors, by dataset and metric.

    Args:
        samples: of each detector, by its label; all of the same datasets and rows.
    """
    for together in zip(*samples.values(), strict=True):
        for column, metric in enumerate(together[0].metrics):
            pairs = list(combinations(range(len(together)), 2))
            tested = [_test(together[first], together[second], column) for first, second in pairs]
            corrected = holm([p for _, _, p in tested])
            for (first, second), (difference, slack, p), p_holm in zip(pairs, tested, corrected, strict=True):
                yield Difference(
                    list(samples)[first],
                    list(samples)[second],
                    together[0].dataset,
                    metric,
                    difference,
                    max(difference - slack, -1.0),
                    min(difference + slack, 1.0),
                    p,
                    p_holm,
                )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order of the given ones."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1) if len(p_values) else scaled
    return [float(p) for p in corrected]


def _test(one: Sample, other: Sample, column: int) -> tuple[float, float, float]:
    """Difference of a metric, half of its interval, and the p-value of no difference.

    By Student's t with the degrees of freedom of the smallest set, which may decide alone: Welch's are no
    fewer. A single row has none; it does not tell how rows vary, nor do resamples how an extreme does.
    """
    from scipy.special import stdtr, stdtrit

    difference, freedom = float(one.values[column] - other.values[column]), one.rows - 1
    if one.metrics[column] == "auroc":
        error = float(np.sqrt(((one.added - other.added) ** 2).sum()))
    else:
        error = float((one.replicates[:, column] - other.replicates[:, column]).std(ddof=1))
    if error < 1e-12:  # both the same on every draw, as of few rows that all are separated or equal
        if abs(difference) < 1e-12:
            return difference, 0.0, 1.0
        error = Z / 2 / (one.rows + Z**2)  # half of Wilson's interval of as many rows that all agree
    if not (freedom and one.varies[column]):
        return difference, 2.0, 1.0  # no difference is larger
    slack = float(stdtrit(freedom, 1 - TAIL)) * error
    return difference, slack, float(2 * stdtr(freedom, -abs(difference) / error))


@lru_cache(32)  # detectors are measured on the same draws
class _Draw:
    """Groups of the rows of a set, and how often each is in every resample."""

    def __init__(self, rows: int, seed: tuple[int, int]) -> None:
        rng = np.random.default_rng(seed)
        self.groups = min(rows, GROUPS)
        self.group = (rng.permutation(rows) % self.groups).astype(np.int16)
        share = np.bincount(self.group) / rows
        drawn = rng.multinomial(self.groups, share, size=RESAMPLES)
        self.weights = np.ascontiguousarray(drawn.T, np.float32)
        """(G, R) float32."""

    def sums(self, of_rows: Float) -> Float:
        """(G,) sums over the rows of each group, scaled for an unbiased variance of a mean of rows."""
        unbiased = np.sqrt(self.groups / max(self.groups - 1, 1))
        return np.asarray(np.bincount(self.group, of_rows * unbiased, minlength=self.groups))

    def counts(self, places: NDArray[np.intp], width: int, some: Mask | slice = slice(None)) -> Counts:
        """(R, width) rows of every resample in each bin, from the bin of each row; of all rows or of some."""
        from scipy.sparse import csr_array

        group, places = self.group[some], places[some]
        if len(places) < _SPARSE * self.groups:  # integers below 2**24: the same bits either way
            ones = np.ones(len(places), np.float32)
            found = csr_array((ones, (places, group)), (width, self.groups)) @ self.weights
            return np.asarray(found.T.astype(np.int64, order="C"))
        table = np.bincount(group * np.intp(width) + places, minlength=self.groups * width)
        drawn = self.weights.T @ table.reshape(self.groups, width).astype(np.float32)
        return drawn.astype(np.int64)


def _ranks(scores: Float) -> NDArray[np.intp]:
    """(N,) position of every score among the distinct ones."""
    return np.unique(scores, return_inverse=True)[1]


def _edges(sets: Sequence[Float]) -> Float:
    """Upper ends of bins; neighbouring scores share one only where there are more than 2048."""
    edges = np.unique(np.concatenate(sets))
    if len(edges) > _BINS:
        shares = np.linspace(0, 1, _BINS // 2)
        edges = np.unique(np.concatenate([np.quantile(each, shares, method="nearest") for each in sets]))
    return edges
