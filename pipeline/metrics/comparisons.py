"""Scores of ID against those of OOD datasets, with means over groups and confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from numpy.typing import ArrayLike

from pipeline.metrics import intervals
from pipeline.metrics.metrics import METRICS, Counts, Estimate, checked, counted, metrics_at


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


def compare(
    id_scores: ArrayLike,
    ood_scores: Mapping[str, ArrayLike],
    groups: Mapping[str, Sequence[str]],
) -> list[Result]:
    """All metrics of one detector on every OOD dataset, and their unweighted means over every group.

    Args:
        id_scores: (N,) finite float, higher = more OOD.
        ood_scores: dataset -> (M,) finite float, higher = more OOD.
        groups: group -> names of its datasets, at least one.

    Returns:
        Datasets and then groups, in the order given; `METRICS` within each, with 95 % intervals.

    Raises:
        UserError: if a dataset is empty or has a score that is NaN or infinite.
        ValueError: if a group is empty or names an unknown dataset.

    Cost:
        One sort for each dataset.
    """
    names = list(ood_scores)
    members = [(name, [i]) for i, name in enumerate(names)]
    members += [(group, _positions(group, datasets, names)) for group, datasets in groups.items()]
    inside = checked(id_scores, "the ID data")
    measured = [_Measured(*counted([inside, checked(ood_scores[name], repr(name))])) for name in names]
    results = []
    for name, chosen in members:
        parts = [measured[i] for i in chosen]
        n_ood = sum(int(part.ood_counts.sum()) for part in parts)
        results += [Result(name, metric, *_mean(metric, parts), len(inside), n_ood) for metric in METRICS]
    return results


class _Measured:
    """All metrics on one OOD dataset, with what their intervals are made of."""

    def __init__(self, id_counts: Counts, ood_counts: Counts) -> None:
        values = dict(zip(METRICS, metrics_at(id_counts, ood_counts).tolist(), strict=True))
        self.id_counts, self.ood_counts = id_counts[id_counts > 0], ood_counts[ood_counts > 0]
        averages = intervals.averages(id_counts, ood_counts)
        self.averages = {name: part._replace(value=values[name]) for name, part in averages.items()}
        rate_at = partial(intervals.rate_at, level=0.95)
        self.rates = {
            "fpr95_id": rate_at(values["fpr95_id"], positive=id_counts, negative=ood_counts, shared=True),
            "fpr95_ood": rate_at(
                values["fpr95_ood"], positive=ood_counts[::-1], negative=id_counts[::-1], shared=False
            ),
        }
        self.error = intervals.minimum_of(values["detection_error"], id_counts, ood_counts)


def _mean(metric: str, parts: Sequence[_Measured]) -> Estimate:
    """The unweighted mean of a metric over some datasets."""
    if metric in parts[0].averages:
        outside = [part.ood_counts for part in parts]
        return intervals.average([part.averages[metric] for part in parts], parts[0].id_counts, outside)
    if metric in parts[0].rates:
        return intervals.rate([part.rates[metric] for part in parts])
    return intervals.minimum([part.error for part in parts])


def _positions(group: str, members: Sequence[str], names: Sequence[str]) -> list[int]:
    """Positions of the members of a group among the datasets."""
    if not members or not set(members) <= set(names):
        raise ValueError(f"group {group!r}: got members {list(members)}; expected some of {list(names)}.")
    return [names.index(member) for member in members]
