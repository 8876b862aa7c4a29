"""Paths and URIs; what needs a server is tested with the dataset formats."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.workspace import storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "b#1%20?.txt").write_bytes(b"0123456789")
    (folder / "gone").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("uri", [False, True], ids=["path", "uri"])
def test_a_local_folder_is_listed_and_read_by_path_or_uri(folder: Path, uri: bool) -> None:
    found = storage.entries(folder.as_uri() if uri else str(folder))
    assert [(entry.name, entry.folder) for entry in found] == [
        ("b#1%20?.txt", False),
        ("gone", False),
        ("sub", True),
    ]
    assert found[1].identity == "missing"
    text = found[0]
    assert storage.read(text.uri) == b"0123456789"
    assert storage.read(text.uri, 3, 4) == b"3456"
    with storage.open_input(text.uri) as file:
        assert file.read() == b"0123456789"
    assert storage.find(text.uri) == text
    for times in (1, 2):  # of several files beside each other the folder is looked up once
        uris = [entry.uri for entry in found for _ in range(times)]
        assert storage.local_identities(uris) == [entry.identity for entry in found for _ in range(times)]
        nowhere = [text.uri + "x", "a\0b", "/no/x", "/no/y", "a\0/x", "a\0/y", "x", "y"]
        assert storage.local_identities(nowhere * times) == [storage.MISSING] * 8 * times
    assert storage.find(text.uri + "x") is None
    with pytest.raises(EOFError, match="2 bytes too early"):
        storage.read(text.uri, 8, 4)


@pytest.mark.parametrize(
    ("folder", "name", "path"),
    [
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "./a b#.png", "/data/a b#.png"),
        ("/data", "/other/a.png", "/other/a.png"),
        ("/data", "a//b/./../c.png", "/data/a/b/../c.png"),
        ("/data", "a/b/", "/data/a/b"),
        ("/data", "a/.", "/data/a"),
        ("/data", "///a.png", "/a.png"),
        ("/", "./a.png", "/a.png"),
        ("data", "./a.png", "data/a.png"),
        ("/data", "a/b\udcff.png", "file:///data/a/b%FF.png"),
        ("/data", "a\udcff/b.png", "file:///data/a%FF/b.png"),
        ("s3://bucket/data/", "./a/b c?.png", "s3://bucket/data/a/b%20c%3F.png"),
        ("s3://bucket", "/a.png", "s3://bucket/a.png"),
        ("s3://b/x?endpoint_override=h:1", "a.png", "s3://b/x/a.png?endpoint_override=h:1"),
    ],
)
def test_names_are_joined_to_folders(folder: str, name: str, path: str) -> None:
    assert storage.join(folder, name) == path


def test_the_folder_and_the_name_of_a_path() -> None:
    assert storage.parent("/data/a/b.png") == "/data/a"
    assert storage.parent("s3://b/x/a.png?endpoint_override=h:1") == "s3://b/x?endpoint_override=h:1"
    assert storage.name_of("/data/a b.png") == "a b.png"
    assert storage.is_remote("s3://a/b")
    assert not storage.is_remote("/a/b")
    assert not storage.is_remote("file:///a/b")


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="must not hold credentials") as caught:
        storage.read("s3://key:secret@bucket/a")
    assert "secret" not in str(caught.value)


def test_an_unknown_kind_of_storage_is_refused() -> None:
    with pytest.raises(UserError, match=r"foo://bucket: cannot use this storage: .*[Uu]nrecognized"):
        storage.read("foo://bucket/a")


def test_calls_run_ahead_in_order_and_no_further_than_asked() -> None:
    started: list[int] = []
    together = threading.Barrier(3, timeout=10)

    def call(number: int) -> int:
        started.append(number)
        if number < 3:
            together.wait()
        return number * number

    results = storage.ahead(call, range(100), 3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert max(started) <= 8
    results.close()
    assert list(storage.ahead(call, [], 3)) == []


def test_more_folders_are_listed_at_once_than_pyarrow_has_threads_for_unless_the_user_says_how_many(
    monkeypatch,
) -> None:
    given: list[int] = []
    monkeypatch.setattr(pa, "io_thread_count", lambda: 8)
    monkeypatch.setattr(pa, "set_io_thread_count", given.append)
    monkeypatch.setenv("ARROW_IO_THREADS", "8")
    storage._system.__wrapped__("mock", "", "")
    assert given == []
    monkeypatch.delenv("ARROW_IO_THREADS")
    storage._system.__wrapped__("mock", "", "")
    assert given == [storage.LISTINGS]
