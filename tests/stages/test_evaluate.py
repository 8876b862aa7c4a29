from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.stages import evaluate
from pipeline.stages.score import ScoreJob
from pipeline.workspace import files
from pipeline.workspace.artifacts import Artifact
from tests.metrics import labelled
from tests.metrics.coverage import UNLABELLED
from tests.stored import stored


def scored(folder: Path, scores: np.ndarray, correct: int = 0) -> ScoreJob:
    """A dataset with the scores of one detector, in two parts."""
    rows = len(scores)
    label = np.zeros(rows, np.int32)
    prediction = (np.arange(rows) >= correct).astype(np.int32)
    table = pa.table(
        {"key": [str(row) for row in range(rows)], "label": label, "prediction": prediction, "score": scores}
    )
    halves = [table.slice(0, rows // 3), table.slice(rows // 3)]
    features = stored(folder / "features", halves)
    stored(folder / "scores", [half.select(["score"]) for half in halves])
    return ScoreJob(folder.name, features, {"d": Artifact(folder / "scores", "table 1", {})})


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    means = {"id": 0, "more_id": 0.2, "shift": 0.5, "near_a": 1, "near_b": 2, "far": 3}
    return {name: rng.normal(mean, size=100 + 7 * len(name)) for name, mean in means.items()}


@pytest.fixture
def found(engine, tmp_path, values) -> tuple[dict, dict[str, float]]:
    jobs = {name: scored(tmp_path / name, scores, correct=90) for name, scores in values.items()}
    roles = {
        "id": ["id", "more_id"],
        "shifted_id": ["shift"],
        "near_ood": ["near_a", "near_b"],
        "far_ood": ["far"],
    }
    by_role = {role: [jobs[name] for name in names] for role, names in roles.items()}
    table, thresholds = evaluate.run(engine, by_role)
    rows = {(row["dataset"], row["group"], row["metric"]): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows, thresholds


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    return float(roc_auc_score(labels, np.concatenate([inside, outside])))


def test_id_datasets_are_pooled_and_every_ood_dataset_is_compared_with_them(found, values) -> None:
    rows, _ = found
    inside = np.concatenate([values["id"], values["more_id"]])
    for dataset, group in (("near_a", "near_ood"), ("near_b", "near_ood"), ("far", "far_ood")):
        row = rows[dataset, group, "auroc"]
        assert row["value"] == pytest.approx(auroc(inside, values[dataset]), abs=1e-12)
        assert (row["n_id"], row["n_ood"]) == (len(inside), len(values[dataset]))


def test_groups_are_unweighted_means(found) -> None:
    rows, _ = found
    members = [rows[name, "near_ood", "fpr95_id"]["value"] for name in ("near_a", "near_b")]
    assert rows["near_ood", "near_ood", "fpr95_id"]["value"] == pytest.approx(np.mean(members), abs=1e-15)


def test_full_spectrum_counts_shifted_id_data_as_id(found, values) -> None:
    rows, _ = found
    inside = np.concatenate([values["id"], values["more_id"], values["shift"]])
    assert rows["far", "fs_far_ood", "auroc"]["value"] == pytest.approx(
        auroc(inside, values["far"]), abs=1e-12
    )
    assert ("fs_near_ood", "fs_near_ood", "auroc") in rows


def test_the_threshold_comes_from_the_id_data_alone(found, values) -> None:
    _, thresholds = found
    inside = np.sort(np.concatenate([values["id"], values["more_id"]]))
    assert thresholds["d"] == inside[int(np.ceil(0.95 * len(inside))) - 1]


def test_accuracy_is_the_classifiers_own_on_each_id_dataset(found, values) -> None:
    rows, _ = found
    row = rows["more_id", "id", "id_accuracy"]
    assert row["detector"] == evaluate.CLASSIFIER
    assert row["value"] == 90 / len(values["more_id"])
    assert row["ci_low"] < row["value"] < row["ci_high"]
    shifted = rows["shift", "shifted_id", "id_accuracy"]
    assert (shifted["value"], shifted["n_id"]) == (90 / len(values["shift"]), len(values["shift"]))


def test_failures_are_detected_on_each_id_dataset_and_full_spectrum_needs_the_labels_of_all(
    found, values
) -> None:
    rows, _ = found
    for name, role in (("more_id", "id"), ("shift", "shifted_id")):
        right = (np.arange(len(values[name])) < 90).tolist()
        expected = float(labelled.aurc(values[name].tolist(), right))
        assert rows[name, role, "aurc"]["value"] == pytest.approx(expected, abs=1e-12)
        assert (rows[name, role, "augrc"]["n_id"], rows[name, role, "augrc"]["n_ood"]) == (len(right), 0)
    inside = ["id", "more_id", "shift"]
    scores = np.concatenate([values[name] for name in inside])
    right = np.concatenate([np.arange(len(values[name])) < 90 for name in inside])
    expected = float(labelled.oscr(scores.tolist(), right.tolist(), values["far"].tolist()))
    assert rows["far", "fs_far_ood", "oscr"]["value"] == pytest.approx(expected, abs=1e-12)


def test_where_labels_are_not_read_there_is_what_needs_none_with_the_same_values(
    engine, tmp_path, values
) -> None:
    jobs = {name: scored(tmp_path / name, values[name], 90) for name in ("id", "near_a")}
    roles = {"id": [jobs["id"]], "near_ood": [jobs["near_a"]]}
    whole, _ = evaluate.run(engine, roles)
    shutil.rmtree(tmp_path / "id" / "features")
    table, _ = evaluate.run(engine, roles, labelled=False)
    assert set(table["metric"].to_pylist()) == set(UNLABELLED)
    assert table.to_pylist() == [row for row in whole.to_pylist() if row["metric"] in UNLABELLED]


def test_fpr_is_measured_at_the_level_asked_for(engine, tmp_path, values) -> None:
    jobs = {name: scored(tmp_path / name, values[name]) for name in ("id", "near_a")}
    roles = {"id": [jobs["id"]], "near_ood": [jobs["near_a"]]}
    table, thresholds = evaluate.run(engine, roles, level=0.8)
    row = next(row for row in table.to_pylist() if row["metric"] == "fpr80_id")
    limit = np.sort(values["id"])[int(np.ceil(0.8 * len(values["id"]))) - 1]
    assert row["value"] == np.mean(values["near_a"] <= limit)
    assert thresholds["d"] > limit  # that of 95 %


def test_the_three_files_hold_the_same_rows(found, tmp_path) -> None:
    rows, thresholds = found
    table = pa.Table.from_pylist(list(rows.values()), evaluate.SCHEMA)
    evaluate.write(tmp_path, table, thresholds, evaluate.PAIRS.empty_table())
    assert pq.read_table(tmp_path / "metrics.parquet").equals(table)
    assert files.read_json(tmp_path / "metrics.json") == table.to_pylist()
    assert pyarrow.csv.read_csv(tmp_path / "metrics.csv").to_pylist() == table.to_pylist()


def test_without_ood_datasets_there_are_thresholds_and_accuracy_only(engine, tmp_path, values) -> None:
    table, thresholds = evaluate.run(engine, {"id": [scored(tmp_path / "id", values["id"])]})
    assert table["metric"].to_pylist() == ["id_accuracy", "aurc", "augrc"]
    assert set(thresholds) == {"d"}


def test_rows_without_a_score_are_in_no_number_and_detectors_may_be_measured_on_common_rows(
    engine, tmp_path
) -> None:
    rng = np.random.default_rng(0)
    jobs, scores = {}, {}
    for name, rows, gone in (("id", 60, {"a": [3, 4], "b": [5]}), ("near", 40, {"a": [0], "b": [39]})):
        table = {label: rng.normal(name == "near", size=rows) for label in ("a", "b", "c")}
        for label, lost in gone.items():
            table[label][lost] = np.nan
        jobs[name], scores[name] = several(tmp_path / name, table), table
    by_role = {"id": [jobs["id"]], "near_ood": [jobs["near"]]}
    for together in ([], [("a", "b", "c")], [("a", "b"), ("c",)]):
        table, thresholds = evaluate.run(engine, by_role, together=together)
        rows = {row["detector"]: row for row in table.to_pylist() if row["metric"] == "auroc"}
        for label in ("a", "b", "c"):
            group = next((group for group in together if label in group), (label,))
            inside, outside = (
                scores[name][label][~np.any([np.isnan(scores[name][other]) for other in group], axis=0)]
                for name in ("id", "near")
            )
            assert rows[label]["value"] == pytest.approx(auroc(inside, outside), abs=1e-12)
            assert (rows[label]["n_id"], rows[label]["n_ood"]) == (len(inside), len(outside))
            assert thresholds[label] == np.sort(inside)[int(np.ceil(0.95 * len(inside))) - 1]


def test_all_pairs_are_compared_on_the_rows_that_all_detectors_have(engine, tmp_path) -> None:
    rng = np.random.default_rng(0)
    jobs, scores = {}, {}
    for name, rows, gone in (("id", 60, {"a": [3, 4]}), ("near", 40, {"b": [39]}), ("far", 30, {})):
        table = {label: rng.normal(name != "id", size=rows) for label in ("a", "b", "c")}
        for label, lost in gone.items():
            table[label][lost] = np.nan
        jobs[name], scores[name] = several(tmp_path / name, table), table
    by_role = {"id": [jobs["id"]], "near_ood": [jobs["near"]], "far_ood": [jobs["far"]]}
    table = evaluate.paired(engine, by_role, 0)
    assert table.equals(evaluate.paired(engine, by_role, 0))
    rows = table.to_pylist()
    assert len(rows) == 3 * (7 * 4 + 2)  # pairs, metrics of two datasets and two groups, and of ID images
    found = next(row for row in rows if (row["detector"], row["other"], row["dataset"]) == ("a", "c", "near"))
    assert (found["group"], found["metric"]) == ("near_ood", "auroc")
    kept = {name: np.isfinite(list(table.values())).all(axis=0) for name, table in scores.items()}
    a, c = (
        auroc(scores["id"][label][kept["id"]], scores["near"][label][kept["near"]]) for label in ("a", "c")
    )
    assert found["difference"] == pytest.approx(a - c, abs=1e-12)
    assert all(row["p_value"] <= row["p_holm"] <= 1 for row in rows)
    alone = {role: [job.only({"a"}) for job in members] for role, members in by_role.items()}
    assert evaluate.paired(engine, alone, 0).num_rows == 0


def several(folder: Path, scores: dict[str, np.ndarray]) -> ScoreJob:
    """A dataset with the scores of several detectors, NaN where there is none."""
    artifacts = {}
    for label, values in scores.items():
        table = pa.table({"score": pa.array(values, from_pandas=True)})
        stored(folder / label, [table.slice(0, 11), table.slice(11)])
        artifacts[label] = Artifact(folder / label, "table 1", {})
        if lost := table["score"].null_count:
            artifacts[label].finish(artifacts[label].require().files, unscored={"rows": lost, "first": {}})
    zeros = np.zeros(len(values), np.int32)
    features = stored(folder / "features", [pa.table({"label": zeros, "prediction": zeros})])
    return ScoreJob(folder.name, features, artifacts)
