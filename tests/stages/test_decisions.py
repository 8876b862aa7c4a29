"""p-values, flags and realised rates of real small runs against naive computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.columns import CALIBRATION, IS_OOD, P_VALUE
from pipeline.errors import UserError
from pipeline.metrics.conformal import discoveries
from pipeline.metrics.intervals import wilson
from pipeline.results.evaluation import Evaluation
from pipeline.stages.calibration import Split
from pipeline.workspace import tables
from tests.conftest import _dataset
from tests.stages.test_calibration import with_held_out

RATES = [0.2, 0.1]
DETECTORS = ["msp", "knn"]
CASES = {
    "id_val": {},
    "id": {"calibrate_on": "id", "share": 0.6},
    "by class": {"calibrate_on": "id", "per_class": True, "fdr": 0.5},
}


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The evaluations of this module, once they were made, and their workspace."""
    return {}


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def evaluation(kept, case, settings, images, load, execute, tmp_path_factory) -> Evaluation:
    """A run of a case; not to be changed."""
    if case not in kept:
        kept.setdefault("workspace", tmp_path_factory.mktemp("decided").as_uri())
        settings["datasets"].append(_dataset(images, "production", "unlabelled"))
        settings["thresholds"] = {"false_alarm": RATES if case != "by class" else RATES[:1], **CASES[case]}
        made = execute(load(with_held_out(settings), kept["workspace"]), last="evaluate")
        kept[case] = Evaluation(made.folder)
    return kept[case]


def whole(evaluation: Evaluation, dataset: str) -> dict[str, np.ndarray]:
    """All columns of a table of scores."""
    opened = tables.Table.open(evaluation.folder / "scores" / dataset)
    with tables.parquet(opened.parts()[0]) as file:
        names = file.schema_arrow.names
    table = pa.concat_tables(opened.columns(names)).combine_chunks()
    return {name: table[name].to_numpy(zero_copy_only=False) for name in names}


def held_out(evaluation: Evaluation, case: str) -> dict[str, np.ndarray]:
    """The rows that calibrate."""
    found = whole(evaluation, "held" if case == "id_val" else "test")
    mask = found[CALIBRATION] if case != "id_val" else np.ones(len(found["key"]), bool)
    return {name: values[mask] for name, values in found.items()}


def naive(
    held: dict[str, np.ndarray], rows: dict[str, np.ndarray], label: str, by_class: bool
) -> list[float]:
    """p-values by their definition."""
    return [
        (1 + np.sum(held[label][same] >= score)) / (1 + np.sum(same))
        for score, prediction in zip(rows[label], rows["prediction"], strict=True)
        for same in [held["prediction"] == prediction if by_class else np.ones(len(held["key"]), bool)]
    ]


def test_every_table_of_scores_has_p_values_and_unlabelled_images_are_flagged(evaluation, case) -> None:
    held, by_class = held_out(evaluation, case), case == "by class"
    for dataset in ("held", "test", "animals", "textures", "production"):
        rows = whole(evaluation, dataset)
        assert (CALIBRATION in rows) == (dataset == "test" and case != "id_val")
        for label in DETECTORS:
            assert rows[P_VALUE + label].tolist() == naive(held, rows, label, by_class)
            assert (IS_OOD + label in rows) == (dataset == "production")
    for label in DETECTORS:
        p = rows[P_VALUE + label]
        expected = discoveries(p, 0.5) if by_class else p <= RATES[0]
        assert rows[IS_OOD + label].tolist() == expected.tolist()
        assert 0 < expected.sum() < len(p)


def test_decisions_are_thresholds_and_counted_flags(evaluation, case) -> None:
    held, found = held_out(evaluation, case), evaluation.decisions.to_pylist()
    by_class = case == "by class"
    wholes = {(row["detector"], row["false_alarm"], row["dataset"]): row for row in found if row["dataset"]}
    rates = RATES[:1] if by_class else RATES
    assert len(wholes) == len(DETECTORS) * len(rates) * 4
    for (label, rate, dataset), row in wholes.items():
        rows = whole(evaluation, dataset)
        if CALIBRATION in rows:
            rows = {name: values[~rows[CALIBRATION]] for name, values in rows.items()}
        flagged = int(np.sum(np.array(naive(held, rows, label, by_class)) <= rate))
        assert (row["n"], row["flagged"], row["share"]) == (
            len(rows["key"]),
            flagged,
            flagged / len(rows["key"]),
        )
        assert (row["ci_low"], row["ci_high"]) == wilson(flagged / len(rows["key"]), len(rows["key"]))
        assert (row["prediction"], row["n_calibration"]) == (-1, len(held["key"]))
        assert row["role"] == evaluation.record["datasets"][dataset]["role"]
        if by_class:
            assert row["threshold"] is None
        else:
            assert flagged == np.sum(rows[label] > row["threshold"])
            assert row["threshold"] in held[label]


def test_by_class_every_class_has_its_threshold(evaluation, case) -> None:
    held = held_out(evaluation, case)
    rows = [row for row in evaluation.decisions.to_pylist() if row["dataset"] is None]
    assert len(rows) == (len(DETECTORS) * 10 if case == "by class" else 0)
    for row in rows:
        own = held[row["detector"]][held["prediction"] == row["prediction"]]
        assert row["n_calibration"] == len(own)
        above = np.sort(own)[::-1]
        assert row["threshold"] == above[int(RATES[0] * (len(own) + 1) + 1e-9) - 1]


def test_what_decides_is_kept_with_the_run(evaluation, case) -> None:
    held = held_out(evaluation, case)
    assert list(evaluation.calibration) == DETECTORS
    for label, calibration in evaluation.calibration.items():
        assert calibration.scores.tolist() == held[label].tolist()
        predictions = calibration.predictions
        assert (None if predictions is None else predictions.tolist()) == (
            held["prediction"].tolist() if case == "by class" else None
        )


def test_images_that_calibrate_are_in_no_metric(evaluation, case) -> None:
    if case == "id_val":
        assert {row["n_id"] for row in evaluation.metrics.to_pylist()} == {300}
        return
    rows = whole(evaluation, "test")
    split = Split(0.6 if case == "id" else 0.5, 0).calibrates(rows["key"])
    assert rows[CALIBRATION].tolist() == split.tolist()
    tested = {name: values[~split] for name, values in rows.items()}
    found = evaluation.metrics.to_pylist()
    assert {row["n_id"] for row in found} == {int(np.sum(~split))}
    (accuracy,) = (row["value"] for row in found if row["metric"] == "id_accuracy")
    assert accuracy == np.mean(tested["label"] == tested["prediction"])
    auroc = {(row["detector"], row["dataset"]): row["value"] for row in found if row["metric"] == "auroc"}
    outside = whole(evaluation, "textures")["knn"]
    pairs = np.sign(outside[:, None] - tested["knn"]).mean() / 2 + 0.5
    assert auroc["knn", "textures"] == pytest.approx(pairs, abs=1e-12)


def test_a_run_without_thresholds_has_none_of_this(settings, load, execute) -> None:
    folder = execute(load(settings), last="evaluate").folder
    assert not (folder / "decisions.parquet").exists()
    assert not (folder / "calibration.safetensors").exists()
    assert not [name for name in whole(Evaluation(folder), "test") if name.startswith(P_VALUE)]
    with pytest.raises(UserError, match=r"thresholds: the run has none of held-out images\. Set thresholds"):
        _ = Evaluation(folder).decisions
