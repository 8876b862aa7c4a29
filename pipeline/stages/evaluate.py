"""From score tables to metrics: one task per detector reads its column and returns a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pipeline.cluster.engine import Engine
from pipeline.columns import LABEL, PREDICTION, Float
from pipeline.metrics import comparisons, metrics
from pipeline.workspace import files, tables
from pipeline.workspace.files import Place

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("detector", "dataset", "group", "metric")),
        *((name, pa.float64()) for name in ("value", "ci_low", "ci_high")),
        *((name, pa.int64()) for name in ("n_id", "n_ood")),
    ]
)

CLASSIFIER = "classifier"
"""What stands in the column `detector` of the row with the classifier's accuracy."""

_OOD_GROUPS = ("near_ood", "far_ood")


@dataclass(frozen=True)
class Scores:
    """Folders of the score tables of a run, by role and dataset."""

    by_role: Mapping[str, Mapping[str, str]]
    seed: int

    def of(self, *roles: str) -> dict[str, str]:
        """Dataset -> folder of the datasets with these roles."""
        return {name: folder for role in roles for name, folder in self.by_role.get(role, {}).items()}


def run(
    engine: Engine, scores: Scores, detectors: Sequence[str], progress: Callable[[int], None] = lambda _: None
) -> tuple[pa.Table, dict[str, float]]:
    """Metrics of all detectors and their thresholds at 95 % ID acceptance.

    Args:
        engine: does the work.
        scores: where the score tables lie.
        detectors: their labels.
        progress: called with 1 after each detector.
    """
    rows = [row for name, folder in scores.of("id").items() for row in _accuracy(name, folder)]
    thresholds = {}
    for label, (found, threshold) in zip(
        detectors,
        engine.in_order(_evaluate, [(scores, label) for label in detectors]),
        strict=True,
    ):
        rows += found
        thresholds[label] = threshold
        progress(1)
    return pa.Table.from_pylist(rows, SCHEMA), thresholds


def write(folder: Place, table: pa.Table, thresholds: Mapping[str, float]) -> None:
    """Write metrics.parquet, .csv and .json and thresholds.json."""
    tables.write_table(folder / "metrics.parquet", table)
    files.write_json(folder / "metrics.json", table.to_pylist())
    with files.atomic(folder / "metrics.csv") as draft:
        pyarrow.csv.write_csv(table, draft)
    files.write_json(folder / "thresholds.json", dict(thresholds))


def _evaluate(scores: Scores, label: str) -> tuple[list[dict[str, Any]], float]:
    """All metric rows of one detector; with covariate-shifted ID data also the full-spectrum ones."""
    inside = _column(scores.of("id").values(), label)
    rows = _compare(scores, label, inside, prefix="")
    if scores.of("shifted_id"):
        spectrum = np.concatenate([inside, _column(scores.of("shifted_id").values(), label)])
        rows += _compare(scores, label, spectrum, prefix="fs_")
    return rows, metrics.threshold(inside)


def _compare(scores: Scores, label: str, inside: Float, prefix: str) -> list[dict[str, Any]]:
    """Rows of every OOD dataset and of the means of the groups."""
    members = {prefix + role: list(scores.of(role)) for role in _OOD_GROUPS if scores.of(role)}
    if not members:
        return []
    outside = {name: _column([folder], label) for name, folder in scores.of(*_OOD_GROUPS).items()}
    group_of = {name: group for group, names in members.items() for name in names}
    found = comparisons.compare(inside, outside, members, comparisons.Bootstrap(seed=scores.seed))
    return [
        {"detector": label, "group": group_of.get(result.dataset, result.dataset), **asdict(result)}
        for result in found
    ]


def _column(folders: Iterable[str], label: str) -> Float:
    """One detector's scores of some datasets."""
    parts = [part for folder in folders for part in tables.Table.open(files.at(folder)).parts()]
    columns = [table[label].to_numpy() for table in tables.read_columns(parts, [label])]
    return np.concatenate(columns) if columns else np.empty(0)


def _accuracy(dataset: str, folder: str) -> list[dict[str, Any]]:
    """The row with the classifier's accuracy on an ID dataset; its own argmax, not a detector's."""
    correct = total = 0
    parts = tables.Table.open(files.at(folder)).parts()
    for table in tables.read_columns(parts, [LABEL, PREDICTION]):
        correct += int((table[LABEL].to_numpy() == table[PREDICTION].to_numpy()).sum())
        total += len(table)
    estimate = metrics.accuracy(correct, total)
    row = {"detector": CLASSIFIER, "dataset": dataset, "group": "id", "metric": "id_accuracy"}
    return [{**row, **estimate._asdict(), "n_id": total, "n_ood": 0}]
