"""Several nodes: work goes where its resources are, and survives the loss of processes, nodes and drivers.

They are killed in the course of a run, which ends with the results of an undisturbed one.

One run with several faults is tested always; one run for every fault, at seeded times, with `make test-slow`.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import SPECIAL, Results, Site, finished, in_one_process, kill, written
from tests.servers import wait

ACTORS = {"extract": "ray::MapWorker", "fit": "ray::Worker.", "score": "ray::IndexShard"}
"""What titles of the actors begin with that work in a stage; in fit, only while they do."""


@dataclass(frozen=True)
class Fault:
    """What is killed when: at a share of the time that a stage takes, some of it over before that."""

    stage: str
    victim: str
    seed: int

    @property
    def share(self) -> float:
        return random.Random(f"{self}").uniform(0, 0.5)


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
        site.kill_node(list(site.nodes)[-1])
        site.add_node("--num-cpus=2")
    else:
        kill(wait("a victim", lambda: site.workers(ACTORS[fault.stage]))[0])


@pytest.mark.timeout(600)
def test_a_run_goes_where_its_resources_are_and_survives_the_loss_of_processes_and_of_a_node(
    site: Site, demanding: dict[str, Any], tmp_path: Path
) -> None:
    """With decoding in tasks of its own, as the actors hold logical GPUs."""
    names = [site.add_node(*SPECIAL) for _ in range(2)]
    config = written(demanding, tmp_path)
    driver = site.run(config)
    features, datasets = tmp_path / "workspace" / "features", len(demanding["datasets"])

    def parts() -> int:
        """Of 36 that there will be; of 31 with every detector, on fewer images."""
        assert driver.poll() is None, "the run was over before the fault"
        return len(list(features.glob("*/part-*.parquet")))

    def at_work(stage: str) -> Any:
        assert driver.poll() is None, "the run was over before the fault"
        return site.workers(ACTORS[stage])

    try:
        wait("some features", lambda: parts() > 4, 120)
        kill(at_work("extract")[0])
        wait("half of them", lambda: parts() > 15, 120)
        site.kill_node(names.pop())
        names.append(site.add_node(*SPECIAL))
        wait(
            "all features", lambda: parts() and len(list(features.glob("*/_manifest.json"))) == datasets, 120
        )
        kill(wait("a pass", lambda: at_work("fit"), 120)[0])
        kill(wait("an index shard", lambda: at_work("score"), 120)[0])
        finished(driver)
    finally:
        for name in names:
            site.kill_node(name)
    (tmp_path / "alone").mkdir()
    found, alone = Results.of(config), in_one_process(demanding, tmp_path / "alone")
    assert len(found.record["detectors"]) == len(demanding["detectors"])
    assert found.same_as(alone)
    assert sum(node["resources"].get("special", 0) for node in found.record["nodes"].values()) > 1
    extracted = found.record["stages"]["extract"]
    assert extracted["retries"] > 0  # a worker of a pass may die before it has work
    assert extracted["cpu_seconds"] > 0
    assert extracted["gpu_seconds"] > alone.record["stages"]["extract"]["gpu_seconds"] == 0
    assert not list(tmp_path.rglob(".attempts-*"))


@pytest.mark.chaos
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.stage}-{fault.victim}-{fault.seed}")
def test_a_run_survives(
    fault: Fault,
    site: Site,
    undisturbed: Results,
    calm: Results,
    several: dict[str, Any],
    tmp_path: Path,
) -> None:
    site.need_another()
    config = written(several, tmp_path)
    driver = site.run(config)
    usual = calm.record["stages"][fault.stage]
    try:
        wait_for(site, tmp_path / "workspace", fault.stage, driver)
        strike(site, fault, driver, usual.get("steady_seconds", usual["seconds"]))
        if fault.victim == "driver":
            driver.communicate()
            driver = site.run(config)
        finished(driver)
    finally:
        driver.kill()
    assert Results.of(config).same_as(undisturbed)
    verified = site.command("verify", str(tmp_path / "workspace" / "runs" / "small"))
    finished(verified)


def test_the_doctor_sees_the_nodes(site: Site) -> None:
    site.need_another()
    output = finished(site.command("doctor"))
    assert re.search(r"ray cluster +\d+ nodes: .* 2 CPU, 0 GPU; .* 2 CPU, 0 GPU", output)


def test_an_actor_that_fits_on_no_single_node_is_refused(
    site: Site, several: dict[str, Any], tmp_path: Path
) -> None:
    extract = {**several["extract"], "cpus_per_actor": 3}
    driver = site.run(written({**several, "extract": extract}, tmp_path))
    output, _ = driver.communicate()
    assert driver.returncode == 2
    assert "extract: one actor needs 3 CPU on one node; the cluster's nodes have 2 CPU" in output


def can_hide() -> bool:
    return os.geteuid() == 0 and not subprocess.run(["unshare", "--mount", "true"], check=False).returncode


@pytest.mark.skipif(not can_hide(), reason="needs the right to mount")
def test_a_workspace_that_a_node_does_not_see_is_refused(
    site: Site, several: dict[str, Any], tmp_path: Path
) -> None:
    config = written(several, tmp_path)
    (tmp_path / "workspace").mkdir()
    name = site.add_node("--num-cpus=1", hidden=tmp_path / "workspace")
    try:
        driver = site.run(config)
        output, _ = driver.communicate()
    finally:
        site.kill_node(name)
    assert driver.returncode == 2
    assert f"workspace: {tmp_path}/workspace is a folder of this machine that 1 of" in output
    assert "s3://bucket/prefix" in output
    assert not list((tmp_path / "workspace").glob("features/*/part-*"))


SMALL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
"""
"""A network that costs little for large images."""


@pytest.mark.chaos
def test_more_pixels_than_the_object_store_holds_go_through_it(
    site: Site, several: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    transform = {"resize": 1000, "crop": 1000, "mean": [0.5], "std": [0.5], "channels": 1}
    model = {"source": "factory", "name": str(tmp_path / "small.py:build"), "transform": transform}
    found = []
    for decode in ("separate", "fused"):
        extract = {**several["extract"], "decode": decode, "actors": 1, "shard_rows": 64}
        raw = {**several, "model": model, "detectors": ["msp", "dice"], "extract": extract}
        (tmp_path / decode).mkdir()
        config = written(raw, tmp_path / decode)
        finished(site.run(config))
        found.append(Results.of(config))
    assert found[0].same_as(found[1])
