"""Images that are in two datasets are told before the numbers, found without reading one again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import Config, DetectorEntry
from pipeline.errors import UserError
from pipeline.results.evaluation import Evaluation
from pipeline.stages import shards
from pipeline.stages.prepare import prepare
from pipeline.workspace import artifacts

Execute = Callable[..., Any]


@pytest.fixture
def shared(settings: dict[str, Any], images: Path, load: Callable[..., Config], tmp_path: Path) -> Config:
    """4 training images among the animals, one of them twice, and an ID test image among the textures.

    An image that is among both is no mistake.
    """
    with np.load(images) as arrays:
        changed = dict(arrays)
    changed |= {name: changed[name][:150] for name in ("train_x", "train_y")}
    changed["animals_x"] = np.concatenate([changed["train_x"][[7, 7, 8, 9, 10]], changed["animals_x"][:60]])
    changed["textures_x"] = np.concatenate(
        [changed["textures_x"][:60], changed["test_x"][[3]], changed["animals_x"][[30]]]
    )
    np.savez(tmp_path / "images.npz", **changed)
    for entry in settings["datasets"]:
        entry["path"] = str(tmp_path / "images.npz")
    settings["detectors"] = ["msp"]
    return load(settings)


def test_images_in_two_datasets_are_counted_named_and_told(shared: Config, execute: Execute) -> None:
    outcome = execute(shared)
    animals, textures = outcome.cautions
    assert animals.startswith(
        "5 of 65 images of animals (near_ood) are also in train (train), the same bytes ("
    )
    assert animals.endswith(
        "(animals_x/00000000, animals_x/00000001, animals_x/00000002, ...). Take them out of one of the two."
    )
    assert textures.startswith("1 of 62 images of textures (far_ood) are also in test (id), the same bytes (")
    record = Evaluation(outcome.folder).record
    assert record["warnings"] == [animals, textures]
    counts = [(each["dataset"], each["other"], each["images"]) for each in record["duplicates"]["shared"]]
    assert counts == [("animals", "train", 5), ("textures", "test", 1)]
    assert animals in (outcome.folder / "report" / "index.html").read_text()

    train = prepare(shared).jobs["train"]
    damaged = train.artifact.folder / shards.DIGESTS / "part-00001.parquet"
    before, features = damaged.read_bytes(), (train.artifact.folder / "part-00001.parquet").stat().st_mtime_ns
    damaged.write_bytes(before[:-1])
    again = execute(shared)
    assert damaged.read_bytes() == before  # it alone is made again
    assert (train.artifact.folder / "part-00001.parquet").stat().st_mtime_ns == features
    assert again.cautions == outcome.cautions

    metrics = (outcome.folder / "metrics.parquet").read_bytes()
    for job in prepare(shared).jobs.values():  # as features of an earlier version are
        shutil.move(job.artifact.folder / shards.DIGESTS, job.artifact.folder.with_suffix(".digests"))
    older = Evaluation(execute(shared).folder).record
    assert older["duplicates"] == {"shared": [], "unknown": ["train", "test", "animals", "textures"]}
    assert older["warnings"] == []
    for job in prepare(shared).jobs.values():
        shutil.move(job.artifact.folder.with_suffix(".digests"), job.artifact.folder / shards.DIGESTS)
    assert execute(shared).cautions == outcome.cautions
    assert (outcome.folder / "metrics.parquet").read_bytes() == metrics


def test_digests_of_an_interrupted_extraction_are_those_of_a_whole_one(
    shared: Config, execute: Execute
) -> None:
    execute(shared, last="extract")
    job = prepare(shared).jobs["test"]
    folder = job.artifact.folder / shards.DIGESTS
    written = {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}
    assert len(written) == 3
    artifacts.remove(folder / "part-00002.parquet")
    (folder / artifacts.RECORD).unlink()
    assert not job.complete
    with pytest.raises(UserError, match="extract: not done for test"):
        execute(shared, first="fit")
    execute(shared, last="extract")
    assert {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")} == written
    assert job.complete


def test_features_of_an_earlier_version_need_no_digests(shared: Config, execute: Execute) -> None:
    """Neither when an extra column is added to them, nor when their extraction goes on."""
    execute(shared, last="extract")
    job = prepare(shared).jobs["test"]
    folder, features = job.artifact.folder, job.artifact.folder / "part-00002.parquet"
    shutil.rmtree(folder / shards.DIGESTS)
    entry = DetectorEntry(label="odin", method="odin")
    more = shared.model_copy(update={"detectors": (*shared.detectors, entry)})
    execute(more, last="extract")
    assert not (folder / shards.DIGESTS).exists()

    artifacts.remove(features)
    (folder / artifacts.RECORD).unlink()
    before = (folder / "part-00000.parquet").stat().st_mtime_ns
    execute(shared, last="extract")
    assert features.exists() and not (folder / shards.DIGESTS).exists()
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == before
    assert job.complete
