"""Both engines and a local S3 for the whole session, and a small real evaluation to run on them.

What takes seconds to import is imported by the fixtures: the process that only hands out tests does not.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest
import yaml

from pipeline import detectors, quickstart
from pipeline.cluster.engine import Engine, opened
from pipeline.config import loading, schema
from tests.servers import ray

if TYPE_CHECKING:
    from pipeline.workflows import run

ARRAYS = Path(quickstart.__file__).parent / "images.npz"

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


IN_MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30


def pytest_configure() -> None:
    """Lay the files of tests in memory where there is room: every write of the product waits for the disk."""
    if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests on Ray, and those that several processes keep together.

    Marks have to be there before pytest-xdist looks at them, which is before tests are sorted.
    """
    item.add_marker(pytest.mark.xdist_group(group_of(item)))
    if {"ray_session", "site", "head"} & fixtures_of(item):
        item.add_marker(pytest.mark.cluster)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole evaluations come first: they take longest."""
    whole = {item.path for item in items if {"execute", "undisturbed"} & fixtures_of(item)}
    items.sort(key=lambda item: item.path not in whole)


def group_of(item: pytest.Item) -> str:
    """Which tests run in one process with this one: they share costly fixtures."""
    for name in ("ray_session", "site", "head"):
        if name in fixtures_of(item):
            return name
    return "detectors" if item.path.parent.name == "detectors" else str(item.path)


def fixtures_of(item: pytest.Item) -> set[str]:
    """Names of the fixtures that a test asks for, by itself, through others, or as its engine."""
    cases = getattr(getattr(item, "callspec", None), "params", {})
    on_ray = {"ray_session"} if cases.get("each") == "ray" else set()
    return {*getattr(item, "fixturenames", ())} - cases.keys() | on_ray


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small networks gain nothing from more threads, and threads that wait for a busy core lose much."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with three logical CPUs and two logical GPUs, shared by all tests."""
    with ray(cpus=3, gpus=2, environment=S3_ENVIRONMENT):
        yield


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine in this process, with one thread."""
    with opened("inline", threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def on_ray(ray_session: None) -> Iterator[Engine]:
    """The engine on the session's Ray."""
    with opened("ray") as engine:
        yield engine


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """A local S3 with the bucket `data`; its address and credentials are in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **S3_ENVIRONMENT}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="data")
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> str:
    """URI of a new bucket."""
    return new_bucket(endpoint)


def new_bucket(endpoint: str) -> str:
    """Its URI, with the server's address: workers started earlier cannot see the environment."""
    import boto3

    name = f"bucket-{uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}?endpoint_override={endpoint}&scheme=http"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real images of every set of the quickstart, as .npz."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    with np.load(ARRAYS) as arrays:
        np.savez(
            path,
            train_x=arrays["id_train_x"][:500],
            train_y=arrays["id_train_y"][:500],
            test_x=arrays["id_test_x"][:300],
            test_y=arrays["id_test_y"][:300],
            shifted_x=255 - arrays["id_test_x"][300:400],
            shifted_y=arrays["id_test_y"][300:400],
            animals_x=arrays["ood_animals_x"][:150],
            held_x=arrays["id_test_x"][450:600],
            held_y=arrays["id_test_y"][450:600],
            val_x=arrays["ood_animals_x"][150:250],
            textures_x=arrays["ood_textures_x"][:130],
            production_x=np.concatenate([arrays["id_test_x"][400:450], arrays["ood_textures_x"][130:180]]),
        )
    return path


@pytest.fixture
def settings(images: Path) -> dict[str, Any]:
    """The raw config of a small evaluation; tests change it and load it."""
    return small(images)


def small(images: Path) -> dict[str, Any]:
    """The raw config of a small evaluation."""

    dataset = partial(_dataset, images)
    return {
        "name": "small",
        "model": {
            "source": "factory",
            "name": "pipeline.quickstart.resnet:build",
            "weights": "package://pipeline.quickstart/resnet.safetensors",
            "transform": {"crop": 28, "mean": [0.286], "std": [0.353], "channels": 1},
        },
        "datasets": [
            dataset("train", "train", labelled=True),
            dataset("test", "id", labelled=True),
            dataset("animals", "near_ood"),
            dataset("textures", "far_ood"),
        ],
        "detectors": ["msp", {"knn": {"k": 5}}],
        "extract": {"batch_size": 64, "shard_rows": 128, "actors": 1},
        "tracking": {"enabled": False},
    }


def _dataset(images: Path, name: str, role: str, labelled: bool = False) -> dict[str, Any]:
    arrays = {"images": f"{name}_x"} | ({"labels": f"{name}_y"} if labelled else {})
    return {"name": name, "role": role, "format": "npz", "path": str(images), **arrays}


def everything(raw: dict[str, Any], images: Path) -> dict[str, Any]:
    """The small evaluation with every role, statistic, pass and kind of bank."""

    dataset = partial(_dataset, images)
    raw["datasets"] += [
        dataset("shifted", "shifted_id", labelled=True),
        dataset("held", "id_val", labelled=True),
        dataset("val", "ood_val"),
        dataset("production", "unlabelled"),
    ]
    for entry in raw["datasets"]:
        entry["limit"] = {"train": 400, "id": 100, "id_val": 100}.get(entry["role"], 64)
    few = {"samples": 64, "class_samples": 10}
    changed = {
        "adascale": {"samples": 50},
        "featurenorm": {"samples": 64},
        "grood": few,
        "grood_norm": few,
        "knn": {"k": 5},
        "selectednorm": {"samples": 64},
    }
    raw["detectors"] = [
        *({name: changed.get(name)} for name in detectors.names() if name != "mcdropout"),
        {"react_dice": {"method": "msp", "steps": ["react", {"dice": {"p": 10}}]}},
        {"grood_noise": {"method": "grood", "prototype": "noise", "samples": 100}},
        {"grood_val": {"method": "grood", "prototype": "ood_val"}},
        {"gradnorm_fc": {"method": "gradnorm", "layers": ["fc"]}},
    ]
    return raw


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., schema.Config]:
    """Load a raw config with a workspace of the test's own, or one given by URI."""

    def loaded(raw: dict[str, Any], workspace: str = "workspace") -> schema.Config:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        place = workspace if "://" in workspace else tmp_path / workspace
        return loading.load(str(path), [f"workspace={place}"])

    return loaded


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures in reports: drawing takes most of the time of one."""
    from pipeline.results.report import plots

    for name in ("histograms", "roc", "norm_ratio"):
        monkeypatch.setattr(plots, name, lambda *_: bytes(16) + (2).to_bytes(4, "big"))


@pytest.fixture
def execute(undrawn: None) -> Callable[..., run.Outcome]:
    """Run an evaluation with the engine in this process, or the one that is named, without output.

    Its report has no pictures; tests/results and the whole command have.
    """
    from rich.console import Console

    from pipeline.cli.progress import Display
    from pipeline.workflows import run

    def executed(loaded: schema.Config, **options: Any) -> run.Outcome:
        chosen = options if "engine" in options else {"engine": "inline", "threads": 1, **options}
        return run.execute(loaded, run.Options(**chosen), Display(Console(quiet=True)))

    return executed
