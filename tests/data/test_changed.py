"""Files that are replaced between listing and reading: refused by name, and never kept under the old one."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import Dataset
from pipeline.data.fetch import fetch
from pipeline.data.manifest import compile_manifest
from pipeline.workspace import files, storage


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(path)


def folder(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    place = tmp_path / "images"
    place.mkdir()
    for number in range(3):
        picture(place / f"{number}.png", number)
    return {"format": "imagefolder", "path": str(place)}, place / "1.png"


def archive(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    _, image = folder(tmp_path)
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for each in sorted(image.parent.iterdir()):
            tar.add(each, each.name)
    return {"format": "webdataset", "path": str(path.parent)}, path


def table(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    _, image = folder(tmp_path)
    path = tmp_path / "rows" / "0.parquet"
    path.parent.mkdir()
    contents = [each.read_bytes() for each in sorted(image.parent.iterdir())]
    pq.write_table(pa.table({"image": contents}), path)
    return {"format": "parquet", "path": str(path.parent)}, path


@pytest.mark.parametrize("make", [folder, archive, table])
def test_a_file_that_was_changed_after_it_was_listed_is_refused(
    tmp_path: Path, make: Callable[[Path], tuple[dict[str, Any], Path]]
) -> None:
    where, path = make(tmp_path)
    manifest = compile_manifest(Dataset(name="x", role="far_ood", **where), tmp_path / "manifests")
    rows = manifest.read(0, manifest.rows)
    assert all(isinstance(content, bytes) for content in fetch(rows))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(storage.Changed, match=rf"^{path} was changed after it was listed\. Run again"):
        list(fetch(rows))


def test_an_object_that_was_replaced_is_refused(tmp_path: Path, bucket: str) -> None:
    _, image = folder(tmp_path)
    place = files.at(bucket) / "images"
    for each in image.parent.iterdir():
        files.put(Path(shutil.copy(each, tmp_path / each.name)), place / each.name)
    data = Dataset(name="x", role="far_ood", format="imagefolder", path=str(place))
    rows = compile_manifest(data, tmp_path / "manifests").read(0, 3)
    assert all(isinstance(content, bytes) for content in fetch(rows))
    Image.new("L", (99, 99)).save(tmp_path / "other.png")
    files.put(tmp_path / "other.png", place / "1.png")
    with pytest.raises(storage.Changed, match=r"1\.png.* was changed after it was listed"):
        list(fetch(rows))
