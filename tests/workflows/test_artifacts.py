"""What a workspace keeps between runs: what is made again, what is shared, and what damage does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from PIL import Image

from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.stages import extract, shards
from pipeline.stages.index import FILE
from pipeline.workspace import storage
from pipeline.workspace.artifacts import RECORD, Artifact, read_record, write
from tests.damage import DAMAGES
from tests.stored import newest

FILES = {
    "features": "features/test-*/part-00000.parquet",
    "features of training images": "features/train-*/part-00001.parquet",
    "answers of the network": "features/test-*/probe.safetensors",
    "column": "features/animals-*/*/part-00000.parquet",
    "statistic": ("statistic ", "arrays.safetensors"),
    "pass": ("noise pass ", "arrays.safetensors"),
    "bank": ("bank ", "bank-00000.npy"),
    "index": ("index ", "index.faiss"),
    "detector": ("detector ", "scorer.json"),
    "arrays of a detector": ("detector ", "arrays.safetensors"),
    "scores": "scores/animals-*/dice-*/part-00000.parquet",
    "table of scores": "runs/small/*/scores/animals/part-00000.parquet",
    "metrics": "runs/small/*/metrics.parquet",
    "metrics for people": "runs/small/*/metrics.csv",
    "record of features": f"features/test-*/{RECORD}",
    "record of a statistic": ("statistic ", RECORD),
    "record of scores": f"scores/animals-*/dice-*/{RECORD}",
}
"""A file of each kind of artifact: a pattern, or the kind of a folder of fits and the name in it."""


def located(workspace: Path, what: str) -> Path:
    where = FILES[what]
    if isinstance(where, str):
        return sorted(workspace.glob(where))[0]
    kind, name = where
    folders = sorted(path for path in workspace.glob("fits/*") if read_record(path).kind.startswith(kind))
    return next(folder / name for folder in folders if (folder / name).is_file())


def kept(workspace: Path) -> dict[str, bytes]:
    """Every artifact's files and records, and the metrics."""
    folders = ("features", "fits", "scores", *(path / "scores" for path in workspace.glob("runs/small/*")))
    found = [path for folder in folders for path in (workspace / folder).rglob("*") if path.is_file()]
    found += workspace.glob("runs/small/*/metrics.*")
    return {str(path.relative_to(workspace)): path.read_bytes() for path in found}


def damaged(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


def forgotten(workspace: Path, but: list[Path]) -> None:
    """Delete what is made of features, but some, so that the next run reads all that it reads first."""
    for path in [
        *workspace.glob("fits/*"),
        *workspace.glob("scores/*/*"),
        *workspace.glob("runs/*/*/scores/*"),
    ]:
        if not any(path in one.parents for one in but):
            shutil.rmtree(path)
    if not any(newest(workspace) == one.parent for one in but):
        (newest(workspace) / RECORD).unlink()


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """The workspace of a finished evaluation, once there is one."""
    return {}


@pytest.fixture
def config(settings: dict[str, Any]) -> dict[str, Any]:
    for entry in settings["datasets"]:
        entry["limit"] = 300 if entry["role"] == "train" else 64
    settings["extract"] |= {"shard_rows": 128}
    settings["index"] = {"kind": "IVF4,Flat", "shards": 2}
    settings["detectors"] = [
        *("msp", "dice", "odin", "mahalanobis_ensemble"),
        {"grood": {"prototype": "noise", "samples": 40}},
        {"knn": {"k": 5}},
    ]
    return settings


@pytest.fixture
def copied(
    whole: dict[str, Path],
    config: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Config, Path, dict[str, bytes]]]:
    """The config, a copy of the workspace, and what was in it."""
    if not whole:
        folder = tmp_path_factory.mktemp("whole") / "workspace"
        execute(loading.load(str(_written(config, folder.parent)), [f"workspace={folder}"]))
        whole["workspace"] = folder
    loaded = load(config)
    workspace = Path(shutil.copytree(whole["workspace"], tmp_path / "workspace"))
    yield loaded, workspace, kept(workspace)


def _written(config: dict[str, Any], folder: Path) -> Path:
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("how", ["flipped", "torn", pytest.param("empty", marks=pytest.mark.slow), "deleted"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_damage_is_mended_by_the_next_run_and_never_another_number(
    copied: tuple[Config, Path, dict[str, bytes]],
    execute: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    how: str,
    group: int,
) -> None:
    loaded, workspace, before = copied
    paths = [located(workspace, what) for what in list(FILES)[group::3]]
    for path in paths:
        damaged(path, how)
    if how == "flipped" or group == 1:  # seen when a file is read; an index is read only to search
        forgotten(workspace, paths)
    execute(loaded)
    after = kept(workspace)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    for path in paths if how != "deleted" else ():
        assert str(path.parent) in caplog.text, path


def test_a_command_that_may_not_make_what_is_damaged_names_the_file_and_the_cure(
    copied: tuple[Config, Path, dict[str, bytes]], execute: Callable[..., Any]
) -> None:
    loaded, workspace, _ = copied
    path = located(workspace, "features of training images")
    damaged(path, "flipped")
    shutil.rmtree(workspace / "fits")
    with pytest.raises(UserError, match=rf"{path} is damaged: .*\. Run the whole evaluation again"):
        execute(loaded, first="fit", last="fit")
    assert path.is_file()


def test_fresh_makes_the_columns_beside_the_features_again_too(
    copied: tuple[Config, Path, dict[str, bytes]], execute: Callable[..., Any]
) -> None:
    loaded, workspace, before = copied
    times = {what: located(workspace, what).stat().st_mtime_ns for what in ("features", "column", "scores")}
    execute(loaded, fresh=True, last="score")
    assert all(located(workspace, what).stat().st_mtime_ns > time for what, time in times.items())
    after = kept(workspace)
    assert [name for name in before if before[name] != after[name]] == []


def _names(workspace: Path) -> set[str]:
    """Artifacts that are complete: kind, or method of scores, and folder."""
    fits = {
        (read_record(path.parent).kind.rpartition(" ")[0], path)
        for path in workspace.glob(f"fits/*/{RECORD}")
    }
    scores = {(path.parent.name.rpartition("-")[0], path) for path in workspace.glob(f"scores/*/*/{RECORD}")}
    columns = {("column", path) for path in workspace.glob(f"features/*/*/{RECORD}")}
    return {f"{kind} {path.parent}" for kind, path in fits | scores | columns}


CHANGES: dict[str, tuple[list[Any], set[str]]] = {
    "a detector that reads what is there": (["maxlogit"], {"detector", "maxlogit"}),
    "a parameter": ([{"dice2": {"method": "dice", "p": 30}}], {"detector", "dice"}),
    "k alone": ([{"knn9": {"method": "knn", "k": 9}}], {"detector", "knn"}),
    "a detector with a statistic of its own": (["vim"], {"statistic", "detector", "vim"}),
    "a detector with a pass of its own": (
        [{"grood2": {"method": "grood", "prototype": "noise", "samples": 60}}],
        {"noise pass", "bank", "index", "detector", "grood"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_change_needs_is_made(
    copied: tuple[Config, Path, dict[str, bytes]],
    config: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    more, expected = CHANGES[change]
    _, workspace, before = copied
    names = _names(workspace)
    monkeypatch.setattr(extract, "_execute", None)  # no image is forwarded
    config["detectors"] += more
    execute(load(config))
    made = _names(workspace) - names
    assert {name.rpartition(" ")[0] for name in made} == expected
    after = kept(workspace)
    artifacts = [name for name in before if not name.startswith("runs/")]
    assert all(after[name] == before[name] for name in artifacts)


@pytest.mark.parametrize("what", ["statistic", "pass"])
def test_what_was_learned_from_other_bytes_is_learned_again(
    copied: tuple[Config, Path, dict[str, bytes]], execute: Callable[..., Any], what: str
) -> None:
    loaded, workspace, before = copied
    folder = located(workspace, what).parent
    record = read_record(folder)
    artifact = Artifact(folder, record.kind, record.identity, record.inputs)
    arrays = artifact.arrays(record)
    artifact.keep(
        {
            name: np.nextafter(values, 1) if values.dtype.kind == "f" else values
            for name, values in arrays.items()
        }
    )
    execute(loaded)
    after = kept(workspace)
    changed = {name.split("/")[0] for name in before if after[name] != before[name]}
    assert {"fits", "scores"} <= changed
    assert read_record(folder).content != record.content  # it was taken as it is
    execute(loaded, first="fit", last="score")
    assert kept(workspace) == after


def test_scores_are_made_again_when_an_index_was_trained_to_other_bytes(
    copied: tuple[Config, Path, dict[str, bytes]], execute: Callable[..., Any]
) -> None:
    """As on another kind of machine: the same vectors, in other lists."""
    loaded, workspace, before = copied
    folder = located(workspace, "index").parent
    record = read_record(folder)
    trained = faiss.read_index(str(folder / "index.faiss"))
    assert isinstance(trained, faiss.IndexIVFFlat)
    vectors = trained.reconstruct_n(0, trained.ntotal)
    other = faiss.index_factory(trained.d, "IVF2,Flat")
    other.train(vectors)
    other.add(vectors)
    artifact = Artifact(folder, record.kind, record.identity, record.inputs)
    artifact.finish({FILE: write(folder / FILE, lambda path: faiss.write_index(other, str(path)))})
    with pytest.raises(UserError, match=r"is finished, but its scores of .* were made again since"):
        execute(loaded)
    after = kept(workspace)
    changed = [name for name in before if after[name] != before[name] and name.startswith("scores/")]
    assert changed
    assert all("/knn-" in name or "/grood-" in name for name in changed)


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(path)


def test_features_of_a_file_that_was_swapped_and_put_back_are_those_of_the_file(
    tmp_path: Path,
    settings: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "strange" / "1.png"
    path.parent.mkdir()
    for number in range(3):
        picture(path.with_name(f"{number}.png"), number)
    strange = {"name": "strange", "role": "far_ood", "format": "imagefolder", "path": str(path.parent)}
    settings["datasets"] = [*settings["datasets"][:2], strange]
    for entry in settings["datasets"][:2]:
        entry["limit"] = 100
    settings["detectors"] = ["msp"]
    expected = execute(load(settings, "undisturbed")).folder
    stat, content, missing = path.stat(), path.read_bytes(), shards.missing

    def swapping(*arguments: Any) -> Any:
        picture(path, 7)
        return missing(*arguments)

    with monkeypatch.context() as patch, pytest.raises(storage.Changed, match=rf"^{path} was changed"):
        patch.setattr(shards, "missing", swapping)
        execute(load(settings))
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = execute(load(settings)).folder
    assert (found / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
