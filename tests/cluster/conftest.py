"""A real cluster for the session, and an evaluation that uses every kind of work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli.progress import Display
from pipeline.config import loading
from pipeline.workflows import run
from tests.cluster.nodes import Results, Site, finished, written
from tests.conftest import small


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
def everything(images: Path) -> dict[str, Any]:
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


@pytest.fixture(scope="session")
def demanding(everything: dict[str, Any]) -> dict[str, Any]:
    """The same with actors that need logical GPUs and the special resource; the device is the CPU."""
    extract = {**everything["extract"], "gpus_per_actor": 1, "device": "cpu", "resources": {"special": 1}}
    index = {"shards": 3, "gpus_per_shard": 0.25, "cpus_per_shard": 0.25, "device": "cpu"}
    return {**everything, "extract": extract, "index": index}


@pytest.fixture(scope="session")
def undisturbed(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a run in one process gives."""
    config = written(everything, tmp_path_factory.mktemp("undisturbed"))
    run.execute(loading.load(str(config)), run.Options(engine="inline"), Display(Console(quiet=True)))
    return Results.of(config)


@pytest.fixture(scope="session")
def calm(site: Site, everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a run on the cluster gives that nothing happens to: the clock of the seeded faults."""
    site.need_another()
    config = written(everything, tmp_path_factory.mktemp("calm"))
    finished(site.run(config))
    return Results.of(config)
