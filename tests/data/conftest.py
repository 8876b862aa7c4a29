"""Datasets as manifests, in a folder of the test's own; the same images in every layout"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import Dataset
from pipeline.data.fetch import fetch
from pipeline.data.manifest import Manifest, compile_manifest

Compile = Callable[..., Manifest]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, float], None]:
    """Has a function of one argument, of a module, wait so many seconds at each call, as for a server."""

    def slow(module: Any, name: str, seconds: float) -> None:
        near = getattr(module, name)

        def waiting(place: str) -> Any:
            time.sleep(seconds)
            return near(place)

        monkeypatch.setattr(module, name, waiting)

    return slow


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Compile a dataset given by its format, path and whatever differs from an unlabelled one named `set`."""

    def compiled(kind: str, path: Path | str, role: str = "far_ood", **fields: Any) -> Manifest:
        dataset = Dataset(**{"name": "set", "role": role, "format": kind, "path": str(path)} | fields)
        return compile_manifest(dataset, tmp_path / "manifests")

    return compiled


@pytest.fixture
def pixels() -> Callable[[Manifest], np.ndarray]:
    """All images of a manifest of raw pixels, as one array."""

    def stacked(manifest: Manifest) -> np.ndarray:
        rows = manifest.read(0, manifest.rows).to_pylist()
        return np.stack([np.frombuffer(row["bytes"], np.uint8).reshape(row["shape"]) for row in rows])

    return stacked


@pytest.fixture(params=[(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)], ids=["grey", "one-channel", "colour"])
def images(request: pytest.FixtureRequest) -> np.ndarray:
    """Five random images, in every shape that is allowed."""
    return np.random.default_rng(0).integers(256, size=request.param, dtype=np.uint8)


def png(value: int | np.ndarray = 0) -> bytes:
    """An image file: of one grey value, or of the pixels given."""
    pixels = value if isinstance(value, np.ndarray) else np.full((4, 4), value, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(name="png")
def encoded() -> Callable[..., bytes]:
    """Makes an image file."""
    return png


@pytest.fixture
def contents() -> Callable[[Manifest], list[Any]]:
    """What `fetch` gives for every row of a manifest: bytes, or the name of an exception."""

    def fetched(manifest: Manifest) -> list[Any]:
        found = fetch(manifest.read(0, manifest.rows))
        return [item if isinstance(item, bytes) else type(item).__name__ for item in found]

    return fetched


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar with some members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(name="write_tar")
def tar_writer() -> Callable[[Path, dict[str, bytes]], Path]:
    """Writes a tar."""
    return write_tar


LABELS = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
"""Of the images in every layout."""


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """The same ten real images in every layout below one folder, and the fields of each dataset.

    Paths are relative to the folder. The image with number `n` is the n-th row of each manifest and has the
    number in its key.
    """
    from tests.conftest import ARRAYS

    root = tmp_path_factory.mktemp("layouts")
    with np.load(ARRAYS) as arrays:
        pixels = arrays["id_test_x"][: len(LABELS)]
    names = [f"class {label}/{number}.PNG" for number, label in enumerate(LABELS)]
    files = [png(image) for image in pixels]
    for name, file in zip(names, files, strict=True):
        (root / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tree" / name).write_bytes(file)
    lines = list(zip(names, LABELS, strict=True))
    (root / "lists").mkdir()
    (root / "lists/a.txt").write_text("".join(f"{name} {label}\n" for name, label in lines))
    (root / "lists/a.csv").write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in lines))
    samples = [
        {f"a/{number}.png": file, f"a/{number}.cls": str(label).encode()}
        for number, (file, label) in enumerate(zip(files, LABELS, strict=True))
    ]
    for shard, some in enumerate((samples[:6], samples[6:])):
        members = {name: content for sample in some for name, content in sample.items()}
        write_tar(root / "tars" / f"s-{shard}.tar", members)
    images = [{"bytes": file, "path": f"{number}.png"} for number, file in enumerate(files)]
    (root / "hub/data").mkdir(parents=True)
    for part, rows in enumerate((slice(0, 7), slice(7, 10))):
        table = pa.table({"image": images[rows], "label": LABELS[rows]})
        pq.write_table(table, root / f"hub/data/test-{part}.parquet", row_group_size=3)
    np.savez(root / "a.npz", x=pixels, y=LABELS)
    idx = struct.pack(">BBBBIII", 0, 0, 8, 3, *pixels.shape) + pixels.tobytes()
    (root / "images.gz").write_bytes(gzip.compress(idx))
    (root / "labels.idx").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, len(LABELS)) + bytes(LABELS))
    return root, {
        "imagefolder": {"format": "imagefolder", "path": "tree"},
        "imagelist": {"format": "imagelist", "path": "lists/a.txt", "root": "tree"},
        "csv": {"format": "imagelist", "path": "lists/a.csv", "root": "tree"},
        "webdataset": {"format": "webdataset", "path": "tars/s-*.tar"},
        "parquet": {"format": "parquet", "path": "hub"},
        "npz": {"format": "npz", "path": "a.npz", "images": "x", "labels": "y"},
        "idx": {"format": "idx", "path": "images.gz", "labels": "labels.idx"},
    }


@pytest.fixture
def upload(endpoint: str) -> Iterator[Callable[[Path, str], str]]:
    """Copies a file or folder to the local S3 and gives its URI; the bucket is empty again afterwards."""
    client = boto3.client("s3")

    def uploaded(source: Path, name: str) -> str:
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file():
                key = Path(name, path.relative_to(source)).as_posix()
                client.put_object(Bucket="data", Key=key, Body=path.read_bytes())
        return f"s3://data/{name}"

    yield uploaded
    for found in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=found["Key"])


@pytest.fixture(params=["local", "s3"])
def places(
    request: pytest.FixtureRequest, layouts: tuple[Path, dict[str, dict[str, str]]], tmp_path: Path
) -> dict[str, dict[str, str]]:
    """The fields of the dataset in every layout, on the local disk and on S3."""
    folder, fields = layouts
    if request.param == "s3":
        base = request.getfixturevalue("upload")(folder, "some sets")
    else:
        base = str(shutil.copytree(folder, tmp_path / "some sets"))

    def placed(kind: str, name: str, value: str) -> str:
        is_path = name in ("path", "root") or (name, kind) == ("labels", "idx")
        return f"{base}/{value}" if is_path else value

    return {
        layout: {name: placed(given["format"], name, value) for name, value in given.items()}
        for layout, given in fields.items()
    }
