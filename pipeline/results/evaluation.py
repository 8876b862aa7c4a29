"""A finished evaluation as tables, for programs and notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError, unknown
from pipeline.workspace import files, tables
from pipeline.workspace.files import Place
from pipeline.workspace.runs import located


@dataclass(frozen=True)
class Evaluation:
    """The folder of a run, and what lies in it."""

    folder: Place

    @cached_property
    def record(self) -> dict[str, Any]:
        """What was run on what, with which versions, and how long it took: `manifest.json`."""
        return dict(files.read_json(self.folder / "manifest.json"))

    @cached_property
    def metrics(self) -> pa.Table:
        """One row per detector, dataset or group, and metric.

        Columns: detector, dataset, group, metric, value, ci_low, ci_high (in [0, 1]), n_id, n_ood.
        """
        with tables.parquet(self.folder / "metrics.parquet") as file:
            return file.read()

    @cached_property
    def differences(self) -> pa.Table:
        """One row per pair of detectors, dataset or group, and metric, on the same images.

        Columns: detector, other, dataset, group, metric, difference (detector - other), ci_low, ci_high,
        p_value, p_holm (corrected for all pairs on the dataset).
        """
        with tables.parquet(self.folder / "comparisons.parquet") as file:
            return file.read()

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """By detector: the score that 95 % of the ID images do not exceed; larger ones are flagged as OOD."""
        return dict(files.read_json(self.folder / "thresholds.json"))

    def scores(self, dataset: str, detectors: list[str] | None = None) -> pa.Table:
        """Key, label and prediction of every image of a dataset, and its scores; higher = more OOD.

        Null where a detector has no finite score; `record["unscored"]` counts and names these images.

        Args:
            dataset: its name.
            detectors: labels; None = all. Memory grows with them and the images: 8 bytes each.

        Raises:
            UserError: no such dataset or detector.
        """
        folder = self.folder / "scores" / dataset
        if not folder.is_dir():
            known = [name for name, entry in self.record["datasets"].items() if entry["role"] != "train"]
            raise UserError(unknown("dataset with scores", dataset, known))
        labels = list(self.record["detectors"])
        for label in detectors or ():
            if label not in labels:
                raise UserError(unknown("detector", label, labels))
        names = ["key", "label", "prediction", *(labels if detectors is None else detectors)]
        return pa.concat_tables(tables.Table.open(folder).columns(names))


def opened(run: str | Place) -> Evaluation:
    """A finished evaluation on disk or in an object store.

    Args:
        run: path or URI of its folder, `<workspace>/runs/<name>`.

    Raises:
        UserError: if there is none, or it is not finished.
    """
    found = Evaluation(located(str(run)))
    if found.record["status"] != "finished":
        raise UserError(
            f"{run}: the evaluation is {found.record['status']}, not finished. Run it again to go on."
        )
    return found
