"""The format of a path, where its name or what lies in it tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import Dataset
from pipeline.data.guess import guessed
from pipeline.data.manifest import compile_manifest
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.tar"], "webdataset"),
        (["a.parquet", "README"], "parquet"),
        (["a.jpg", "a.parquet"], "imagefolder"),
        (["dogs/a.jpg", "b.tar"], "imagefolder"),
        ([], "imagefolder"),
    ],
)
def test_a_folder_is_what_lies_in_it(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert guessed(str(tmp_path), "--format") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.TAR", "webdataset"),
        ("a.tar.gz", "webdataset"),
        ("a.parquet", "parquet"),
        ("a.npz", "npz"),
        ("t10k-images-idx3-ubyte.gz", "idx"),
        ("list.txt", "imagelist"),
        ("list.csv", "imagelist"),
        ("photo.JPEG", "image"),
    ],
)
def test_a_file_is_what_its_name_says(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).touch()
    assert guessed(str(tmp_path / name), "--format") == expected


def test_several_files_are_what_their_ending_says(tmp_path: Path) -> None:
    assert guessed(f"{tmp_path}/part-{{000..012}}.tar", "--format") == "webdataset"
    assert guessed(f"{tmp_path}/*.parquet", "--format") == "parquet"


def test_what_is_not_plain_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(UserError, match=r"cannot be told from its name\. Give --format: idx, image, "):
        guessed(str(tmp_path / "a.bin"), "--format")
    with pytest.raises(UserError, match="no such file or folder"):
        guessed(str(tmp_path / "gone"), "--format")


def test_one_image_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"image")
    one = Dataset(name="one", role="unlabelled", format="image", path=str(tmp_path / "a b.png"))
    found = compile_manifest(one, tmp_path / "manifests")
    assert found.read(0, 1).select(["key", "uri", "label"]).to_pylist() == [
        {"key": "a b.png", "uri": str(tmp_path / "a b.png"), "label": -1}
    ]
    with pytest.raises(UserError, match=r"datasets\.one\.path: no such file"):
        compile_manifest(one.model_copy(update={"path": str(tmp_path)}), tmp_path / "manifests")
