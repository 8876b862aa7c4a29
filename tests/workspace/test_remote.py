"""Whole evaluations with the workspace in an object store, on a real local Ray and a local S3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import schema
from pipeline.data.manifest import compile_manifest
from pipeline.errors import UserError
from pipeline.results import verify
from pipeline.stages import prepare
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.files import Place

SCORED = ("test", "animals", "textures", "production")


@pytest.fixture
def raw(settings: dict[str, Any], images: Path) -> dict[str, Any]:
    """The small evaluation with statistics, extra columns, a trained index and flagged images."""
    production = {"name": "production", "role": "unlabelled", "format": "npz"}
    settings["datasets"].append({**production, "path": str(images), "images": "production_x"})
    for entry in settings["datasets"]:
        entry["limit"] = 256 if entry["role"] == "train" else 64
    settings["detectors"] = ["dice", "odin", {"knn": {"k": 5}}]
    settings["index"] = {"kind": "IVF4,Flat"}
    return settings


def scores(folder: Place) -> dict[str, dict[str, list[Any]]]:
    """Score columns by dataset."""
    found = {}
    for name in SCORED:
        table = tables.Table.open(folder / "scores" / name)
        with tables.parquet(table.parts()[0]) as file:
            found[name] = table.read(0, table.rows, file.schema_arrow.names)
    return {
        name: {key: values.tolist() for key, values in columns.items()} for name, columns in found.items()
    }


def features(workspace: str, dataset: str) -> Place:
    """Folder with the cached rows of a dataset."""
    (folder,) = (files.at(workspace) / "features").glob(f"{dataset}-*")
    return folder


def bad(folder: Place) -> set[str]:
    """What does not add up when the run is counted again."""
    return {finding.where for finding in verify.examine(folder) if not finding.good}


def forwarded(folder: Place) -> int:
    """Images that the last run forwarded."""
    return int(
        files.read_json(folder / "manifest.json")["executions"][-1]["stages"]["extract"]["forward_images"]
    )


def test_an_object_store_gives_the_results_of_a_folder_and_is_resumed_like_one(
    raw: dict[str, Any],
    load: Callable[..., schema.Config],
    execute: Callable[..., Any],
    bucket: str,
    ray_session: None,
) -> None:
    local = execute(load(raw), last="evaluate").folder
    workspace = str(files.at(bucket) / "a prefix")
    loaded = load(raw, workspace)
    execute(loaded, last="extract")
    execute(loaded, first="fit", last="score", engine="ray")
    remote = execute(loaded).folder
    assert str(remote / "report" / "index.html").startswith("s3://bucket-")
    assert (remote / "metrics.json").read_bytes() == (local / "metrics.json").read_bytes()
    assert scores(remote) == scores(local)
    assert (remote / "report" / "index.html").is_file()
    assert not (files.at(workspace) / ".owner.json").is_file()

    metrics = (remote / "metrics.json").read_bytes()
    parts = sorted(features(workspace, "train").glob("part-*"), key=str)
    parts[1].unlink()
    (features(workspace, "train") / artifacts.RECORD).unlink()
    (remote / "scores" / "animals" / tables.part_name(0)).unlink()
    for marker in (remote / "scores" / "animals" / artifacts.RECORD, remote / artifacts.RECORD):
        marker.unlink()
    assert bad(remote) == {"features/train", "scores/animals", "metrics", "run"}
    execute(loaded, last="evaluate")
    assert forwarded(remote) == 128
    assert (remote / "metrics.json").read_bytes() == metrics
    assert scores(remote) == scores(local)


def test_a_dataset_compiled_into_an_object_store_is_read_like_a_local_one(
    settings: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    dataset = schema.Dataset(**settings["datasets"][0])
    local, remote = (
        compile_manifest(dataset, folder / "manifests") for folder in (tmp_path, files.at(bucket))
    )
    assert remote.path.startswith("s3://")
    assert (remote.rows, remote.digest, remote.class_count) == (local.rows, local.digest, local.class_count)
    assert remote.read(100, 110) == local.read(100, 110)
    assert remote.take(np.array([499, 3])) == local.take(np.array([3, 499]))
    np.testing.assert_array_equal(remote.labels(), local.labels())


def test_a_missing_bucket_is_one_clear_error_before_any_work(
    settings: dict[str, Any], load: Callable[..., schema.Config], execute: Callable[..., Any], bucket: str
) -> None:
    missing = bucket.replace("bucket-", "no-bucket-", 1)
    with pytest.raises(UserError, match=r"^workspace: cannot write to s3://no-bucket-.*NO_SUCH_BUCKET"):
        execute(load(settings, missing))


def test_a_remote_workspace_cannot_hold_the_database_of_mlflow(
    settings: dict[str, Any], load: Callable[..., schema.Config], execute: Callable[..., Any], bucket: str
) -> None:
    message = r"^tracking\.uri: not set, and s3://.* cannot hold MLflow's database\. Name a server"
    with pytest.raises(UserError, match=message):
        execute(load(settings, bucket), publish="always")
    settings["tracking"] = {"enabled": True}
    with pytest.raises(UserError, match=message):
        prepare.prepare(load(settings, bucket))
