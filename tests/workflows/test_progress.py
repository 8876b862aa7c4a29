"""What a run tells while it works: what it does, and how much of what is to be done is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import schema
from pipeline.stages import score
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

    @contextmanager
    def stage(self, name: str) -> Iterator[Recorded]:
        self.name = name
        yield self

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
    """Runs up to the metrics; returns what it told. Parts of scores have 200 rows."""
    monkeypatch.setattr(score, "SLICE", 200)

    def executed(loaded: schema.Config, fresh: bool = False) -> Recorded:
        display = Recorded()
        options = run.Options(last="evaluate", engine="inline", threads=1, fresh=fresh)
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
        ("parts of the jigsaw pass", 2),
        ("detectors", 3),
        ("slices of a bank", 1),
    ]
    assert [each.what for each in first.counts if each.stage == "evaluate"] == [
        "detectors measured",
        "detectors compared",
    ]
    assert all(each.done == each.total for each in first.counts)
    assert ("extract", "starts workers, which load the network") in first.said
    assert ("score", "loads the vectors of knn") in first.said

    assert watched(loaded).counts == []

    (train,) = (tmp_path / "workspace" / "features").glob("train-*")
    lose(train, 1, 3)  # 128 and 116 of 500 rows
    assert watched(loaded).of("extract") == [(244, 244, 836)]
    (msp,) = (tmp_path / "workspace" / "scores").glob("test-*/msp-*")
    lose(msp, 1)  # 100 of 300 rows
    assert watched(loaded).of("score") == [(100, 100, 200)]
    fresh = watched(loaded, fresh=True)
    assert (fresh.of("extract"), fresh.of("score")) == ([(1080, 1080, 0)], [(580, 580, 0)])
