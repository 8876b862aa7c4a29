"""A place behaves alike on the local disk and in an object store; the store is a local S3."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import S3Backend
from moto.s3.responses import S3Response
from safetensors import SafetensorError

from pipeline.errors import UserError
from pipeline.stages.faiss_shard import write
from pipeline.workspace import files, tables
from pipeline.workspace.files import Place


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder."""
    if request.param == "local":
        return tmp_path / "a folder"
    return files.at(request.getfixturevalue("bucket")) / "a folder"


def names(folder: Place) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_files_are_written_listed_read_and_deleted(folder: Place) -> None:
    assert not list(folder.glob("*"))
    file = folder / "b c#1%20?.json"
    files.write_json(file, {"text": "grün"})
    files.write_text(folder / "other.txt", "")
    assert files.read_json(file) == {"text": "grün"}
    assert [path.name for path in folder.glob("*.json")] == [file.name]
    assert list(folder.glob("*.json")) == [file]
    assert folder.is_dir()
    assert file.is_file()
    assert not folder.is_file()
    assert not file.is_dir()
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    assert names(folder) == ["other.txt"]
    files.remove_folder(folder)
    files.remove_folder(folder)
    assert not (folder / "other.txt").is_file()


def test_a_place_travels_as_text_and_by_pickle(folder: Place) -> None:
    assert files.at(str(folder)) == folder
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_a_file_uri_is_a_local_path() -> None:
    assert files.at("file:///data/a%20b") == Path("/data/a b")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder: Place) -> None:
    path = folder / "file.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="power cut"), files.atomic(path) as draft:
        draft.write_text("half")
        raise RuntimeError("power cut")
    assert files.read_json(path) == {"old": 1}
    assert names(folder) == ["file.json"]


def write_index(path: Path, rows: int) -> None:
    index = faiss.IndexFlatL2(2)
    index.add(np.zeros((rows, 2), np.float32))
    write(index, path)


def serialize(path: Path) -> None:
    """As safetensors fails, which does not write into a file that is there."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "fill",
    [
        lambda path: write_index(path, 9),
        lambda path: write_index(path, 100_000),
        serialize,
        lambda path: path.write_text("text"),
        lambda path: pq.write_table(pa.table({"x": [1]}), path),
    ],
)
def test_each_writer_that_meets_a_full_disk_ends_in_one_message(fill, tmp_path: Path) -> None:
    message = (
        rf"^cannot write (to )?{tmp_path}.*: no space left on the disk of {tmp_path}.*\. Free some space\. "
    )
    with pytest.raises(UserError, match=message), files.atomic(tmp_path / "file") as draft:
        draft.symlink_to("/dev/full")
        fill(draft)
    with pytest.raises(UserError, match=message), files.scratch(tmp_path) as folder:
        (folder / "file").symlink_to("/dev/full")
        fill(folder / "file")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_for_temporary_files_is_named(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(uri: str, path: Path) -> None:
        path.symlink_to("/dev/full")
        path.write_bytes(b"content")

    files.write_text(folder / "file", "content")
    monkeypatch.setattr(files.storage, "download", download)
    remote = files.Remote(str(folder / "file"))
    message = (
        rf"^cannot write a copy of .*: no space left on the disk of {tempfile.gettempdir()}.*Free some space"
    )
    with pytest.raises(UserError, match=message), files.local(remote):
        pass


@pytest.mark.parametrize("part", [1, 2, 3])
def test_an_upload_that_fails_leaves_what_was_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    upload_part, folder = S3Backend.upload_part, files.at(bucket)

    def refused(self: S3Backend, name: str, upload: str, number: int, content: bytes) -> object:
        if number == part:
            raise S3AccessDeniedError
        return upload_part(self, name, upload, number, content)

    files.write_text(folder / "old.bin", "old")
    monkeypatch.setattr(S3Backend, "upload_part", refused)
    for path in (folder / "old.bin", folder / "new.bin"):
        with (
            pytest.raises(UserError, match=r"cannot write .*ACCESS_DENIED.*credentials"),
            files.atomic(path) as draft,
        ):
            draft.write_bytes(bytes(25 * 2**20))
    assert names(folder) == ["old.bin"]
    assert (folder / "old.bin").read_bytes() == b"old"


def test_only_the_row_groups_asked_for_are_transferred(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.at(bucket) / "rows.parquet"
    columns = {"row": np.arange(20_480), "vector": np.random.default_rng(0).random((20_480, 64))}
    tables.write_table(path, tables.arrow_columns(columns))
    sent, answer = [], S3Response._handle_range_header

    def counted(*arguments: Any, **named: Any) -> Any:
        status, headers, content = answer(*arguments, **named)
        sent.append(len(content))
        return status, headers, content

    monkeypatch.setattr(S3Response, "_handle_range_header", counted)
    found = tables.read_rows(path, 5000, 5003, ["row"])
    assert found["row"].to_pylist() == [5000, 5001, 5002]
    assert 0 < sum(sent) < len(path.read_bytes()) / 10


def test_a_remote_file_is_a_local_copy_for_a_while(folder: Place) -> None:
    files.write_text(folder / "a.txt", "text")
    with files.local(folder / "a.txt") as file:
        assert file.read_text() == "text"
    assert file.exists() == isinstance(folder, Path)
    assert (folder / "a.txt").is_file()


def test_a_folder_is_replaced_as_a_whole(folder: Place) -> None:
    for written in (["old.png", "page.html"], ["b.png", "page.html", "z.png"]):
        with files.scratch(folder) as scratch:
            draft = scratch / "new"
            draft.mkdir()
            for name in written:
                (draft / name).write_text(str(written))
            files.replace_folder(draft, folder / "report", last="page.html")
        assert names(folder / "report") == written
        assert (folder / "report" / "page.html").read_text("utf-8") == str(written)
    assert names(folder) == ["report"]


def test_a_writable_folder_is_left_empty(folder: Place) -> None:
    files.require_writable(str(folder), "workspace")
    assert not names(folder)


def test_an_unwritable_folder_is_named_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workspace: cannot write to .*file/below: Not a directory"):
        files.require_writable(str(tmp_path / "file" / "below"), "workspace")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://key:secret@bucket/a", r"^workspace: s3://.* must not hold credentials"),
        ("foo://bucket/a", r"^workspace: foo://bucket: cannot use this storage"),
        ("mock:///a", r"^workspace: files at mock:///a can be seen before they are complete"),
    ],
)
def test_unusable_storage_is_refused(uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        files.require_writable(uri, "workspace")
    assert "secret" not in str(caught.value)


def test_a_missing_bucket_and_a_refusal_are_one_clear_error(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^workspace: cannot write to s3://no-bucket.*: .*NO_SUCH_BUCKET"):
        files.require_writable(bucket.replace("bucket-", "no-bucket-", 1), "workspace")

    def refused(*_: object, **__: object) -> None:
        raise S3AccessDeniedError

    monkeypatch.setattr(S3Backend, "create_multipart_upload", refused)
    with pytest.raises(UserError, match=r"^workspace: cannot write to s3://.*: .*ACCESS_DENIED"):
        files.require_writable(bucket, "workspace")
