"""Drivers and workers of a cluster are killed at seeded moments in every stage; the bytes stay the same."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.nodes import Site, finished
from tests.kills import runs
from tests.kills.runs import Evaluation
from tests.kills.strikes import DRIVER, STAGES, WORKER, Plan, drawn

WORKING = ("extract", "fit", "score", "evaluate")
"""Stages in which workers write."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Plan]:
    """What a run in one process gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    evaluation = Evaluation(runs.settings(folder), folder)
    plan = evaluation.plan()
    runs.evaluate(evaluation.config, plan, "inline", 1)
    return evaluation, plan


@pytest.fixture
def evaluation(undisturbed: tuple[Evaluation, Plan], tmp_path: Path) -> Evaluation:
    return Evaluation(undisturbed[0].raw, tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stages", "seed"),
    [
        pytest.param(("extract", "fit", "score"), 0, id="main-0"),
        *(pytest.param(STAGES, seed, id=f"all-{seed}", marks=pytest.mark.chaos) for seed in range(1, 5)),
    ],
)
def test_a_run_whose_driver_was_killed_in_one_stage_after_the_other_goes_on_to_the_same_bytes(
    stages: tuple[str, ...],
    seed: int,
    site: Site,
    undisturbed: tuple[Evaluation, Plan],
    evaluation: Evaluation,
) -> None:
    whole, plan = undisturbed
    for stage in stages:
        strike = replace(drawn(plan.moments(), stage, seed), victim=DRIVER)
        driver = evaluation.driver(site.environment, strike)
        output, _ = driver.communicate(timeout=240)
        assert driver.returncode == -signal.SIGKILL, output
    finished(evaluation.driver(site.environment))
    assert evaluation.wrong(whole.contents()) == []


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(6))
def test_a_run_whose_workers_were_killed_gives_the_same_bytes(
    seed: int, site: Site, undisturbed: tuple[Evaluation, Plan], evaluation: Evaluation
) -> None:
    whole, plan = undisturbed
    site.need_another()
    strikes = [drawn(plan.moments(), stage, seed, WORKER) for stage in WORKING]
    finished(evaluation.driver(site.environment, *strikes))
    assert len(Plan("", str(evaluation.folder / "counts-1")).struck()) == len(strikes)
    assert evaluation.wrong(whole.contents()) == []
