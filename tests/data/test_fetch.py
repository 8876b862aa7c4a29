"""Whatever lies where an image should be costs one row, at once, and no more memory than was allowed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.fetch import fetch
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError

Compile = Callable[..., Manifest]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


def terminal(path: Path) -> None:
    path.symlink_to("/dev/stdin")


SPECIAL = [pipe, bound, device, link_to_a_pipe, terminal]


@pytest.mark.parametrize("make", SPECIAL)
def test_what_is_no_regular_file_is_not_opened_and_costs_one_row(
    compiled: Compile, tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, make
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    make(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "b.png").write_bytes(png(1))
    manifest = compiled("imagefolder", tmp_path / "set")
    special, image = fetch(manifest.read(0, 2))
    assert isinstance(special, OSError)
    assert special.strerror == "not a regular file but a pipe, device or socket"
    assert image == png(1)


@pytest.mark.parametrize("kind", ["imagelist", "npz", "idx", "parquet", "webdataset"])
def test_a_dataset_that_is_no_regular_file_is_one_message(
    compiled: Compile, tmp_path: Path, kind: str
) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(
        UserError, match=r"datasets\.set\.path: cannot read .*a: not a regular file but a pipe"
    ):
        compiled(kind, tmp_path / "a")


def test_an_image_of_more_bytes_than_allowed_is_not_read(compiled: Compile, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(bytes(100))
    with (tmp_path / "set" / "b.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    manifest = compiled("imagefolder", tmp_path / "set")
    assert [type(content).__name__ for content in fetch(manifest.read(0, 2))] == ["bytes", "TooLarge"]
    assert [str(content) for content in fetch(manifest.read(0, 1), limit=99)] == [
        "100 bytes, more than the 99 that are read"
    ]


def test_values_and_members_of_more_bytes_than_allowed_are_not_read(
    compiled: Compile, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    pq.write_table(pa.table({"image": [bytes(10), bytes(100), bytes(20)]}), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", {"1.png": bytes(10), "2.png": bytes(100), "3.png": bytes(20)})
    for kind, name in (("parquet", "a.parquet"), ("webdataset", "a.tar")):
        rows = compiled(kind, tmp_path / name).read(0, 3)
        assert [type(content).__name__ for content in fetch(rows, 50)] == ["bytes", "TooLarge", "bytes"]


def test_an_image_that_is_too_large_to_read_stays_known_by_its_file(
    compiled: Compile, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    with (tmp_path / "set" / "b.png").open("wb") as file:
        file.truncate(2**40)
    (row,) = compiled("imagefolder", tmp_path / "set", identity="content").read(0, 1).to_pylist()
    assert row["identity"].startswith(f"{2**40}-")
