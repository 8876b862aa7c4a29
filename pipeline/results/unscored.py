"""Rows that a detector gave no score, in words: for whoever reads its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.stages.score import Unscored

SIDES = (("id", "shifted_id"), ("near_ood", "far_ood"))
"""Roles of the datasets that are compared with each other: ID, and OOD."""


def sentences(
    unscored: Unscored, datasets: Mapping[str, Mapping[str, Any]], sides: Sequence[Sequence[str]] = SIDES
) -> dict[str, str]:
    """What is to be said of the detectors that could not score all rows, by label.

    Args:
        unscored: as in `manifest.json`.
        datasets: `role`, and number of `features`, of each dataset.
        sides: roles of ID, and of OOD datasets.
    """
    lost: dict[str, list[str]] = {}
    for dataset, found in unscored.items():
        for label in found:
            lost.setdefault(label, []).append(dataset)
    roles = {name: entry["role"] for name, entry in datasets.items()}
    told = {}
    for label, names in lost.items():
        counts = (_counted(name, datasets[name]["features"], unscored[name][label]) for name in names)
        told[label] = f"{label} has no score for {', '.join(counts)}. Its numbers are without them."
        hit = [bool({roles[name] for name in names} & set(side)) for side in sides]
        compared = all(set(roles.values()) & set(side) for side in sides)
        if compared and any(hit) and not all(hit):
            told[label] += f" It lost {'ID' if hit[0] else 'OOD'} images alone, which can flatter it."
    return told


def _counted(dataset: str, rows: int, lost: Mapping[str, Any]) -> str:
    more = ", ..." if lost["rows"] > len(lost["first"]) else ""
    return f"{lost['rows']:,} of {rows:,} images of {dataset} ({', '.join(lost['first'])}{more})"
