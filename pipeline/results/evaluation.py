"""A finished evaluation as tables, for programs and notebooks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import Float
from pipeline.errors import UserError, unknown
from pipeline.metrics import pairs
from pipeline.stages.evaluate import PAIRS
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

    def against(self, other: Evaluation) -> pa.Table:
        """Differences of all detectors of this run and another one on the same images.

        Columns are those of `differences`. A detector goes by `<id of its run>/<label>`. Compared are the
        OOD datasets that both runs have in the same role, against the ID datasets that both have, on the rows
        that all detectors have scores of. Memory grows with rows and detectors: 8 bytes each.

        Raises:
            UserError: the runs are one, have no ID and OOD dataset in common, or other images in one.
        """
        ours, theirs = self.record["datasets"], other.record["datasets"]
        roles = {
            name: entry["role"]
            for name, entry in ours.items()
            if entry["role"] in ("id", "near_ood", "far_ood")
            and theirs.get(name, {}).get("role") == entry["role"]
        }
        shared = set(roles.values())
        if self.folder.name == other.folder.name or "id" not in shared or shared == {"id"}:
            raise UserError(
                f"{self.folder} and {other.folder}: nothing to compare; expected two runs with an ID and an "
                "OOD dataset of the same name and role."
            )
        scores: dict[str, dict[str, Float]] = {}
        for name in roles:
            for label, column in self._beside(other, name).items():
                scores.setdefault(label, {})[name] = column
        groups = {
            role: [name for name in roles if roles[name] == role] for role in dict.fromkeys(roles.values())
        }
        samples = {
            label: pairs.sample(
                np.concatenate([columns[name] for name in groups["id"]]),
                {name: columns[name] for name in roles if roles[name] != "id"},
                {role: names for role, names in groups.items() if role != "id"},
                self.record["seed"],
            )
            for label, columns in scores.items()
        }
        rows = pairs.differences(samples)
        return pa.Table.from_pylist(
            [{**asdict(row), "group": roles.get(row.dataset, row.dataset)} for row in rows], PAIRS
        )

    def _beside(self, other: Evaluation, dataset: str) -> dict[str, Float]:
        """Scores of all detectors of two runs on a dataset, on the rows that all have scores of."""
        found = {}
        for run in (self, other):
            table = tables.Table.open(run.folder / "scores" / dataset)
            found[run.folder.name] = pa.concat_tables(table.columns(["key", *run.record["detectors"]]))
        keys = [table["key"].combine_chunks() for table in found.values()]
        if not keys[0].equals(keys[1]):
            raise UserError(
                f"{dataset}: other images in {self.folder} ({len(keys[0]):,}) than in {other.folder} "
                f"({len(keys[1]):,}); expected the same, in the same order. Run both on the same data."
            )
        columns = {
            f"{run.folder.name}/{label}": found[run.folder.name][label].combine_chunks()
            for run in (self, other)
            for label in run.record["detectors"]
        }
        there = reduce(pc.and_, (column.is_valid() for column in columns.values()))
        return {label: column.filter(there).to_numpy() for label, column in columns.items()}


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
