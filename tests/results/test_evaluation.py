"""Two runs on the same images are compared row by row, and on other images not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.errors import UserError
from pipeline.results.evaluation import Evaluation, other_data
from pipeline.stages.shards import DIGESTS
from pipeline.workspace.runs import workspace_of
from tests.results.test_report import Setup, make_run
from tests.stored import stored


def run(folder: Path, name: str, setup: Setup) -> Evaluation:
    """A run in the workspace `folder`, of weights that are called like it."""
    made = make_run(folder / "runs" / name, setup)
    (made / "config.yaml").write_text(yaml.safe_dump({"seed": len(name), "model": {"weights": name}}))
    record = json.loads((made / "manifest.json").read_text())
    record["model"]["weights_digest"] = name
    (made / "manifest.json").write_text(json.dumps(record))
    return Evaluation(made.rename(made.parent / name))


def listed(made: Evaluation, stamp: str, image: bytes = b"tin") -> Evaluation:
    """The same with another listing of `tin`, as of copied files, and the bytes of its images."""
    record = json.loads((made.folder / "manifest.json").read_text())
    entry = record["datasets"]["tin"]
    entry["digest"] = stamp * 64
    (made.folder / "manifest.json").write_text(json.dumps(record))
    keys = [f"{n}.png" for n in range(entry["rows"])]
    workspace = workspace_of(made.folder)
    listing = workspace / "manifests" / f"tin-{stamp * 16}"
    listing.mkdir(parents=True)
    labels = pa.array([-1] * len(keys), pa.int32())
    accepted = pa.array([None] * len(keys), pa.list_(pa.int32()))
    pq.write_table(pa.table({"key": keys, "label": labels, "accepted": accepted}), listing / "rows.parquet")
    digests = pa.array([image.ljust(16)] * len(keys), pa.binary(16))
    folder = workspace / "features" / f"tin-{entry['hash']}" / DIGESTS
    stored(folder, [pa.table({"key": keys, "digest": digests})])
    return made


def test_detectors_of_two_runs_are_compared_on_the_same_images(tmp_path: Path) -> None:
    setup = Setup(shift={"grood": 0.5, "knn": 2.0})
    first = run(tmp_path, "first", setup)
    second = run(tmp_path, "second", replace(setup, shift={"grood": 2.0, "knn": 2.0}))
    found = {
        (row["detector"], row["other"], row["dataset"]): row
        for row in first.against(second).to_pylist()
        if row["metric"] == "auroc"
    }
    assert len(found) == 6 * 4  # pairs of four detectors, on two datasets and two groups
    better = found["first/grood", "second/grood", "near_ood"]
    assert better["difference"] < 0
    assert better["p_holm"] < 0.01
    assert found["first/knn", "second/knn", "tin"]["p_value"] == 1  # the same scores
    assert found["first/knn", "second/knn", "tin"]["group"] == "near_ood"


def test_runs_on_other_images_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path, "first", Setup())
    with pytest.raises(
        UserError, match=r"other images in cifar10_test \(100\) than in the first run \(120\)"
    ):
        first.against(run(tmp_path, "second", Setup(rows=100)))
    with pytest.raises(UserError, match="nothing to compare"):
        first.against(first)
    assert len(first.against(run(tmp_path, "fourth", Setup(ood={"tin": "near_ood"})))) > 0  # in common
    third = run(tmp_path, "third", Setup())
    record = third.record
    for name in ("tin", "svhn"):
        record["datasets"][name]["role"] = "unlabelled"
    (Path(third.folder) / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="nothing to compare"):
        first.against(Evaluation(third.folder))


def test_copied_files_are_the_same_images_where_their_digests_are_known(tmp_path: Path) -> None:
    first = listed(run(tmp_path / "w1", "first", Setup()), "a")
    assert other_data(first, listed(run(tmp_path / "w2", "copied", Setup()), "b")) == ""
    other = listed(run(tmp_path / "w3", "other", Setup()), "c", b"other")
    assert other_data(first, other) == "other images in tin (120) than in the first run (120)"
    unknown = listed(run(tmp_path / "w4", "unknown", Setup()), "d")
    shutil.rmtree(workspace_of(unknown.folder) / "features")
    assert other_data(first, unknown).startswith("another listing of tin than in the first run (keys, ")
