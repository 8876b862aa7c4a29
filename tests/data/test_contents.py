"""Images known by their bytes: copies are the same dataset, and what was read once is not read again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Dataset
from pipeline.data import contents, manifest
from pipeline.data.fetch import fetch
from pipeline.data.manifest import Manifest, compile_manifest
from pipeline.workspace import storage
from tests.data.test_changed import archive, folder, table


def compiled(where: dict[str, Any], tmp_path: Path, **fields: Any) -> Manifest:
    data = Dataset(name="x", role="far_ood", **{"identity": "content", **where, **fields})
    return compile_manifest(data, tmp_path / "manifests")


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a moment ago count as old ones."""
    monkeypatch.setattr(contents, "SETTLED", -1.0)


@pytest.mark.parametrize("make", [folder, archive, table])
def test_a_copy_is_the_same_dataset(
    tmp_path: Path, make: Callable[[Path], tuple[dict[str, Any], Path]]
) -> None:
    where, path = make(tmp_path)
    first = compiled(where, tmp_path)
    copied = shutil.copytree(where["path"], tmp_path / "copied", copy_function=shutil.copyfile)
    second = compiled({**where, "path": str(copied)}, tmp_path)
    assert (second.digest, second.path) == (first.digest, first.path)
    assert second.digest != compiled(where, tmp_path, identity="stat").digest
    rows = second.read(0, second.rows)
    shas = [hashlib.sha256(content).hexdigest() for content in fetch(rows)]
    assert rows["identity"].to_pylist() == [f"sha256-{sha}" for sha in shas]
    assert {Path(uri).parent for uri in rows["uri"].to_pylist()} == {Path(copied)}
    os.utime(path)
    assert compiled(where, tmp_path).digest == first.digest


def test_what_was_read_once_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, path = folder(tmp_path)
    first = compiled(where, tmp_path)
    asked: list[str] = []

    def seen(rows: Any, limit: int) -> Any:
        asked.extend(rows["uri"].to_pylist())
        return fetch(rows, limit)

    monkeypatch.setattr(contents, "fetch", seen)
    assert compiled(where, tmp_path).digest == first.digest
    assert asked == []
    old = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # nothing but its bytes is another
    assert compiled(where, tmp_path).digest != first.digest
    assert asked == [str(path)]
    contents.forget(tmp_path / "contents" / "x")
    compiled(where, tmp_path)
    (known,) = (tmp_path / "contents" / "x").iterdir()
    content = bytearray(known.read_bytes())
    content[content.index(hashlib.sha256(path.with_name("0.png").read_bytes()).digest()[:8])] ^= 1
    known.write_bytes(bytes(content))
    del asked[:]
    assert compiled(where, tmp_path).rows == 3  # what is damaged is not believed
    assert len(asked) == 3


def test_a_listing_that_was_interrupted_goes_on_and_young_files_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = folder(tmp_path)
    monkeypatch.setattr(contents, "PIECE", 1)
    monkeypatch.setattr(manifest, "ROW_GROUP", 1)
    asked: list[str] = []

    def dying(rows: Any, limit: int) -> Any:
        asked.extend(rows["uri"].to_pylist())
        if len(asked) == 2:
            raise ConnectionAbortedError
        return fetch(rows, limit)

    monkeypatch.setattr(contents, "fetch", dying)
    with pytest.raises(ConnectionAbortedError):
        compiled(where, tmp_path)
    assert compiled(where, tmp_path).rows == 3
    assert [Path(uri).name for uri in asked] == ["0.png", "1.png", "1.png", "2.png"]
    monkeypatch.setattr(contents, "SETTLED", 1e6)
    contents.forget(tmp_path / "contents" / "x")
    for _ in range(2):
        compiled(where, tmp_path)
    assert len(asked) == 4 + 6


def test_files_that_cannot_be_read_are_rows_and_inline_images_need_no_file(tmp_path: Path) -> None:
    _, path = folder(tmp_path)
    (path.parent / "list.txt").write_text("0.png 0\nlost.png 0\n")
    found = compiled({"format": "imagelist", "path": str(path.parent / "list.txt")}, tmp_path)
    first, lost = found.read(0, 2)["identity"].to_pylist()
    assert first.startswith("sha256-") and lost == "missing"


@pytest.mark.parametrize("make", [folder, archive, table])
def test_bytes_that_were_changed_after_they_were_listed_are_refused(
    tmp_path: Path, make: Callable[[Path], tuple[dict[str, Any], Path]]
) -> None:
    where, path = make(tmp_path)
    found = compiled(where, tmp_path)
    rows = found.read(0, found.rows)
    os.utime(path)
    images = list(fetch(rows))
    assert all(isinstance(content, bytes) for content in images)
    stored = bytearray(path.read_bytes())
    stored[stored.index(images[1][20:60]) + 30] ^= 1  # one bit of one image
    path.write_bytes(stored)
    with pytest.raises(storage.Changed, match=rf"^{path} was changed after it was listed"):
        list(fetch(rows))
    path.unlink()
    with pytest.raises(storage.Changed, match=rf"^{path} was changed after it was listed"):
        list(fetch(rows))
