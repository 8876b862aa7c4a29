"""Where a detector goes wrong: its errors among images of a predicted class, or of a value of metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.columns import KEY, PREDICTION, Float
from pipeline.data.metadata import Metadata, name_of
from pipeline.metrics.auroc import AUROC
from pipeline.metrics.metrics import counted
from pipeline.results import calibrated, class_names
from pipeline.results.report.tables import OOD, Results

SHOWN = 10
"""Groups on the page."""

CLASS = "predicted class"

NONE = "(none)"
"""Images that metadata says nothing of."""


@dataclass(frozen=True)
class Group:
    """The images of one group, of all ID and OOD datasets."""

    value: str
    n_id: int
    n_ood: int
    auroc: float
    """Of these images alone, in [0, 1]; NaN where one kind is lacking."""
    false_alarms: int
    """ID images above the threshold that keeps 95 % of all ID images."""
    missed: int
    """OOD images that are not above it."""

    @property
    def wrong(self) -> int:
        """False alarms and missed images."""
        return self.false_alarms + self.missed


@dataclass(frozen=True)
class ByGroup:
    """A detector's errors by what images have in common, most first."""

    by: str
    """What that is: `CLASS`, or a column of metadata."""
    detector: str
    groups: tuple[Group, ...]
    names: Mapping[int, str]
    """Of the classes, by index; none where groups are no classes, or the run knows none."""

    @property
    def name(self) -> str:
        """Of the section and the file."""
        return "classes" if self.by == CLASS else f"by-{name_of(self.by)}"

    def table(self) -> pa.Table:
        """One row per group, of named classes with their name."""
        names = list(Group.__dataclass_fields__)
        rows = [asdict(each) for each in self.groups]
        columns = {name: [row[name] for row in rows] for name in names}
        if self.names:
            columns["name"] = [self.names.get(int(each.value), "") for each in self.groups]
        return pa.table(columns)

    def shown(self, group: Group) -> str:
        """What the reader knows a group by."""
        return class_names.shown(int(group.value), self.names) if self.names else group.value


_Values = Callable[[str, pa.Table], Sequence[str | None]]
"""What the images of a dataset are told apart by, given its name and its rows."""


def by_group(results: Results, metadata: Metadata | None = None) -> list[ByGroup]:
    """The errors of a run's best detector by predicted class and by columns of metadata.

    Holds its scores on all ID and OOD images. There are none without a detector or an OOD dataset.
    """
    outside = results.datasets(*OOD)
    if not outside or not results.unaided:
        return []
    detector = results.unaided[0]
    inside = _scored(results, results.datasets("id"), detector)
    both = inside, _scored(results, outside, detector)
    groupings: dict[str, _Values] = {CLASS: _predicted}
    if metadata is not None:
        groupings |= {column: partial(_known, metadata, column) for column in metadata.columns}
    found = []
    for by, values in groupings.items():
        one, other = (_grouped(side, values, detector) for side in both)
        groups = _groups(one, other, results.thresholds[detector])
        ranked = sorted(groups, key=lambda each: (-each.wrong, each.value))
        names = class_names.known(results.manifest) if by == CLASS else {}
        found.append(ByGroup(by, detector, tuple(ranked), names))
    return found


def _predicted(_: str, table: pa.Table) -> list[str]:
    found: list[str] = table[PREDICTION].cast(pa.string()).to_pylist()
    return found


def _known(metadata: Metadata, column: str, dataset: str, table: pa.Table) -> list[str | None]:
    return metadata.of(dataset, table[KEY].combine_chunks(), column)


def _scored(results: Results, datasets: Sequence[str], detector: str) -> dict[str, pa.Table]:
    """The rows of some datasets that have a score."""
    return {
        dataset: pa.concat_tables(
            table.drop_null()
            for table in calibrated.columns(
                results.folder, results.manifest, dataset, [KEY, PREDICTION, detector]
            )
        )
        for dataset in datasets
    }


def _grouped(scored: dict[str, pa.Table], values: _Values, detector: str) -> dict[str, Float]:
    """Scores by group."""
    names = [
        NONE if value is None else value for name, table in scored.items() for value in values(name, table)
    ]
    scores: Float = np.concatenate([table[detector].to_numpy() for table in scored.values()])
    kinds, group = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    order: NDArray[np.intp] = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(1, len(kinds)))
    return dict(zip(kinds.tolist(), np.split(scores[order], starts), strict=True))


def _groups(insides: dict[str, Float], outsides: dict[str, Float], threshold: float) -> Iterator[Group]:
    nothing = np.empty(0)
    for value in insides.keys() | outsides.keys():
        of_id, of_ood = insides.get(value, nothing), outsides.get(value, nothing)
        both = len(of_id) and len(of_ood)
        yield Group(
            value,
            len(of_id),
            len(of_ood),
            float(AUROC().value(counted(of_id, of_ood))) if both else math.nan,
            int(np.count_nonzero(of_id > threshold)),
            int(np.count_nonzero(of_ood <= threshold)),
        )
