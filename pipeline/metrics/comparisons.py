"""Scores of ID against those of OOD datasets, with means over groups and bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.columns import Float
from pipeline.metrics.metrics import METRICS, Counts, Estimate, checked, counted, metrics_at

_BINS = 2048


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
    scores = [checked(id_scores, "the ID data"), *(checked(ood_scores[name], repr(name)) for name in names)]
    n_id, *n_ood = map(len, scores)
    values, replicates = _replicate(counted(scores), bootstrap)
    results = []
    for name, chosen in members:
        value, draws = values[chosen].mean(axis=0), replicates[chosen].mean(axis=0)
        size = sum(n_ood[i] for i in chosen)
        for i, metric in enumerate(METRICS):
            results.append(Result(name, metric, *bootstrap.interval(value[i], draws[:, i]), n_id, size))
    return results


def _positions(group: str, members: Sequence[str], names: Sequence[str]) -> list[int]:
    """Positions of the members of a group among the datasets."""
    if not members or not set(members) <= set(names):
        raise ValueError(f"group {group!r}: got members {list(members)}; expected some of {list(names)}.")
    return [names.index(member) for member in members]


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
