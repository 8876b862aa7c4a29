"""What a run tells while it works: what it does, and how much of what is to be done is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import schema
from pipeline.stages import score, shards
from pipeline.stages.progress import LOADS
from pipeline.workflows import run
from pipeline.workflows.progress import Quiet
from pipeline.workspace import tables


@dataclass
class Count:
    """Something that a stage counted."""

    stage: str
    what: str
    total: int
    there: int
    done: int = 0


@dataclass
class Recorded(Quiet):
    """Keeps what it is told."""

    name: str = ""
    note: str = ""
    counts: list[Count] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """What closed each stage."""

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Recorded]:
        self.name = name
        self.doing(doing)
        yield self
        self.notes[name] = self.note

    def doing(self, text: str) -> None:
        self.said.append((self.name, text))

    def count(self, what: str, total: int, there: int = 0) -> None:
        self.counts.append(Count(self.name, what, total, there))

    def advance(self, count: int) -> None:
        self.counts[-1].done += count

    def of(self, stage: str) -> list[tuple[int, int, int]]:
        """Done, total and what was there, of all that a stage counted."""
        return [(each.done, each.total, each.there) for each in self.counts if each.stage == stage]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[schema.Config], Recorded]:
    """Runs, to the metrics if no other stage is last; returns what it told. Parts of scores have 200 rows."""
    monkeypatch.setattr(score, "SLICE", 200)

    def executed(loaded: schema.Config, last: run.StageName = "evaluate", fresh: bool = False) -> Recorded:
        display = Recorded()
        options = run.Options(last=last, engine="inline", threads=1, fresh=fresh)
        run.execute(loaded, options, display)
        return display

    return executed


def lose(folder: Path, *numbers: int) -> None:
    """As a killed run leaves it: without its record and some parts."""
    (folder / "_manifest.json").unlink()
    for number in numbers:
        (folder / tables.part_name(number)).unlink()


def test_a_run_counts_all_that_it_does_and_a_resumed_one_only_what_is_still_to_do(
    settings, load, watched, tmp_path
) -> None:
    settings["detectors"] = ["msp", {"knn": {"k": 5}}, {"featurenorm": {"samples": 100}}]
    loaded = load(settings)
    first = watched(loaded)
    assert first.of("extract") == [(1080, 1080, 0)]
    assert first.of("score") == [(580, 580, 0)]
    assert [(each.what, each.total) for each in first.counts if each.stage == "fit"] == [
        ("parts of the jigsaw pass", 1),
        ("detectors", 3),
        ("slices of a bank", 1),
    ]
    assert [each.what for each in first.counts if each.stage == "evaluate"] == [
        "detectors measured",
        "detectors compared",
    ]
    assert all(each.done == each.total for each in first.counts)
    assert ("extract", "starts workers, which load the network and take the first images") in first.said
    assert ("score", "loads the vectors of knn") in first.said

    assert first.notes["score"] == "1,740 scores of 580 rows"

    again = watched(loaded)
    assert (again.counts, again.notes["score"]) == ([], "0 scores of 0 rows")

    (train,) = (tmp_path / "workspace" / "features").glob("train-*")
    lose(train, 1, 3)  # 128 and 116 of 500 rows
    assert watched(loaded).of("extract") == [(244, 244, 836)]
    (msp,) = (tmp_path / "workspace" / "scores").glob("test-*/msp-*")
    lose(msp, 1)  # 100 of 300 rows
    resumed = watched(loaded)
    assert (resumed.of("score"), resumed.notes["score"]) == ([(100, 100, 200)], "100 scores of 100 rows")
    fresh = watched(loaded, fresh=True)
    assert (fresh.of("extract"), fresh.of("score")) == ([(1080, 1080, 0)], [(580, 580, 0)])


def test_an_extraction_with_all_its_parts_looks_for_them_once_and_starts_no_workers(
    settings, load, watched, tmp_path, monkeypatch
) -> None:
    settings["detectors"] = ["msp"]
    loaded = load(settings)
    watched(loaded, "extract")
    (train,) = (tmp_path / "workspace" / "features").glob("train-*")
    lose(train)
    looked, missing = [], shards.missing

    def noted(job: shards.Job, plan: shards.Plan) -> list[shards.Shard]:
        looked.append(job.dataset)
        return missing(job, plan)

    monkeypatch.setattr(shards, "missing", noted)
    found = watched(loaded, "extract")
    assert (looked, found.of("extract")) == (["train"], [(0, 0, 1080)])
    assert ("extract", LOADS) not in found.said


def test_an_ensemble_alone_is_work_on_rows_too(settings, load, watched, tmp_path) -> None:
    settings["detectors"] = ["msp", "energy", {"ensemble": {"members": ["msp", "energy"]}}]
    settings["thresholds"] = {"false_alarm": [0.1], "calibrate_on": "id"}
    loaded = load(settings)
    first = watched(loaded, "score")
    assert [each.what for each in first.counts if each.stage == "score"] == ["rows", "rows for ensembles"]
    assert first.notes["score"] == "1,740 scores of 580 rows"
    for folder in (tmp_path / "workspace" / "scores").glob("*/ensemble-*"):
        shutil.rmtree(folder)
    found = watched(loaded, "score")
    assert found.of("score") == [(580, 580, 0)]
    assert found.notes["score"] == "580 scores of 580 rows"


def test_mlflow_is_told_of_what_a_stage_counts_first(monkeypatch) -> None:
    monkeypatch.setattr(run, "TELL", 0.0)
    told = []

    class Background:
        """Sends at once."""

        def submit(self, _: object, session: str, name: str, done: int, seconds: float) -> Future[None]:
            told.append((session, name, done))
            sent = Future[None]()
            sent.set_result(None)
            return sent

    opening = Future[str]()
    opening.set_result("session")
    shown = Recorded()
    stage = run.Watched(shown, "evaluate", opening, Background())
    for what, total in (("measured", 2), ("compared", 2), ("measured", 1)):
        stage.count(what, total)
        for _ in range(total):
            stage.advance(1)
    assert told == [("session", "evaluate", done) for done in (1, 2, 3)]
    assert [each.done for each in shown.counts] == [2, 2, 1]
