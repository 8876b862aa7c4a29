from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.cluster.engine import opened
from pipeline.config import schema
from pipeline.detectors import _gaussian, cosine
from pipeline.detectors._steps import combined
from pipeline.detectors.ash import Ash
from pipeline.detectors.base import Training
from pipeline.detectors.cosine import Cosine
from pipeline.detectors.energy import Energy
from pipeline.detectors.gradnorm import GradNorm
from pipeline.detectors.knn import Knn
from pipeline.detectors.mds_l2 import MdsL2
from pipeline.detectors.msp import Msp
from pipeline.detectors.rmds_l2 import RmdsL2
from pipeline.errors import UserError
from pipeline.learned import statistics
from pipeline.learned.statistics import Head
from pipeline.stages import banks, faiss_shard, index, score
from pipeline.stages.fit import fit_detectors
from pipeline.stages.index import Neighbours
from pipeline.workspace import artifacts, tables
from pipeline.workspace.artifacts import Artifact, write_part
from tests.stages.test_fit import feature_table, made_of

COLUMNS = ("key", "label", "prediction", "feature", "logits")
TRAINING = Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "SLICE", 1030)


@pytest.fixture
def scoring() -> score.Scoring:
    return score.Scoring({"msp": Msp().fit(TRAINING), "energy": Energy().fit(TRAINING)}, COLUMNS)


def job(tmp_path: Path, version: str = "a", labels: Collection[str] = ("msp", "energy")) -> score.ScoreJob:
    folder = tmp_path / "features"
    table = tables.Table.open(folder) if folder.is_dir() else feature_table(folder, 2500, [1, 1030, 1030])
    scores = {
        label: Artifact(tmp_path / f"{label}-{version}", score.FORMAT, {"version": version})
        for label in labels
    }
    return score.ScoreJob("set", table, scores)


def scored(found: score.ScoreJob, label: str) -> np.ndarray:
    table = found.tables()[label]
    return table.read(0, table.rows, [score.SCORE])[score.SCORE]


def test_scores_are_in_the_order_of_the_features(engine, tmp_path, scoring) -> None:
    todo = job(tmp_path)
    assert score.run(engine, [todo], scoring).scores == 2 * 2500
    assert todo.complete
    assert todo.tables()["energy"].part_rows == (1030, 1030, 440)
    source = todo.features.read(0, 2500, COLUMNS)
    expected = [-np.log(np.exp(row).sum()) for row in source["logits"].astype(np.float64)]
    np.testing.assert_allclose(scored(todo, "energy"), expected, rtol=1e-12)


def test_complete_scores_are_kept_and_only_those_of_a_new_detector_computed(
    engine, tmp_path, scoring, monkeypatch
) -> None:
    calls = []
    table = score.Scoring.of
    monkeypatch.setattr(
        score.Scoring,
        "of",
        lambda self, rows, **more: (calls.append(list(self.scorers)), table(self, rows, **more))[1],
    )
    score.run(engine, [job(tmp_path, labels=["msp"])], scoring)
    assert score.run(engine, [job(tmp_path, labels=["msp"])], scoring).scores == 0
    assert calls == 3 * [["msp"]]
    assert score.run(engine, [job(tmp_path)], scoring).scores == 2500
    assert calls[3:] == 3 * [["energy"]]
    (tmp_path / "msp-a" / tables.part_name(1)).unlink()
    assert score.run(engine, [job(tmp_path)], scoring).scores == 1030
    assert calls[6:] == [["msp"]]
    assert not job(tmp_path, "b").complete
    assert job(tmp_path, "a").complete


@dataclass(frozen=True)
class Gaps:
    """A scorer that gives some keys what is no score."""

    values: dict[str, float]

    def __call__(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.array([self.values.get(key, 0.25) for key in batch["key"]])


def test_what_each_detector_took_is_told_of_the_rows_that_were_scored(
    engine, tmp_path, scoring, monkeypatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(score.time, "perf_counter", lambda: float(next(now)))
    costs = score.run(engine, [job(tmp_path, labels=["msp"])], scoring).costs
    batches = sum(-(-rows // score.BATCH) for rows in (1030, 1030, 440))
    assert costs == {"msp": {"scores": 2500, "seconds": batches}}, "a second each"
    costs = score.run(engine, [job(tmp_path)], scoring).costs
    assert costs == {"energy": {"scores": 2500, "seconds": batches}}
    assert score.run(engine, [job(tmp_path)], scoring).costs == {}


def test_a_search_counts_with_the_first_of_the_detectors_that_share_it(
    engine, tmp_path, scoring, monkeypatch
) -> None:
    now, search = 0.0, faiss_shard.IndexShard.search

    def slow(*given: Any) -> Neighbours:
        nonlocal now
        now += 7
        return search(*given)

    monkeypatch.setattr(score.time, "perf_counter", lambda: now)
    monkeypatch.setattr(faiss_shard.IndexShard, "search", slow)
    todo, knn = job(tmp_path, labels=("msp", "near", "far")), Knn(k=9).fit(TRAINING)
    bank = banks.build_bank(engine, artifacts.Store(tmp_path / "fits"), knn.bank, todo.features, {}, {})
    scorers = {"msp": scoring.scorers["msp"], "near": Knn(k=3).fit(TRAINING), "far": knn}
    folders = {label: bank.folder for label in ("near", "far")}
    searching = score.Scoring(scorers, COLUMNS, folders, index.start(engine, [bank], schema.Index()))
    costs = score.run(engine, [todo], searching).costs
    batches = sum(-(-rows // score.BATCH) for rows in (1030, 1030, 440))
    assert {label: cost["seconds"] for label, cost in costs.items()} == {
        "msp": 0,
        "near": 7 * batches,
        "far": 0,
    }


def test_what_is_no_score_is_null_counted_and_named_and_refused_above_a_limit(
    engine, tmp_path, scoring
) -> None:
    keys = job(tmp_path).features.read(0, 2500, ["key"])["key"]
    values = dict(zip(keys[[7, 8, 1031, 2400]], [np.nan, np.inf, -np.inf, np.nan], strict=True))
    gaps = replace(scoring, scorers={**scoring.scorers, "gaps": Gaps(values)})
    todo = job(tmp_path, labels=("msp", "gaps"))
    score.run(engine, [todo], gaps)
    first = {keys[7]: "nan", keys[8]: "inf", keys[1031]: "-inf"}
    assert todo.unscored() == {"gaps": {"rows": 4, "first": first}}
    (folder,) = [Path(table.folder) for label, table in todo.tables().items() if label == "gaps"]
    parts = [pq.read_table(part)["score"] for part in sorted(folder.glob("part-*"))]
    assert [part.null_count for part in parts] == [2, 1, 1]
    assert score.require_few_unscored([todo], 4 / 2500) == {"set": todo.unscored()}
    expected = (
        r"^detectors\.gaps: 4 of 2,500 scores on set are not finite, more than score\.max_unscored_fraction "
        rf"= 0\.001\. First: {keys[7]} \(nan\); {keys[8]} \(inf\); {keys[1031]} \(-inf\)\. Check these images"
    )
    with pytest.raises(UserError, match=expected):
        score.require_few_unscored([job(tmp_path, labels=["msp"]), todo], 0.001)
    score.assemble(engine, todo, tmp_path / "table", {"gaps": 0.2, "msp": 0})
    found = pq.read_table(sorted((tmp_path / "table").glob("part-*")))
    nulls = np.isin(np.arange(2500), [7, 8, 1031, 2400])
    for name in ("gaps", "is_ood.gaps"):
        np.testing.assert_array_equal(found[name].is_null().to_numpy(), nulls)
        assert len(found[name].drop_null().unique()) == 1
    assert found["msp"].null_count == found["is_ood.msp"].null_count == 0


def test_nothing_is_said_of_scores_that_are_all_there(engine, tmp_path, scoring) -> None:
    todo = job(tmp_path)
    score.run(engine, [todo], scoring)
    record = todo.scores["msp"].require()
    assert record.facts == {}
    assert all(file.facts.keys() == {"rows"} for file in record.files.values())
    assert score.require_few_unscored([todo], 0) == {}


def test_a_table_of_all_detectors_lies_beside_the_keys_and_is_flagged_later(
    engine, tmp_path, scoring
) -> None:
    todo, folder = job(tmp_path), tmp_path / "table"
    score.run(engine, [todo], scoring)
    score.assemble(engine, todo, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    score.assemble(engine, todo, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    source, found = todo.features.read(0, 2500, COLUMNS), pq.read_table(sorted(folder.glob("part-*")))
    for name in ("key", "label", "prediction"):
        np.testing.assert_array_equal(found[name].to_numpy(), source[name])
    np.testing.assert_array_equal(found["msp"].to_numpy(), scored(todo, "msp"))
    for threshold in (-0.5, -0.3):
        score.assemble(engine, todo, folder, {"msp": threshold})
        table = pq.read_table(folder / tables.part_name(2))
        np.testing.assert_array_equal(table["is_ood.msp"].to_numpy(), table["msp"].to_numpy() > threshold)
        assert table.column_names == ["key", "label", "prediction", "msp", "energy", "is_ood.msp"]


def test_scorers_work_in_a_fresh_ray_worker(ray_session, tmp_path, scoring) -> None:
    features = job(tmp_path).features.read(0, 100, COLUMNS)

    @ray.remote(max_calls=1)
    def elsewhere(work: bytes) -> list[float]:
        return pickle.loads(work).of(features)["msp"].tolist()

    found = ray.get(elsewhere.remote(pickle.dumps(scoring)))
    assert found == scoring.of(features)["msp"].tolist()


def test_scores_of_other_features_are_never_taken_for_those_of_these(tmp_path: Path) -> None:
    """Whether the record says so, or the writer was killed before there was one."""
    before, after = (Artifact(tmp_path / "scores", "scores 1", {}, {"features": each}) for each in "ab")
    made = {"part-00000.parquet": write_part(tmp_path / "scores" / "part-00000.parquet", one, rows=1)}
    for finished in (True, False):
        before.begin()
        write_part(tmp_path / "scores" / "part-00000.parquet", one, rows=1)
        if finished:
            before.finish(made)
        assert list(before.begin()) == ["part-00000.parquet"]
        assert after.begin() == {}
        (tmp_path / "scores" / "_inputs.json").write_text("")  # damaged: nobody knows
        assert before.begin() == {}
        assert not (tmp_path / "scores" / "part-00000.parquet").exists()


def one(path: Path) -> None:
    path.write_bytes(b"1")


def test_what_several_scorers_make_of_a_batch_is_computed_once(tmp_path, monkeypatch) -> None:
    table, calls, made = feature_table(tmp_path / "table", 100, []), [], statistics.unit_rows
    rows = table.read(0, 100, COLUMNS)
    head = Head(np.eye(5, 6, dtype=np.float32), np.zeros(5, np.float32))
    kinds = {"cosine": Cosine(), "mds": MdsL2(), "rmds": RmdsL2(), "stepped": combined(Energy(), [Ash()])}
    chosen = {**kinds, "msp": Msp(), "gradnorm": GradNorm(), "energy": Energy()}
    wanted = [need for detector in chosen.values() for need in detector.statistics()]
    training = Training(head.weight, head.bias, train=statistics.of(rows, wanted, head))
    with opened("inline", threads=1) as engine:
        store = artifacts.Store(tmp_path / "fits")
        scorers = fit_detectors(engine, chosen, training, store, None, made_of, schema.Index()).scorers
    assert scorers["mds"].whitening is scorers["rmds"].whitening
    expected = {label: scorer(rows) for label, scorer in scorers.items()}

    def counted(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        calls.append("unit")
        return made(batch)

    def nearest(*given: object) -> np.ndarray:
        calls.append("nearest")
        return distance(*given)

    distance = _gaussian._nearest
    monkeypatch.setattr(_gaussian, "_nearest", nearest)
    for module in (cosine, _gaussian):
        monkeypatch.setattr(module, "unit_rows", counted)
    monkeypatch.setattr(score, "BATCH", 100)
    found = score.Scoring(scorers, COLUMNS).of(rows)
    assert sorted(calls) == ["nearest", "unit"]
    for label, scores in expected.items():
        np.testing.assert_array_equal(found[label], scores)
