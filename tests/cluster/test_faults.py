"""Processes, nodes and drivers are killed at seeded points of a run; it ends with the undisturbed results.

One run with several faults is tested always; one run for every fault with `make chaos`.
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


def wait_for(site: Site, workspace: Path, stage: str, driver: Any) -> None:
    """Wait until a stage is under way."""
    begun = {
        "extract": lambda: any(workspace.glob("features/*/part-*.parquet")),
        "fit": lambda: len(list(workspace.glob("features/*/_manifest.json"))) == 4,
        "score": lambda: site.workers(ACTORS["score"]),
    }
    wait(f"{stage} to begin", lambda: driver.poll() is not None or begun[stage](), 120)


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


def survives(
    faults: list[Fault], site: Site, undisturbed: Results, raw: dict[str, Any], folder: Path
) -> Results:
    """Run with some faults, one after the other, and compare every score and metric."""
    if len(site.nodes) == 1:
        site.add_node("--num-cpus=2")
    config = written(raw, folder)
    driver = site.run(config)
    for fault in faults:
        usual = undisturbed.record["stages"][fault.stage]
        wait_for(site, folder / "workspace", fault.stage, driver)
        strike(site, fault, driver, usual.get("steady_seconds", usual["seconds"]))
        if fault.victim == "driver":
            driver.communicate()
            driver = site.run(config)
    finished(driver)
    found = Results.of(config)
    assert found.scores == undisturbed.scores
    assert found.metrics == undisturbed.metrics
    return found


def test_a_run_survives_the_loss_of_actors_and_of_a_node(
    site: Site, undisturbed: Results, everything: dict[str, Any], tmp_path: Path
) -> None:
    faults = [Fault("extract", "actor", 0), Fault("extract", "node", 0), Fault("score", "actor", 0)]
    found = survives(faults, site, undisturbed, everything, tmp_path)
    assert found.record["stages"]["extract"]["retries"] > 0
    assert found.record["stages"]["extract"]["cpu_seconds"] > 0
    assert len(found.record["nodes"]) > 1
    assert not list(tmp_path.rglob(".attempts-*"))


@pytest.mark.chaos
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.stage}-{fault.victim}-{fault.seed}")
def test_a_run_survives(
    fault: Fault, site: Site, undisturbed: Results, everything: dict[str, Any], tmp_path: Path
) -> None:
    survives([fault], site, undisturbed, everything, tmp_path)
    verified = site.command("verify", str(tmp_path / "workspace" / "runs" / "small"))
    finished(verified)
