"""A real cluster for the session, and an evaluation that uses every kind of work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Results, Site, finished, in_one_process, written
from tests.conftest import everything, small


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r", ignore_cleanup_errors=True) as folder:
        site = Site(Path(folder))
        try:
            site.start_head()
            yield site
        finally:
            site.stop()


@pytest.fixture(scope="session")
def several(images: Path) -> dict[str, Any]:
    """The small evaluation with extra passes, statistics, and two banks on two index shards."""
    settings = small(images)
    settings["detectors"] = [
        "msp",
        "dice",
        "odin",
        "mahalanobis_ensemble",
        {"featurenorm": {"samples": 64}},
        {"knn": {"k": 5}},
        {"grood": {"samples": 64, "class_samples": 10}},
    ]
    settings["extract"] |= {"shard_rows": 32, "actors": 2, "batch_size": 32}
    settings["index"] = {"shards": 2, "cpus_per_shard": 0.5}
    return settings


@pytest.fixture(params=["several", pytest.param("every", marks=pytest.mark.chaos)])
def demanding(request: pytest.FixtureRequest, several: dict[str, Any], images: Path) -> dict[str, Any]:
    """Some or all detectors, with actors that need logical GPUs and the special resource; all on the CPU."""
    settings = several if request.param == "several" else everything(small(images), images)
    extract = {
        "shard_rows": 32,
        "actors": 2,
        "gpus_per_actor": 1,
        "device": "cpu",
        "resources": {"special": 1},
    }
    index = {"shards": 3, "gpus_per_shard": 0.25, "cpus_per_shard": 0.25, "device": "cpu"}
    return {**settings, "extract": {**settings["extract"], **extract}, "index": index}


@pytest.fixture(scope="session")
def undisturbed(several: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a run in one process gives."""
    return in_one_process(several, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def calm(site: Site, several: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a run on the cluster gives that nothing happens to: the clock of the seeded faults."""
    site.need_another()
    config = written(several, tmp_path_factory.mktemp("calm"))
    finished(site.run(config))
    return Results.of(config)
