from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.detectors.base import Training
from pipeline.detectors.energy import Energy
from pipeline.detectors.msp import Msp
from pipeline.errors import UserError
from pipeline.stages import score
from pipeline.workspace import artifacts, tables
from tests.stages.test_fit import feature_table

COLUMNS = ("key", "label", "prediction", "feature", "logits")
TRAINING = Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "SLICE", 1030)


@pytest.fixture
def scoring() -> score.Scoring:
    return score.Scoring({"msp": Msp().fit(TRAINING), "energy": Energy().fit(TRAINING)}, COLUMNS, None)


def job(tmp_path: Path, inputs: str = "a") -> score.ScoreJob:
    folder = tmp_path / "features"
    table = tables.Table.open(folder) if folder.is_dir() else feature_table(folder, 2500, [1, 1030, 1030])
    return score.ScoreJob("set", table, str(tmp_path / "scores"), inputs)


def test_scores_lie_beside_their_keys_in_the_order_of_the_features(engine, tmp_path, scoring) -> None:
    todo = job(tmp_path)
    seen = []
    assert score.run(engine, [todo], scoring, seen.append) == 2500
    assert sum(seen) == 2500
    assert todo.complete
    done = tables.Table.open(Path(todo.folder))
    assert done.part_rows == (1030, 1030, 440)
    source, scores = todo.features.read(0, 2500, COLUMNS), done.read(0, 2500, ["key", "energy"])
    np.testing.assert_array_equal(scores["key"], source["key"])
    expected = [-np.log(np.exp(row).sum()) for row in source["logits"].astype(np.float64)]
    np.testing.assert_allclose(scores["energy"], expected, rtol=1e-12)


def test_complete_scores_are_kept_and_others_replaced(engine, tmp_path, scoring) -> None:
    score.run(engine, [job(tmp_path)], scoring, lambda _: None)
    assert score.run(engine, [job(tmp_path)], scoring, lambda _: None) == 0
    (tmp_path / "scores" / tables.part_name(1)).unlink()
    (tmp_path / "scores" / artifacts.RECORD).unlink()
    assert score.run(engine, [job(tmp_path)], scoring, lambda _: None) == 1030
    assert not job(tmp_path, "b").complete
    assert score.run(engine, [job(tmp_path, "b")], scoring, lambda _: None) == 2500


def test_a_score_that_is_not_finite_stops_the_run_and_names_the_row(engine, tmp_path, scoring) -> None:
    todo = job(tmp_path)
    part = todo.features.parts()[3]
    columns = tables.numpy_columns(pq.read_table(part), COLUMNS)
    columns["logits"] = columns["logits"].copy()
    columns["logits"][5, 2] = np.nan
    tables.write_table(part, tables.arrow_columns(columns))
    with pytest.raises(UserError, match=f"not finite: msp: {columns['key'][5]}; energy: {columns['key'][5]}"):
        score.run(engine, [todo], scoring, lambda _: None)
    assert not todo.complete


def test_flags_follow_the_thresholds_and_can_be_set_again(engine, tmp_path, scoring) -> None:
    todo = job(tmp_path)
    score.run(engine, [todo], scoring, lambda _: None)
    for threshold in (-0.5, -0.3):
        score.flag(engine, Path(todo.folder), {"msp": threshold})
        table = pq.read_table(tmp_path / "scores" / tables.part_name(2))
        np.testing.assert_array_equal(table["is_ood.msp"].to_numpy(), table["msp"].to_numpy() > threshold)
        assert table.column_names.count("is_ood.msp") == 1


def test_scorers_work_in_a_fresh_ray_worker(ray_session, tmp_path, scoring) -> None:
    features = job(tmp_path).features.read(0, 100, COLUMNS)

    @ray.remote(max_calls=1)
    def elsewhere(work: bytes) -> list[float]:
        return pickle.loads(work).table(features)["msp"].to_pylist()

    found = ray.get(elsewhere.remote(pickle.dumps(scoring)))
    assert found == scoring.table(features)["msp"].to_pylist()
