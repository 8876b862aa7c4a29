"""Evaluations whose processes are killed at seeded moments in every stage end with the same bytes.

Without Ray; its drivers and workers are killed in tests/cluster.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.workspace import files
from tests.kills import runs
from tests.kills.runs import Evaluation
from tests.kills.strikes import DRIVER, STAGES, Moments, Strike, drawn
from tests.stored import newest

KILLED_TWICE = 10
"""The first of the seeds with which a run is killed again when it goes on."""

KEPT = ("features", "fits", "scores")
"""Folders of artifacts whose finished parts are never made again."""


@dataclass(frozen=True)
class Undisturbed:
    """What nothing happened to."""

    raw: Mapping[str, Any]
    contents: dict[str, str]
    moments: Moments


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    evaluation = Evaluation(runs.settings(folder), folder)
    status, plan = evaluation.start()
    assert status == 0
    return Undisturbed(evaluation.raw, evaluation.contents(), plan.moments())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_was_killed_in_one_stage_after_the_other_goes_on_to_the_same_bytes(
    undisturbed: Undisturbed, seed: int, tmp_path: Path
) -> None:
    evaluation, struck = Evaluation(undisturbed.raw, tmp_path), []
    finished: dict[Path, int] = {}
    for stage in STAGES:
        status, plan = evaluation.start(drawn(undisturbed.moments, stage, seed), threads=1 + seed)
        assert (status, len(plan.struck())) == (-signal.SIGKILL, 1)
        struck += plan.struck()
        finished = parts(evaluation.workspace) | finished
    assert evaluation.start(threads=1 + seed)[0] == 0
    assert evaluation.wrong(undisturbed.contents) == [], struck
    assert {path.relative_to(evaluation.workspace).parts[0] for path in finished} == set(KEPT)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "made again"


def parts(workspace: Path) -> dict[Path, int]:
    """Parts of artifacts that are finished, each with its receipt beside it; when they were written.

    Without the tables of a run, which are put together from them.
    """
    receipts = [path for kind in KEPT for path in (workspace / kind).rglob(".*.json")]
    found = [path.with_name(path.name[1 : -len(".json")]) for path in receipts]
    return {path: path.stat().st_mtime_ns for path in found if path.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    undisturbed: Undisturbed, stage: str, seed: int, tmp_path: Path
) -> None:
    evaluation = Evaluation(undisturbed.raw, tmp_path)
    threads = 1 + seed % 2
    status, plan = evaluation.start(drawn(undisturbed.moments, stage, seed), threads=threads)
    assert (status, len(plan.struck())) == (-signal.SIGKILL, 1)
    if seed >= KILLED_TWICE:
        later = random.Random(seed).choice(STAGES[STAGES.index(stage) :])
        evaluation.start(drawn(undisturbed.moments, later, f"{seed} again"), threads=threads)
    assert evaluation.start(threads=threads)[0] == 0
    assert evaluation.wrong(undisturbed.contents) == [], plan.struck()


def test_a_run_that_was_killed_when_its_scores_were_there_still_tells_of_its_indexes(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    evaluation = Evaluation(undisturbed.raw, tmp_path)
    before_the_record = undisturbed.moments["score", DRIVER] - 2
    assert evaluation.start(Strike("score", DRIVER, before_the_record))[0] == -signal.SIGKILL
    assert evaluation.start()[0] == 0
    record = files.read_json(newest(evaluation.workspace) / "manifest.json")
    assert set(record["index"]) == {"knn", "grood"}
    assert evaluation.wrong(undisturbed.contents) == []
