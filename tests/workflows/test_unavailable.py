"""Whole evaluations over a store that fails now and then, and over one that goes down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from PIL import Image

from pipeline.config import schema
from pipeline.workspace import artifacts, claims, files, patience, storage, tables
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable
from tests import faults
from tests.faults import Fault, Plan, Proxy

SETS = {"train": 3, "test": 1, "animals": 8}
"""Images of each class."""


@pytest.fixture(scope="module")
def pictures(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of each set as files, those with labels in folders of their classes."""
    root = tmp_path_factory.mktemp("pictures")
    with np.load(images) as arrays:
        for name, count in SETS.items():
            pixels = arrays[f"{name}_x"]
            labels = arrays[f"{name}_y"] if f"{name}_y" in arrays else np.zeros(len(pixels), int)
            for label in np.unique(labels):
                folder = root / name / str(label)
                folder.mkdir(parents=True)
                for number in np.flatnonzero(labels == label)[:count]:
                    Image.fromarray(pixels[number]).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the local S3; clients ask once, and patience is short."""
    monkeypatch.setattr(storage, "TRIES", 1)
    monkeypatch.setattr(patience, "WAIT", 0.01)
    monkeypatch.setattr(claims, "SILENCE", -1.0)  # nobody else lives
    with faults.proxy(endpoint) as proxy:
        yield proxy


@pytest.fixture
def stored(pictures: Path, bucket: str, proxy: Proxy) -> str:
    """URI of the images in the store, through the proxy."""
    client, name = boto3.client("s3"), bucket.removeprefix("s3://").partition("?")[0]
    for file in sorted(pictures.rglob("*.png")):
        key = f"images/{file.relative_to(pictures).as_posix()}"
        client.put_object(Bucket=name, Key=key, Body=file.read_bytes())
    return proxy.before(bucket)


def over(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """The small evaluation on the images of a folder."""
    settings["datasets"] = [dataset for dataset in settings["datasets"] if dataset["name"] in SETS]
    for dataset in settings["datasets"]:
        for field in ("images", "labels"):
            dataset.pop(field, None)
        dataset |= {"format": "imagefolder", "path": storage.join(folder, dataset["name"])}
    settings["extract"] |= {"batch_size": 16, "shard_rows": 16}
    return settings


def results(folder: Place) -> dict[str, Any]:
    """Bytes of the metrics, and the scores of all rows."""
    found: dict[str, Any] = {"metrics": (folder / "metrics.json").read_bytes()}
    for name in ("test", "animals"):
        table = tables.Table.open(folder / "scores" / name)
        read = table.read(0, table.rows, ["key", "label", "prediction", "msp", "knn"])
        found[name] = {column: values.tolist() for column, values in read.items()}
    return found


def errors(workspace: Place) -> int:
    """Rows of errors in all parts of features."""
    folders = (workspace / "features").glob("*")
    receipts = [artifacts.receipt_of(part) for folder in folders for part in folder.glob("part-*")]
    return sum(file.facts["errors"] for file in receipts if file is not None)


def torn(workspace: Place) -> list[Place]:
    """Artifacts that look complete and are not."""
    folders = [folder for kind in ("features", "fits") for folder in (workspace / kind).glob("*")]
    found = []
    for folder in folders:
        sizes = {entry.name: entry.size for entry in storage.entries(str(folder))}
        if artifacts.RECORD in sizes:
            record = artifacts.read_record(folder)
            found += [folder for name, file in record.files.items() if sizes.get(name) != file.size]
    return found


@pytest.fixture
def expected(
    settings: dict[str, Any], pictures: Path, load: Callable[..., schema.Config], execute: Callable[..., Any]
) -> dict[str, Any]:
    """Results of a run over local files."""
    return results(execute(load(over(settings, str(pictures))), last="evaluate").folder)


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_changes_nothing(
    settings: dict[str, Any],
    load: Callable[..., schema.Config],
    execute: Callable[..., Any],
    expected: dict[str, Any],
    stored: str,
    proxy: Proxy,
) -> None:
    workspace = files.at(stored) / "workspace"
    proxy.plan = faults.some(0.05, seed=7)
    folder = execute(
        load(over(settings, str(files.at(stored) / "images")), str(workspace)), last="evaluate"
    ).folder
    proxy.plan = faults.good
    assert min(proxy.done[fault] for fault in faults.FAULTS) > 0
    assert results(folder) == expected
    assert errors(workspace) == 0


ALL = ("/features/train-", "/images/animals/", "/features/test-", "/fits/", "/scores/", "/metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "places"),
    [
        ("drop", ALL),
        ("slow down", ALL),
        ("cut", ALL),
    ],
)
def test_a_store_that_goes_down_is_one_message_and_the_next_run_goes_on(
    settings: dict[str, Any],
    load: Callable[..., schema.Config],
    execute: Callable[..., Any],
    expected: dict[str, Any],
    stored: str,
    proxy: Proxy,
    fault: Fault,
    places: tuple[str, ...],
) -> None:
    workspace = files.at(stored) / "workspace"
    loaded = load(over(settings, str(files.at(stored) / "images")), str(workspace))
    for where in places:
        proxy.plan = down(where, fault)
        with pytest.raises(Unavailable, match=r"^s3://bucket-.* cannot be reached: .*AWS Error"):
            execute(loaded, last="evaluate")
        proxy.plan = faults.good
        assert errors(workspace) == 0
        assert not torn(workspace)
    folder = execute(loaded, last="evaluate").folder
    assert results(folder) == expected
    assert errors(workspace) == 0


def down(where: str, fault: Fault) -> Plan:
    """A store that goes down when something is asked for, and does not come up again."""
    over = False

    def plan(method: str, path: str, before: int) -> Fault | None:
        nonlocal over
        over = over or where in path.partition("?")[0]
        return fault if over else None

    return plan
