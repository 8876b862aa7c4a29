"""Scores of ID against those of OOD datasets, with means over groups and confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.metrics.base import Estimate, Metric
from pipeline.metrics.metrics import FAILURES, LEVEL, against_ood, checked, counted


@dataclass(frozen=True)
class Result:
    """A metric on one dataset, or its mean over the group that `dataset` names."""

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
    right: ArrayLike | None = None,
    level: float = LEVEL,
) -> list[Result]:
    """All metrics of one detector on every OOD dataset, and their unweighted means over every group.

    Args:
        id_scores: (N,) finite float, higher = more OOD.
        ood_scores: dataset -> (M,) finite float, higher = more OOD.
        groups: group -> names of its datasets, at least one.
        right: (N,) bool, which ID rows the classifier puts into their class; without it, metrics that need
            labels are left out.
        level: share at which FPR is measured, in (0, 1).

    Returns:
        Datasets and then groups, in the order given; metrics within each, with 95 % intervals.

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
    outside = [checked(ood_scores[name], repr(name)) for name in names]
    known = None if right is None else np.asarray(right, dtype=np.bool_)
    metrics = [each for each in against_ood(level) if known is not None or not each.needs_labels]
    measured: list[dict[str, Any]] = []
    for scores in outside:
        rows = counted(inside, scores, known)
        measured.append({each.name: each.uncertain(float(each.value(rows)), rows) for each in metrics})
    results, estimates = [], dict[tuple[Any, ...], Estimate]()
    for name, chosen in members:
        n_ood = sum(len(outside[i]) for i in chosen)
        for metric in metrics:
            where = metric.name, *chosen
            if where not in estimates:
                parts = [measured[i][metric.name] for i in chosen]
                estimates[where] = type(parts[0]).mean(parts)
            results.append(Result(name, metric.name, *estimates[where], len(inside), n_ood))
    return results


def failures(dataset: str, scores: ArrayLike, right: ArrayLike) -> list[Result]:
    """How well the scores of an ID dataset tell what the classifier has wrong, with 95 % intervals.

    Args:
        dataset: its name.
        scores: (N,) finite float, higher = less sure.
        right: (N,) bool, which rows the classifier puts into their class.

    Raises:
        UserError: if there is no row, or a score is NaN or infinite.
    """
    rows = counted(checked(scores, repr(dataset)), right=np.asarray(right, dtype=np.bool_))

    def estimate(metric: Metric) -> Estimate:
        uncertain = metric.uncertain(float(metric.value(rows)), rows)
        found: Estimate = type(uncertain).mean([uncertain])
        return found

    total = int(rows.n_inside)
    return [Result(dataset, metric.name, *estimate(metric), total, 0) for metric in FAILURES]


def _positions(group: str, members: Sequence[str], names: Sequence[str]) -> list[int]:
    """Positions of the members of a group among the datasets."""
    if not members or not set(members) <= set(names):
        raise ValueError(f"group {group!r}: got members {list(members)}; expected some of {list(names)}.")
    return [names.index(member) for member in members]
