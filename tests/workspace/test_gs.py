"""Images and workspaces on gs://, in a local server that stands in for Google's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from pipeline.config import schema
from pipeline.data.fetch import fetch
from pipeline.data.manifest import compile_manifest
from pipeline.errors import UserError
from pipeline.workspace import artifacts, claims, files, patience, storage, tables
from pipeline.workspace.files import Place
from tests.servers import answers, free_port, wait
from tests.stored import stored


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URI of a bucket."""
    host, port = "127.0.0.1", str(free_port())
    command = [str(Path(sys.executable).with_name("gcp-storage-emulator")), "start", "--in-memory"]
    process = subprocess.Popen(
        [*command, "--host", host, "--port", port, "--default-bucket", "data"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait("the server", lambda: answers(f"http://{host}:{port}/storage/v1/b"))
        yield f"gs://anonymous@data?endpoint_override={host}:{port}&scheme=http"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def folder(server: str) -> Place:
    return files.at(server) / uuid4().hex


def test_folders_without_objects_of_their_own_are_found(folder: Place, tmp_path: Path) -> None:
    for number, name in enumerate(("b/one.png", "a/two.png", "a/deep/three.png")):
        Image.new("L", (4, 4), number).save(tmp_path / "image.png")
        storage.upload(tmp_path / "image.png", storage.join(str(folder), name))
    assert [(entry.name, entry.folder) for entry in storage.entries(str(folder))] == [
        ("a", True),
        ("b", True),
    ]
    images = schema.Dataset(name="images", role="id", format="imagefolder", path=str(folder))
    manifest = compile_manifest(images, tmp_path / "manifests")
    rows = manifest.read(0, 3)
    assert rows["key"].to_pylist() == ["a/deep/three.png", "a/two.png", "b/one.png"]
    assert rows["label"].to_pylist() == [0, 0, 1]
    assert all(isinstance(content, bytes) and content.startswith(b"\x89PNG") for content in fetch(rows))


def test_files_of_a_workspace_are_written_read_and_removed(folder: Place) -> None:
    table = tables.arrow_columns({"row": np.arange(3000)})
    stored(folder / "features", [table])
    found = tables.Table.open(folder / "features").read(1000, 1005, ["row"])
    assert found["row"].tolist() == [1000, 1001, 1002, 1003, 1004]
    assert [path.name for path in folder.glob("*")] == ["features"]
    artifacts.remove_folder(folder / "features")
    artifacts.remove_folder(folder / "features")
    assert list(folder.glob("*")) == []
    (folder / "nothing").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").read_bytes()
    with pytest.raises(FileNotFoundError):
        storage.entries(str(folder))


def test_a_store_that_takes_no_claims_is_one_clear_error(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server here breaks the connection: it knows only one of Google's two interfaces."""
    monkeypatch.setattr(patience, "WAIT", 0.01)
    refusal = r"^gs://.* cannot be reached: Generic GCS error: Error performing PUT .*Look at the store"
    with pytest.raises(UserError, match=refusal), claims.opened(folder):
        raise AssertionError
