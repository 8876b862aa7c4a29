"""What calibrated detectors say: p-values and flags beside the scores, and how many images they flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cluster.engine import Engine
from pipeline.columns import CALIBRATION, IS_OOD, P_VALUE, PREDICTION, Float, Mask
from pipeline.metrics.conformal import Calibration, discoveries
from pipeline.metrics.intervals import wilson
from pipeline.stages.calibration import Calibrated, Split, column
from pipeline.stages.score import SCORE, ScoreJob
from pipeline.workspace import artifacts, tables
from pipeline.workspace.artifacts import Arrays, File
from pipeline.workspace.files import Place

SCORES, DECISIONS = "calibration.safetensors", "decisions.parquet"
"""Files of a run with thresholds: the scores of the images that calibrate, and what they decide."""

SCHEMA = pa.schema(
    [
        ("detector", pa.string()),
        ("false_alarm", pa.float64()),
        ("prediction", pa.int32()),
        ("threshold", pa.float64()),
        ("n_calibration", pa.int64()),
        ("dataset", pa.string()),
        ("role", pa.string()),
        ("n", pa.int64()),
        ("flagged", pa.int64()),
        *((name, pa.float64()) for name in ("share", "ci_low", "ci_high")),
    ]
)
"""Of `decisions.parquet`: a row for every detector, rate and dataset, with prediction -1; by class also one
for every detector, rate and predicted class, with its threshold and of no dataset."""

DECIDED = ("id", "shifted_id", "near_ood", "far_ood", "unlabelled")
"""Roles of the datasets whose flagged images are counted."""


@dataclass(frozen=True)
class Judge:
    """The columns that calibration adds to a table of scores."""

    calibrations: Mapping[str, Calibration]
    made_of: str
    """Digest of all that they depend on."""
    split: Split | None = None
    """Of ID data that are split."""
    limits: Mapping[str, float] | None = None
    """The largest p-value that is flagged, by label; nothing is flagged without."""

    def columns(
        self, keys: NDArray[Any], predictions: NDArray[Any], scores: Mapping[str, Float]
    ) -> dict[str, pa.Array]:
        """Columns of some rows by name: p-values and flags, null where there is no score.

        Args:
            keys: (N,) of the rows.
            predictions: (N,) of the classifier.
            scores: (N,) by label, NaN where there is none.
        """
        found = {} if self.split is None else {CALIBRATION: pa.array(self.split.calibrates(keys))}
        for label, calibration in self.calibrations.items():
            values = calibration.p_values(scores[label], predictions)
            found[P_VALUE + label] = pa.array(values, from_pandas=True)
            if self.limits is not None:
                found[IS_OOD + label] = pa.array(values <= self.limits[label], mask=np.isnan(values))
        return found


def judge(engine: Engine, calibrated: Calibrated, job: ScoreJob, role: str) -> Judge:
    """What to add to the table of scores of a dataset."""
    limits = _limits(engine, calibrated, job) if role == "unlabelled" else None
    split = calibrated.split if role == "id" else None
    made_of = artifacts.digest([calibrated.made_of, limits, split and asdict(split)])
    return Judge(calibrated.of, made_of, split, limits)


def _limits(engine: Engine, calibrated: Calibrated, job: ScoreJob) -> dict[str, float]:
    """The largest p-value of a dataset that is flagged, by label."""
    rate, scores = calibrated.settings.fdr, job.tables()
    if rate is None:
        return dict.fromkeys(scores, calibrated.settings.false_alarm[0])
    arguments = ((calibrated.of[label], rate, job.features, table) for label, table in scores.items())
    return dict(zip(scores, engine.in_order(_discovered, arguments), strict=True))


def _discovered(calibration: Calibration, rate: float, features: tables.Table, scores: tables.Table) -> float:
    """The largest p-value that Benjamini and Hochberg's procedure names; 0 if there is none."""
    values = calibration.p_values(column(scores, SCORE), column(features, PREDICTION))
    return float(values[discoveries(values, rate)].max(initial=0.0))


@dataclass(frozen=True)
class _Tested:
    """A detector's scores of a dataset."""

    dataset: str
    role: str
    features: tables.Table
    scores: tables.Table
    rows: Mask | None
    """Those that are tested; None = all."""


def decisions(
    engine: Engine, jobs: Mapping[str, Sequence[ScoreJob]], calibrated: Calibrated, tested: Mapping[str, Mask]
) -> pa.Table:
    """Thresholds of all detectors at all rates, and how many images of each dataset they flag: `SCHEMA`.

    Args:
        engine: does the work.
        jobs: the datasets, scored, by role.
        calibrated: what decides.
        tested: rows that are tested, of the datasets that are split.
    """
    datasets = [(job, role, job.tables()) for role in DECIDED for job in jobs.get(role, ())]
    arguments = (
        (
            label,
            calibration,
            calibrated.settings.false_alarm,
            [
                _Tested(job.dataset, role, job.features, found[label], tested.get(job.dataset))
                for job, role, found in datasets
            ],
        )
        for label, calibration in calibrated.of.items()
    )
    rows = [row for found in engine.in_order(_decided, arguments) for row in found]
    return pa.Table.from_pylist(rows, SCHEMA)


def _decided(
    label: str, calibration: Calibration, rates: Sequence[float], datasets: Sequence[_Tested]
) -> list[dict[str, Any]]:
    """The rows of one detector."""
    counts = {each: len(group) for each, group in calibration.groups.items()}
    limits = {rate: calibration.thresholds(rate) for rate in rates}
    own = {rate: {"detector": label, "false_alarm": rate} for rate in rates}
    whole = {"prediction": -1, "n_calibration": sum(counts.values())}
    rows: list[dict[str, Any]] = [
        {**own[rate], "prediction": each, "threshold": limit, "n_calibration": counts[each]}
        for rate in rates
        for each, limit in limits[rate].items()
        if each != -1
    ]
    for each in datasets:
        scores, predictions = column(each.scores, SCORE), column(each.features, PREDICTION)
        kept = np.isfinite(scores) if each.rows is None else np.isfinite(scores) & each.rows
        for rate in rates:
            flags = calibration.flags(rate, scores[kept], predictions[kept])
            where = {"threshold": limits[rate].get(-1), "dataset": each.dataset, "role": each.role}
            rows.append({**own[rate], **whole, **where, **_share(int(flags.sum()), len(flags))})
    return rows


def _share(flagged: int, rows: int) -> dict[str, float | None]:
    """A share with Wilson's 95 % interval; none of no rows."""
    if not rows:
        return {"n": 0, "flagged": 0}
    value = flagged / rows
    low, high = wilson(value, rows)
    return {
        "n": rows,
        "flagged": flagged,
        "share": value,
        "ci_low": min(low, value),
        "ci_high": max(high, value),
    }


def write(folder: Place, calibrated: Calibrated, decided: pa.Table) -> dict[str, File]:
    """Write `calibration.safetensors` and `decisions.parquet`; returns these files."""
    arrays: Arrays = {**calibrated.scores, PREDICTION: calibrated.predictions.astype(np.int32)}
    return {
        SCORES: artifacts.write(folder / SCORES, artifacts.saved(arrays)),
        DECISIONS: artifacts.write(folder / DECISIONS, tables.written(decided)),
    }
