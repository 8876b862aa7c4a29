"""What the report reads, and its numbers arranged in tables.

Computes no metric: every value in a table is one of `metrics.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import IS_OOD, Float
from pipeline.errors import UserError
from pipeline.metrics.auroc import AUROC
from pipeline.metrics.base import Metric
from pipeline.metrics.fpr import FPR
from pipeline.metrics.metrics import FAILURES, named
from pipeline.metrics.pairs import LEVEL_OF_TESTS
from pipeline.results import calibrated
from pipeline.stages.decisions import DECISIONS
from pipeline.workspace import tables
from pipeline.workspace.files import Place

OOD = ("near_ood", "far_ood")
"""Roles of the datasets that are compared with ID, and groups of the leaderboard."""
GROUPS = {
    "near_ood": "Near-OOD",
    "far_ood": "Far-OOD",
    "fs_near_ood": "Near-OOD, full spectrum",
    "fs_far_ood": "Far-OOD, full spectrum",
}
ID_GROUPS = {"id": "ID", "shifted_id": "Shifted ID"}
"""Roles of the datasets whose failures are detected."""


def compared(metrics: pa.Table) -> dict[str, Metric]:
    """The metrics of ID against OOD images in a table, by name and in its order."""
    rows = zip(metrics["group"].to_pylist(), metrics["metric"].to_pylist(), strict=True)
    return {name: named(name) for name in dict.fromkeys(name for group, name in rows if group in GROUPS)}


def summary(metrics: pa.Table) -> dict[str, Metric]:
    """Those of the leaderboard."""
    return {name: metric for name, metric in compared(metrics).items() if isinstance(metric, AUROC | FPR)}


class Column(NamedTuple):
    """One column of a board; `dataset` equals `group` for the mean over the group."""

    group: str
    dataset: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """A value in [0, 1] with its 95% interval."""

    value: float
    low: float
    high: float
    best: bool
    """Whether no other detector is better in this column."""
    level: bool
    """Whether it is another than the best, and cannot be told from it on the same images."""
    below_chance: bool
    """Whether it is an AUROC whose interval lies below 0.5: OOD images score lower than ID images."""


@dataclass(frozen=True)
class Row:
    """One detector and its cells, one for each column."""

    detector: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Board:
    """Detectors against columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Title of each group of neighbouring columns, and how many columns it has."""
        return [
            ((GROUPS | ID_GROUPS)[group], len(list(columns)))
            for group, columns in groupby(self.columns, lambda c: c.group)
        ]

    @property
    def level(self) -> bool:
        """Whether any cell cannot be told from the best."""
        return any(cell.level for row in self.rows for cell in row.cells)

    @property
    def below_chance(self) -> bool:
        """Whether any cell is an AUROC below 0.5."""
        return any(cell.below_chance for row in self.rows for cell in row.cells)


def leaderboard(
    metrics: pa.Table, differences: pa.Table | None = None, groups: Collection[str] = OOD
) -> Board:
    """One row per detector: the means over near- and far-OOD, whichever there are.

    Sorted by the mean of the AUROC on near- and far-OOD, best first.

    Args:
        metrics: the table of `metrics.parquet`.
        differences: the table of `comparisons.parquet`; without it no cell is level with the best.
        groups: those that have columns.
    """
    rows = metrics.to_pylist()
    means = {row["group"] for row in rows if row["dataset"] == row["group"]}
    columns = tuple(
        Column(group, group, metric) for group in groups if group in means for metric in summary(metrics)
    )
    detectors = dict.fromkeys(row["detector"] for row in rows if row["group"] in means)
    board = _board(rows, columns, list(detectors), _told_apart(differences))
    aurocs = [i for i, column in enumerate(columns) if column.metric == "auroc" and column.group in OOD]
    ranked = sorted(board.rows, key=lambda row: -sum(row.cells[i].value for i in aurocs))
    return Board(columns, tuple(ranked))


def metric_boards(metrics: pa.Table, differences: pa.Table | None = None) -> dict[str, Board]:
    """Metric -> its values on every dataset, and the mean of each group of more than one dataset.

    Detectors are in the order of the leaderboard, whatever the metric.
    """
    rows = metrics.to_pylist()
    shown = []
    for group in GROUPS:
        names = dict.fromkeys(row["dataset"] for row in rows if row["group"] == group)
        names.pop(group, None)
        shown += [(group, name) for name in [*names, *([group] if len(names) > 1 else [])]]
    order = [row.detector for row in leaderboard(metrics).rows]
    apart = _told_apart(differences)
    return {
        name: _board(rows, tuple(Column(*pair, name) for pair in shown), order, apart)
        for name in compared(metrics)
    }


def failure_board(metrics: pa.Table, differences: pa.Table | None = None) -> Board:
    """Every detector as one of failures of the classifier, on each dataset of ID images.

    Sorted by the mean of AURC, best first.
    """
    names = [metric.name for metric in FAILURES]
    rows = [row for row in metrics.to_pylist() if row["metric"] in names]
    found = dict.fromkeys((row["group"], row["dataset"]) for row in rows)
    columns = tuple(Column(*pair, name) for pair in found for name in names)
    detectors = list(dict.fromkeys(row["detector"] for row in rows))
    board = _board(rows, columns, detectors, _told_apart(differences))
    ranked = sorted(board.rows, key=lambda row: sum(cell.value for cell in row.cells[:: len(names)]))
    return Board(columns, tuple(ranked))


_Apart = Mapping[tuple[Column, frozenset[str]], bool]
"""Whether two detectors can be told apart in a column."""


def _told_apart(differences: pa.Table | None) -> _Apart:
    found = differences.to_pylist() if differences is not None else []
    return {
        (
            Column(row["group"], row["dataset"], row["metric"]),
            frozenset((row["detector"], row["other"])),
        ): row["p_holm"] < LEVEL_OF_TESTS
        for row in found
    }


def _board(
    rows: Sequence[dict[str, Any]], columns: tuple[Column, ...], detectors: Sequence[str], apart: _Apart
) -> Board:
    """The cells of some columns, one row per detector in the order given."""
    found = {(row["detector"], row["group"], row["dataset"], row["metric"]): row for row in rows}
    best = {column: _best(column, detectors, found) for column in columns}

    def cell(detector: str, column: Column) -> Cell:
        level = not apart.get((column, frozenset((detector, best[column]))), True)
        return _cell(found[detector, *column], found[best[column], *column]["value"], level)

    return Board(columns, tuple(Row(d, tuple(cell(d, column) for column in columns)) for d in detectors))


def _best(column: Column, detectors: Sequence[str], found: Mapping[Any, dict[str, Any]]) -> str:
    """The detector with the best value in a column."""
    choose = max if named(column.metric).higher_is_better else min
    return choose(detectors, key=lambda detector: float(found[detector, *column]["value"]))


def _cell(row: dict[str, Any], best: float, level: bool) -> Cell:
    return Cell(
        value=row["value"],
        low=row["ci_low"],
        high=row["ci_high"],
        best=row["value"] == best,
        level=level and row["value"] != best,
        below_chance=row["metric"] == "auroc" and row["ci_high"] < 0.5,
    )


@dataclass(frozen=True)
class Results:
    """The files of a finished run."""

    folder: Place
    manifest: dict[str, Any]
    metrics: pa.Table
    differences: pa.Table
    """`comparisons.parquet`."""
    thresholds: dict[str, float]
    """Detector -> score at which 95% of the ID images are accepted."""
    decisions: tuple[dict[str, Any], ...] = ()
    """Rows of `decisions.parquet`, if the run has thresholds of held-out images."""

    @classmethod
    def read(cls, run: Place) -> Results:
        """Read the run folder, but no scores.

        Raises:
            UserError: if the run is not finished.
        """
        for name in ("manifest.json", "metrics.parquet", "comparisons.parquet", "thresholds.json"):
            if not (run / name).is_file():
                raise UserError(
                    f"{run}: not a finished run, got no {name}; expected the folder of a run that has been "
                    "evaluated. Evaluate the run first."
                )
        with (
            tables.parquet(run / "metrics.parquet") as of_each,
            tables.parquet(run / "comparisons.parquet") as of_pairs,
        ):
            metrics, differences = of_each.read(), of_pairs.read()
        manifest, decided = json.loads((run / "manifest.json").read_text(encoding="utf-8")), []
        if manifest.get("thresholds") is not None:
            with tables.parquet(run / DECISIONS) as file:
                decided = file.read().to_pylist()
        return cls(
            folder=run,
            manifest=manifest,
            metrics=metrics,
            differences=differences,
            thresholds=json.loads((run / "thresholds.json").read_text(encoding="utf-8")),
            decisions=tuple(decided),
        )

    def decided(self) -> dict[float, dict[str, list[dict[str, Any]]]]:
        """Rate -> detector, in the order of the leaderboard -> its row of `decisions` for each dataset."""
        found: dict[float, dict[str, list[dict[str, Any]]]] = {}
        for row in sorted(self.decisions, key=lambda row: self.detectors.index(row["detector"])):
            if row["dataset"] is not None:
                of_rate = found.setdefault(row["false_alarm"], {})
                of_rate.setdefault(row["detector"], []).append(row)
        return found

    @property
    def detectors(self) -> list[str]:
        """All detectors, in the order of the leaderboard; in that of the config if there is none."""
        ranked = [row.detector for row in leaderboard(self.metrics).rows]
        return list(dict.fromkeys([*ranked, *self.manifest["detectors"]]))

    @property
    def unaided(self) -> list[str]:
        """Those of them that have seen no OOD image; all where there are no others."""
        found = [name for name in self.detectors if not self.manifest["detectors"][name]["uses_ood"]]
        return found or self.detectors

    def datasets(self, *roles: str) -> list[str]:
        """Names of the datasets of some roles, in the order of the config."""
        return [name for name, entry in self.manifest["datasets"].items() if entry["role"] in roles]

    def scores(self, datasets: Sequence[str], detector: str) -> Float:
        """(N,) scores of one detector on some datasets, one after the other; higher = more OOD.

        Rows without a score are left out.
        """
        parts = [part for dataset in datasets for part in self._parts(dataset, detector)]
        return np.concatenate([part.drop_null().to_numpy() for part in parts])

    def column(self, dataset: str, detector: str) -> Float:
        """(N,) scores of one detector on all rows of a dataset that are tested; NaN where there is none."""
        parts = [part.to_numpy() for part in self._parts(dataset, detector)]
        return np.concatenate([np.empty(0), *parts]).astype(np.float64)

    def flagged_share(self, dataset: str, detector: str) -> float | None:
        """Share of the scored rows of an unlabelled dataset above the threshold; None if there are none."""
        flagged = rows = 0
        for part in self._parts(dataset, IS_OOD + detector):
            flagged += pc.sum(part).as_py() or 0
            rows += len(part) - part.null_count
        return flagged / rows if rows else None

    def _parts(self, dataset: str, column: str) -> Iterator[pa.ChunkedArray]:
        """One column of a dataset's score table, file by file, without rows that were calibrated on."""
        try:
            for table in calibrated.columns(self.folder, self.manifest, dataset, [column]):
                yield table.column(column)
        except FileNotFoundError:
            folder = self.folder / "scores" / dataset
            raise UserError(
                f"{folder}: no scores there. Run `ood-pipeline score`, then `evaluate`."
            ) from None
