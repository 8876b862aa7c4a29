"""Our numbers beside published ones, and what keeps a run from being one of its protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.published import Published, members
from pipeline.metrics.metrics import named
from pipeline.results.report.tables import GROUPS, Results

CLASSIFIER = "classifier"
"""What stands in the column `detector` of the ID accuracy."""


@dataclass(frozen=True)
class Comparison:
    """One published value and ours, of the same definition."""

    detector: str
    """Our label, or `classifier`."""
    published: Published
    value: float
    low: float
    high: float

    @property
    def dataset(self) -> str:
        """The dataset, or the title of the group."""
        name = self.published.dataset
        return f"{GROUPS[name]}, mean" if name in GROUPS else name

    @property
    def metric(self) -> str:
        """Title of the metric."""
        if self.published.metric == "id_accuracy":
            return "ID accuracy ↑"
        metric = named(self.published.metric)
        return f"{metric.label} {metric.arrow}"

    @property
    def difference(self) -> float:
        """Ours minus the published value."""
        return self.value - self.published.value


def comparisons(results: Results, known: Iterable[Published]) -> list[Comparison]:
    """Published values that the run has a counterpart of, in their order.

    A method that ran under several labels is compared under each.
    """
    ours = {
        (row["detector"], row["dataset"], row["metric"]): row
        for row in results.metrics.to_pylist()
        if row["dataset"] == row["group"] or not row["group"].startswith("fs_")
    }
    labels: dict[str, list[str]] = {CLASSIFIER: [CLASSIFIER]}
    for label, entry in results.manifest["detectors"].items():
        labels.setdefault(entry["method"], []).append(label)
    known = list(known)
    other = {group for row in known[:1] for group in other_groups(results.manifest["datasets"], row.protocol)}
    found = [
        (label, row, ours.get((label, row.dataset, row.metric)))
        for row in known
        if row.dataset not in other
        for label in labels.get(row.detector, [])
    ]
    return [
        Comparison(label, row, mine["value"], mine["ci_low"], mine["ci_high"])
        for label, row, mine in found
        if mine is not None
    ]


def other_groups(datasets: Mapping[str, Mapping[str, Any]], protocol: str) -> dict[str, str]:
    """Groups whose mean is over other datasets than the protocol's, with a sentence that says which."""
    ours: dict[str, set[str]] = {}
    for name, entry in datasets.items():
        ours.setdefault(entry["role"], set()).add(name)
    theirs, found = members(protocol), {}
    for prefix, shared in (("", ("id",)), ("fs_", ("id", "shifted_id"))):
        for group in ("near_ood", "far_ood"):
            roles = [role for role in (*shared, group) if ours.get(role, set()) != theirs.get(role, set())]
            if roles and all(ours.get(role) and theirs.get(role) for role in (*shared, group)):
                names = "; ".join(f"{role}: {', '.join(sorted(ours.get(role, set())))}" for role in roles)
                found[prefix + group] = f"{prefix}{group} is no mean over the protocol's datasets ({names})."
    return found


def deviations(datasets: Mapping[str, Mapping[str, Any]], protocol: str) -> list[str]:
    """What differs, or may differ, from the images of the protocol; one sentence each."""
    others = ("unlabelled", "id_val", "ood_val")
    compared = {name: entry for name, entry in datasets.items() if entry["role"] not in others}
    other = [
        f"{name} has {entry['features']:,} of {entry['expected']:,} images."
        for name, entry in compared.items()
        if entry["expected"] not in (None, entry["features"])
    ]
    unchecked = [name for name, entry in compared.items() if entry["expected"] is None]
    return [
        *other_groups(datasets, protocol).values(),
        *other,
        *([f"Number of images not checked: {', '.join(unchecked)}."] if unchecked else []),
    ]
