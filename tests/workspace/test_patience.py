"""What is asked for again and what is not, through a proxy that fails before a local S3."""

from __future__ import annotations

import errno
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.data.fetch import fetch
from pipeline.data.manifest import SCHEMA
from pipeline.errors import UserError
from pipeline.workspace import claims, files, patience, storage, tables
from pipeline.workspace.patience import Unavailable
from tests import faults
from tests.faults import Proxy

CONTENT = bytes(range(256)) * 6_000


@pytest.fixture
def proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the local S3; clients ask once, and patience is short."""
    monkeypatch.setattr(storage, "TRIES", 1)
    monkeypatch.setattr(patience, "WAIT", 0.01)
    with faults.proxy(endpoint) as proxy:
        yield proxy


@pytest.fixture
def filled(bucket: str, proxy: Proxy) -> Callable[[str], str]:
    """Makes a folder with a file and a table, and gives its URI through the proxy."""

    def filled(name: str) -> str:
        folder = files.at(proxy.before(bucket)) / name
        proxy.plan = faults.good
        with files.atomic(folder / "a") as draft:
            draft.write_bytes(CONTENT)
        tables.write_table(folder / "rows.parquet", pa.table({"row": [b"%d" % row for row in range(5000)]}))
        proxy.asked.clear()
        proxy.done.clear()
        return str(folder)

    return filled


def at(folder: str, name: str = "a") -> str:
    return storage.join(folder, name)


def listed(folder: str, scratch: Path) -> Any:
    return [(entry.name, entry.size) for entry in storage.entries(folder)]


def streamed(folder: str, scratch: Path) -> Any:
    with storage.open_input(at(folder)) as file:
        parts = [file.read(1000)]
        file.seek(-5, 2)
        parts.append(file.read())
        file.seek(2**20)
        return [*parts, file.read()]


def uploaded(folder: str, scratch: Path) -> Any:
    (scratch / "b").write_bytes(CONTENT[::-1])
    storage.upload(scratch / "b", at(folder, "b"))
    return storage.read(at(folder, "b")) == CONTENT[::-1]


def downloaded(folder: str, scratch: Path) -> Any:
    storage.download(at(folder), scratch / "a")
    return (scratch / "a").read_bytes()


def removed(folder: str, scratch: Path) -> Any:
    storage.remove(at(folder))
    return listed(folder, scratch)


def folder_removed(folder: str, scratch: Path) -> Any:
    storage.remove_folder(folder)
    return storage.find(at(folder))


def unchanged(folder: str, scratch: Path) -> Any:
    found = storage.find(at(folder))
    assert found is not None
    storage.require_unchanged(at(folder), found.identity)
    return storage.read(at(folder), 5, 3, found.identity)


OPERATIONS: list[Callable[[str, Path], Any]] = [
    lambda folder, _: storage.read(at(folder)),
    lambda folder, _: tables.read_rows(at(folder, "rows.parquet"), 2000, 4000).to_pydict(),
    *(listed, streamed, uploaded, downloaded, removed, folder_removed, unchanged),
]
NAMES = ["read", "rows", *(operation.__name__ for operation in OPERATIONS[2:])]


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_an_operation_survives_what_passes(
    operation: Callable[[str, Path], Any], filled: Callable[[str], str], proxy: Proxy, tmp_path: Path
) -> None:
    expected = operation(filled("good"), tmp_path)
    for fault in faults.FAULTS:
        folder = filled(fault)
        proxy.plan = faults.once(fault)
        assert operation(folder, tmp_path) == expected, fault
        assert proxy.done[fault]


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_an_operation_gives_up_what_does_not_pass(
    operation: Callable[[str, Path], Any],
    filled: Callable[[str], str],
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = filled("down")
    proxy.plan = faults.always("slow down")
    with pytest.raises(
        Unavailable, match=r"^s3://bucket-.* cannot be reached: .*AWS Error.*is kept: run"
    ) as caught:
        operation(folder, tmp_path)
    assert proxy.done["slow down"] == patience.ATTEMPTS
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(Unavailable):
        operation(folder, tmp_path)
    assert proxy.done["slow down"] == patience.ATTEMPTS + 1  # it was given up a moment ago
    proxy.plan = faults.good
    operation(folder, tmp_path)


def test_a_reader_goes_on_where_a_connection_broke(filled: Callable[[str], str], proxy: Proxy) -> None:
    with storage.Reader(at(filled("read"))) as file:
        for number, fault in enumerate(faults.FAULTS):
            proxy.asked.clear()
            proxy.plan = faults.once(fault)
            file.seek(100 + number * 1000)
            assert file.read(2**20) == CONTENT[file.tell() - 2**20 : file.tell()]
            assert proxy.done[fault] == 1


def test_silence_is_not_waited_out(
    filled: Callable[[str], str], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SILENCE", 1.0)
    storage._system.cache_clear()
    folder = filled("silent")
    proxy.plan = faults.once("hang")
    assert storage.find(at(folder)) is not None
    assert proxy.done == {"hang": 1, "good": 1}


def test_a_sequence_of_attempts_is_one_line_of_the_log(
    filled: Callable[[str], str], proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    folder = filled("log")
    proxy.plan = lambda method, path, before: "error" if before < 4 else None
    with caplog.at_level(logging.WARNING, patience.__name__):
        assert storage.find(at(folder)) is not None
    (line,) = caplog.messages
    assert line.startswith(f"{at(folder)}: ")
    assert line.endswith("HTTP status 500) during HeadObject operation: No response body; it is asked again")


@pytest.mark.parametrize("missing", ["bucket", "file"])
def test_an_answer_is_an_answer(
    filled: Callable[[str], str], proxy: Proxy, tmp_path: Path, missing: str
) -> None:
    folder = filled("answer")
    gone = at(folder, "none") if missing == "file" else at(folder).replace("bucket-", "no-bucket-", 1)
    proxy.done.clear()
    with pytest.raises(FileNotFoundError):
        storage.read(gone)
    with pytest.raises(FileNotFoundError):
        storage.remove(gone)
    with pytest.raises(FileNotFoundError):
        storage.download(gone, tmp_path / "none")
    assert storage.find(gone) is None
    assert proxy.done["good"] <= 5


def test_images_of_a_store_that_is_down_are_no_bad_images(filled: Callable[[str], str], proxy: Proxy) -> None:
    folder = filled("images")
    found = {name: storage.find(at(folder, name)) for name in ("a", "rows.parquet")}
    rows = [
        {"uri": at(folder), "identity": found["a"].identity},
        {"uri": at(folder, "none"), "identity": ""},
    ]
    column = {"uri": at(folder, "rows.parquet"), "column": "row", "offset": 3}
    table = [{**column, "identity": f"{found['rows.parquet'].identity}#row"}]
    proxy.plan = faults.once("lost")
    good, missing = fetch(pa.Table.from_pylist(rows, SCHEMA))
    assert (good, type(missing)) == (CONTENT, FileNotFoundError)
    assert list(fetch(pa.Table.from_pylist(table, SCHEMA))) == [b"3"]
    proxy.plan = faults.always("lost")
    for each in (rows, table):
        with pytest.raises(Unavailable, match=r"cannot be reached: .*NETWORK_CONNECTION"):
            list(fetch(pa.Table.from_pylist(each, SCHEMA)))


def test_a_local_disk_of_a_network_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAIT", 0.01)
    (tmp_path / "a").write_bytes(b"text")
    row = pa.Table.from_pylist([{"uri": str(tmp_path / "a"), "identity": None}], SCHEMA)
    left, opened = 3, Path.open

    def stale(self: Path, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", stale)
    assert list(fetch(row)) == [b"text"]
    left = 100
    with pytest.raises(Unavailable, match=r"/a cannot be reached: Stale file handle\. Look at"):
        list(fetch(row))


def test_claims_survive_what_passes(filled: Callable[[str], str], proxy: Proxy) -> None:
    workspace = files.at(filled("claims"))
    for fault in faults.FAULTS:
        proxy.plan = lambda method, path, before, fault=fault: None if before % 2 else fault
        with claims.opened(workspace) as first, claims.opened(workspace) as second:
            assert first.kind.take("fits/a"), fault
            assert not first.kind.take("fits/a")
            assert not second.kind.take("fits/a")
            assert second.kind.busy()
            first.kind.give("fits/a")
            assert second.kind.take("fits/a"), fault


def test_a_store_that_goes_down_takes_no_claims_and_keeps_nobody(
    filled: Callable[[str], str], proxy: Proxy
) -> None:
    workspace = files.at(filled("claims"))
    with claims.opened(workspace) as ours:

        def make(names: set[str]) -> None:
            proxy.plan = faults.always("drop")
            storage.read(str(workspace / "a"))

        with pytest.raises(Unavailable, match=r"/a\?.* cannot be reached"):
            ours.share(lambda: {f"fits/{number}" for number in range(40)}, make)
        assert proxy.done["drop"] < 60  # each of them was to be given back, once
    with pytest.raises(Unavailable, match="cannot be reached"), claims.opened(workspace):
        pass


@pytest.mark.parametrize(
    "error",
    [
        "When listing objects under key 'd/': AWS Error SLOW_DOWN during ListObjectsV2 operation: x",
        "AWS Error SERVICE_UNAVAILABLE during GetObject operation: ",
        "AWS Error INTERNAL_FAILURE during GetObject operation: Try later",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 429) during GetObject operation: Unable to parse ExceptionName",
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached",
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of PerformWork()",
        "Generic S3 error: Error performing PUT http://h/b - Server returned non-2xx status code: 503",
        "Generic S3 error: Error getting list response body: HTTP error: request or response body error",
        ValueError("I/O operation on closed file"),
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_what_may_pass_is_told_from_what_stays(error: str | Exception) -> None:
    assert patience.is_transient(OSError(error) if isinstance(error, str) else error)


@pytest.mark.parametrize(
    "error",
    [
        "When reading information for key 'd/x': AWS Error ACCESS_DENIED during HeadObject operation",
        "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: It does not exist",
        "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 501) during PutObject operation: Not implemented",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate or SSH",
        "google::cloud::Status(PERMISSION_DENIED: no access)",
        "Generic S3 error: Error performing PUT http://h/b - Server returned non-2xx status code: 400",
        FileNotFoundError(errno.ENOENT, "Path does not exist 'b/HTTP status 503'"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ENOSPC, "No space left on device"),
        UserError("AWS Error SLOW_DOWN during GetObject operation"),
        storage.Changed("s3://b/a"),
        EOFError("the file ends 2 bytes too early"),
    ],
)
def test_what_stays_is_told_from_what_may_pass(error: str | Exception) -> None:
    assert not patience.is_transient(OSError(error) if isinstance(error, str) else error)


def test_attempts_end_after_a_minute_and_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr(time, "sleep", waits.append)

    def busy() -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    with pytest.raises(Unavailable, match=r"^hdfs://host/a cannot be reached: Connection refused\."):
        patience.insist("hdfs://user:secret@host/a", busy)
    assert len(waits) == patience.ATTEMPTS - 2
    longest = [patience.WAIT * 2**number for number in range(len(waits))]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert sum(longest) < patience.SECONDS / 1.5
