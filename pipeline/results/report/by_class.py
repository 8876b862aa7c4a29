"""Where a detector goes wrong: its errors among the images that the classifier puts into one class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.columns import PREDICTION, Float
from pipeline.metrics.auroc import AUROC
from pipeline.metrics.metrics import counted
from pipeline.results import calibrated
from pipeline.results.report.tables import OOD, Results

SHOWN = 10
"""Classes on the page."""


@dataclass(frozen=True)
class OfClass:
    """The images that are predicted as one class, of all ID and OOD datasets."""

    prediction: int
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
class ByClass:
    """A detector's errors by predicted class, most first."""

    detector: str
    classes: tuple[OfClass, ...]

    def table(self) -> pa.Table:
        """One row per class."""
        names = list(OfClass.__dataclass_fields__)
        rows = [asdict(each) for each in self.classes]
        return pa.table({name: [row[name] for row in rows] for name in names})


def by_class(results: Results) -> ByClass | None:
    """The errors of a run's best detector; None without a detector or an OOD dataset.

    Holds its scores on all ID and OOD images.
    """
    outside = results.datasets(*OOD)
    if not outside or not results.unaided:
        return None
    detector = results.unaided[0]
    inside = _scored(results, results.datasets("id"), detector)
    found = _of_classes(inside, _scored(results, outside, detector), results.thresholds[detector])
    return ByClass(detector, tuple(sorted(found, key=lambda each: (-each.wrong, each.prediction))))


_Scored = tuple[NDArray[np.int32], Float]
"""(N,) predicted classes and scores."""


def _scored(results: Results, datasets: Sequence[str], detector: str) -> _Scored:
    """The rows of some datasets that have a score."""
    tables = [
        table.drop_null()
        for dataset in datasets
        for table in calibrated.columns(results.folder, results.manifest, dataset, [PREDICTION, detector])
    ]
    whole = pa.concat_tables(tables)
    return whole[PREDICTION].to_numpy(), whole[detector].to_numpy()


def _of_classes(inside: _Scored, outside: _Scored, threshold: float) -> Iterator[OfClass]:
    insides, outsides = _grouped(*inside), _grouped(*outside)
    nothing = np.empty(0)
    for prediction in sorted(insides.keys() | outsides.keys()):
        of_id, of_ood = insides.get(prediction, nothing), outsides.get(prediction, nothing)
        both = len(of_id) and len(of_ood)
        yield OfClass(
            prediction,
            len(of_id),
            len(of_ood),
            float(AUROC().value(counted(of_id, of_ood))) if both else math.nan,
            int(np.count_nonzero(of_id > threshold)),
            int(np.count_nonzero(of_ood <= threshold)),
        )


def _grouped(predictions: NDArray[np.int32], scores: Float) -> dict[int, Float]:
    """Scores by predicted class."""
    order = np.argsort(predictions, kind="stable")
    classes, starts = np.unique(predictions[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(scores[order], starts[1:]), strict=True))
