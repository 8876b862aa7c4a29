"""Processes, nodes and drivers are killed at seeded points of a run; it ends with the undisturbed results.

One point of every kind runs always; all of them with `make chaos`.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Results, Site, finished, kill, wait, written

ACTORS = {"extract": "ray::MapWorker", "fit": "ray::Worker", "score": "ray::Shard"}
"""Titles of the actors that work in a stage."""


@dataclass(frozen=True)
class Fault:
    """What is killed when: at some share of the time that a stage takes."""

    stage: str
    victim: str
    seed: int

    @property
    def share(self) -> float:
        return random.Random(f"{self}").uniform(0, 0.8)


FAULTS = [
    Fault(stage, victim, seed)
    for stage in ("extract", "fit", "score")
    for victim in ("actor", "node", "driver")
    for seed in range(3)
]
ALWAYS = {Fault("extract", "actor", 0), Fault("extract", "node", 0), Fault("score", "actor", 0)}


def begun(site: Site, workspace: Path, stage: str) -> bool:
    """Whether a stage is under way."""
    if stage == "extract":
        return any(workspace.glob("features/*/part-*.parquet"))
    if stage == "fit":
        return len(list(workspace.glob("features/*/_manifest.json"))) == 4
    return bool(site.workers(ACTORS["score"]))


def strike(site: Site, fault: Fault, driver: Any, seconds: float) -> None:
    """Kill the victim."""
    time.sleep(fault.share * seconds)
    assert driver.poll() is None, "the run was over before the fault"
    if fault.victim == "driver":
        driver.kill()
    elif fault.victim == "node":
        site.kill_node(f"node-{site.started}")
        site.add_node("--num-cpus=2")
    else:
        kill(wait("a victim", lambda: site.workers(ACTORS[fault.stage]))[0])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=f"{fault.stage}-{fault.victim}-{fault.seed}",
            marks=() if fault in ALWAYS else pytest.mark.chaos,
        )
        for fault in FAULTS
    ],
)
def test_a_run_survives(
    fault: Fault, site: Site, undisturbed: Results, everything: dict[str, Any], tmp_path: Path
) -> None:
    if len(site.nodes) == 1:
        site.add_node("--num-cpus=2")
    config = written(everything, tmp_path)
    workspace = tmp_path / "workspace"
    driver = site.run(config)
    wait(
        f"{fault.stage} to begin",
        lambda: driver.poll() is not None or begun(site, workspace, fault.stage),
        120,
    )
    usual = undisturbed.record["stages"][fault.stage]
    strike(site, fault, driver, usual.get("steady_seconds", usual["seconds"]))
    if fault.victim == "driver":
        driver.wait()
        driver = site.run(config)
    finished(driver)
    found = Results.of(config)
    assert found.scores == undisturbed.scores
    assert found.metrics == undisturbed.metrics
