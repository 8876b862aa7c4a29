"""The same images in every layout, local and on S3: the same labels, the same features, keys one to one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import boto3
import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import schema
from pipeline.config.schema import Dataset
from pipeline.data.manifest import Manifest, compile_manifest
from pipeline.errors import UserError
from pipeline.network.classifier import load as load_classifier
from pipeline.stages import extract, shards
from pipeline.workspace import storage

LAYOUTS = ["imagefolder", "imagelist", "csv", "webdataset", "parquet", "npz", "idx"]
KEYS = {
    "imagefolder": "class 1/3.PNG",
    "imagelist": "class 1/3.PNG",
    "csv": "class 1/3.PNG",
    "webdataset": "s-0/a/3",
    "parquet": "3.png",
    "npz": "x/00000003",
    "idx": "images/00000003",
}


@pytest.fixture(scope="module")
def extracted() -> Callable[[Manifest], tuple[pa.Table, list[list[str]]]]:
    """Gives features and errors of a manifest, as a model actor makes them."""
    transform = {"crop": 28, "mean": [0.286], "std": [0.353], "channels": 1}
    name, weights = "pipeline.quickstart.resnet:build", "package://pipeline.quickstart/resnet.safetensors"
    chosen = schema.Model(source="factory", name=name, weights=weights, transform=transform)
    classifier, settings = load_classifier(chosen, 0), schema.Extract(batch_size=4)
    extractor = extract.Extractor(
        shards.Plan(chosen, settings, 0, classifier.digest, classifier.transform, classifier.probe), 1
    )

    def extracted(manifest: Manifest) -> tuple[pa.Table, list[list[str]]]:
        shard = shards.Shard("set", manifest.path, 0, manifest.rows, "")
        return extract.extract_rows(classifier, extractor._decode(shard), settings)[:2]

    return extracted


def test_features_and_labels_are_identical_and_keys_map_one_to_one(places, extracted, tmp_path) -> None:
    expected = None
    for layout in LAYOUTS:
        dataset = Dataset(name=layout, role="id", **places[layout])
        manifest = compile_manifest(dataset, tmp_path / "manifests")
        assert manifest.class_count == {0: 3, 1: 4, 2: 3}, layout
        features, errors = extracted(manifest)
        assert errors == [], layout
        keys = features["key"].to_pylist()
        assert keys[3] == KEYS[layout]
        assert [int(re.findall(r"\d+", key)[-1]) for key in keys] == list(range(10))
        expected = expected or features.drop_columns("key")
        assert features.drop_columns("key").equals(expected), layout


@pytest.mark.parametrize("layout", ["imagefolder", "imagelist", "csv", "webdataset", "parquet"])
def test_the_manifest_holds_no_image_bytes(places, layout, tmp_path) -> None:
    dataset = Dataset(name=layout, role="id", **places[layout])
    rows = compile_manifest(dataset, tmp_path / "manifests").read(0, 10)
    assert rows["bytes"].null_count == rows["shape"].null_count == 10
    assert rows["uri"].null_count == 0


@pytest.mark.parametrize("layout", ["imagefolder", "imagelist", "webdataset", "parquet"])
def test_a_dataset_that_did_not_change_keeps_its_digest(places, layout, tmp_path) -> None:
    dataset = Dataset(name=layout, role="id", **places[layout])
    first = compile_manifest(dataset, tmp_path / "manifests")
    assert compile_manifest(dataset, tmp_path / "manifests") == first


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("imagefolder", ["tree/class 0/1.PNG"]),
        ("imagelist", ["tree/class 0/1.PNG"]),
        ("webdataset", ["tars/s-0.tar"]),
        ("parquet", ["hub/data/test-0.parquet"]),
    ],
)
def test_files_that_disappear_before_extraction_are_counted_as_errors(
    layouts, extracted, tmp_path, layout, names
) -> None:
    folder, fields = layouts
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    paths = {
        name: str(tmp_path / fields[layout][name]) for name in ("path", "root") if name in fields[layout]
    }
    dataset = Dataset(name=layout, role="id", **{**fields[layout], **paths})
    manifest = compile_manifest(dataset, tmp_path / "manifests")
    for name in names:
        (tmp_path / name).unlink()
    features, errors = extracted(manifest)
    assert len(features) + len(errors) == 10
    assert len(errors) == {"webdataset": 6, "parquet": 7}.get(layout, 1)
    assert all(reason.startswith("there is no such file") for _, reason in errors)


def test_on_s3_the_listing_is_asked_for_folders_and_never_for_single_files(
    upload, layouts, compiled, monkeypatch
) -> None:
    folder, _ = layouts
    uri = upload(folder, "sets")
    asked: list[str] = []
    entries = storage.entries
    monkeypatch.setattr(storage, "entries", lambda path: asked.append(path) or entries(path))
    monkeypatch.setattr(storage, "find", lambda path: pytest.fail(f"asked for {path}"))
    compiled("imagelist", f"{uri}/lists/a.txt", role="id", root=f"{uri}/tree")
    assert sorted(asked) == [f"{uri}/tree/class%20{label}" for label in range(3)]


def test_images_on_s3_have_keys_with_any_character(upload, compiled, contents, tmp_path, png) -> None:
    names = ["a b#1.png", "c?d%20.png", "Größe/猫+&=.png", "e;f@g:.jpeg"]
    for value, name in enumerate(sorted(names)):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png(value))
    manifest = compiled("imagefolder", upload(tmp_path / "set", "any thing"))
    assert sorted(manifest.read(0, 4)["key"].to_pylist()) == sorted(names)
    found = dict(zip(manifest.read(0, 4)["key"].to_pylist(), contents(manifest), strict=True))
    assert found == {name: (tmp_path / "set" / name).read_bytes() for name in names}


def test_a_file_that_changed_on_s3_changes_the_digest(upload, compiled, tmp_path, png) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png(1))
    before = compiled("imagefolder", upload(tmp_path / "set", "one")).digest
    (tmp_path / "set/a.png").write_bytes(png(np.zeros((9, 9), np.uint8)))
    assert compiled("imagefolder", upload(tmp_path / "set", "one")).digest != before


def test_a_file_that_disappears_from_s3_fails_alone(upload, layouts, compiled, contents) -> None:
    folder, _ = layouts
    manifest = compiled("imagefolder", upload(folder / "tree", "tree"), role="id")
    client = boto3.client("s3")
    client.delete_object(Bucket="data", Key="tree/class 0/1.PNG")
    found = contents(manifest)
    assert found[1] == "FileNotFoundError"
    assert all(isinstance(item, bytes) for item in [found[0], *found[2:]])


def test_the_endpoint_may_stand_in_the_uri(
    upload, layouts, compiled, contents, endpoint, monkeypatch
) -> None:
    folder, _ = layouts
    uri = upload(folder / "tree", "tree")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    manifest = compiled("imagefolder", f"{uri}?endpoint_override={endpoint}&scheme=http", role="id")
    assert all(isinstance(item, bytes) for item in contents(manifest))


@pytest.mark.parametrize("kind", ["imagefolder", "imagelist", "webdataset", "parquet", "npz", "idx"])
@pytest.mark.parametrize("place", ["data/none", "none/none"], ids=["path", "bucket"])
def test_a_path_on_s3_that_is_not_there_is_refused(endpoint, compiled, kind, place) -> None:
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such (file|folder|file or folder): s3://"):
        compiled(kind, f"s3://{place}")
