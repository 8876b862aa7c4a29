"""Several nodes: work goes where its resources are, and every node must see the workspace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Results, Site, finished, written


def test_actors_go_to_the_nodes_that_have_what_they_need(
    site: Site, undisturbed: Results, everything: dict[str, Any], tmp_path: Path
) -> None:
    """Logical GPUs and a resource of the cluster's own, on one node; the device is the CPU by config."""
    name = site.add_node("--num-cpus=2", "--num-gpus=2", '--resources={"special": 2}')
    extract = {**everything["extract"], "gpus_per_actor": 1, "device": "cpu", "resources": {"special": 1}}
    index = {"shards": 3, "gpus_per_shard": 0.25, "cpus_per_shard": 0.25, "device": "cpu"}
    config = written({**everything, "extract": extract, "index": index}, tmp_path)
    try:
        finished(site.run(config))
    finally:
        site.kill_node(name)
    found = Results.of(config)
    assert found.scores == undisturbed.scores
    assert found.metrics == undisturbed.metrics
    assert any(node["resources"].get("special") == 2 for node in found.record["nodes"].values())
    assert found.record["stages"]["extract"]["gpu_seconds"] > 0
    assert undisturbed.record["stages"]["extract"]["gpu_seconds"] == 0


def test_an_actor_that_fits_on_no_single_node_is_refused(
    site: Site, everything: dict[str, Any], tmp_path: Path
) -> None:
    extract = {**everything["extract"], "cpus_per_actor": 3}
    driver = site.run(written({**everything, "extract": extract}, tmp_path))
    output, _ = driver.communicate()
    assert driver.returncode == 2
    assert "extract: one actor needs 3 CPU on one node; the cluster's nodes have 2 CPU" in output


def can_hide() -> bool:
    return os.geteuid() == 0 and not subprocess.run(["unshare", "--mount", "true"], check=False).returncode


@pytest.mark.skipif(not can_hide(), reason="needs the right to mount")
def test_a_workspace_that_a_node_does_not_see_is_refused(
    site: Site, everything: dict[str, Any], tmp_path: Path
) -> None:
    config = written(everything, tmp_path)
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
