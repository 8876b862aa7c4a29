"""Tar files of samples: members `x.jpg` (or another image) with `x.cls` or `x.json`, one after the other.

The archives are never unpacked: a row says where in its tar the image lies. Compressed tars are refused,
because their members cannot be read on their own. A tar that was cut off gives the samples before the cut,
and for what was cut one row that fails: it is counted like any unreadable image.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.decode import EXTENSIONS
from pipeline.data.formats import _files
from pipeline.data.notes import Notes
from pipeline.errors import UserError
from pipeline.workspace import storage
from pipeline.workspace.storage import Entry

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
THREADS = 8
"""Remote tars that are listed at once."""


def read(dataset: Dataset, notes: Notes) -> Iterator[pa.RecordBatch]:
    """One row per sample with an image, in the order of the tars; keys are `<tar>/<sample>`."""
    shards = _files.sources(dataset, (".tar", *COMPRESSED), notes.files)
    for name, _ in shards:
        if name.lower().endswith(COMPRESSED):
            raise UserError(
                f"datasets.{dataset.name}.path: {name} is compressed, so that its members cannot be read on "
                "their own. Decompress it to a .tar."
            )
    if storage.is_remote(shards[0][1].uri):
        for batches in storage.ahead(partial(_listed, dataset), shards, THREADS):
            yield from batches
    else:
        for shard in shards:
            yield from _files.batched(_rows(dataset, *shard))


def _listed(dataset: Dataset, shard: tuple[str, Entry]) -> list[pa.RecordBatch]:
    return list(_files.batched(_rows(dataset, *shard)))


def _rows(dataset: Dataset, name: str, shard: Entry) -> Iterator[dict[str, Any]]:
    """Rows of one tar."""
    name, labelled = _files.spelled(name), labels.needed(dataset)
    where, prefix = f"datasets.{dataset.name}.path: {name}", name.removesuffix(".tar")
    with storage.open_input(shard.uri) as stream:
        tar, lost = _Tar(stream, where), False
        for sample, grouped in groupby(tar.members(), key=lambda member: _split(member)[0]):
            members = list(grouped)  # reads one member ahead, so `tar.cut` is known for the last sample
            whole = all(map(tar.holds, members))
            label = _label(dataset, stream, members, where) if labelled and whole else labels.of(None, where)
            lost = tar.cut and not (whole and (label["label"] >= 0 or not labelled))
            for image in members:
                if _split(image)[1] in EXTENSIONS:
                    bad = lost or not image.isreg()
                    place = (
                        {} if bad else {"uri": shard.uri, "offset": image.offset_data, "length": image.size}
                    )
                    key = f"{prefix}/{_files.spelled(sample)}"
                    yield {"key": key, "identity": shard.identity, **label, **place}
        if tar.cut and not lost:
            key = f"{prefix}/(cut off at byte {tar.size})"
            yield {"key": key, "identity": shard.identity, **labels.of(None, where)}


class _Tar:
    """The members of a tar up to its end or to where it was cut off."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self.stream, self.where = stream, where
        self.size = stream.seek(0, io.SEEK_END)
        self.cut = False
        stream.seek(0)

    def holds(self, member: tarfile.TarInfo) -> bool:
        """Whether all bytes of a member are there."""
        return member.offset_data + member.size <= self.size

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Files in order, without hidden ones; sets `cut` when the archive lacks its end.

        Raises:
            UserError: where a header should be there is something else, or a member's path leads out.
        """
        end, reason = 0, ""
        try:
            with tarfile.open(fileobj=self.stream, mode="r:") as archive:
                while end <= self.size and (member := archive.next()) is not None:
                    end = archive.offset
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        raise UserError(
                            f"{self.where}: the member {member.name!r} lies outside of the archive. Pack it "
                            "again with relative paths."
                        )
                    if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
                        yield member
        except tarfile.ReadError as error:
            reason = f" ({error})"
        exhausted = self.stream.tell() >= self.size
        self.stream.seek(end)
        block = self.stream.read(tarfile.BLOCKSIZE)
        self.cut = end > 0 and (len(block) < tarfile.BLOCKSIZE or (bool(reason) and exhausted))
        if not self.cut and any(block or b"\1"):
            raise UserError(f"{self.where}: no tar header at byte {end}{reason}. Is it a tar, and undamaged?")


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Sample and ending of a member: `a/b.seg.PNG` is `a/b` and `.seg.png`."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, ending = name.partition(".")
    return folder + slash + stem, dot + ending.lower()


def _label(dataset: Dataset, stream: BinaryIO, members: list[tarfile.TarInfo], where: str) -> dict[str, Any]:
    """The columns `label` and `accepted` of a sample."""
    for member in members:
        ending, where_ = _split(member)[1], f"{where}, member {_files.spelled(member.name)}"
        if ending == ".cls" and dataset.labels is None:
            return labels.of(_text(stream, member).strip(), where_)
        if ending == ".json":
            found = _json(dataset, _text(stream, member), where_)
            if found is not None:
                return labels.of(found, where_)
    return labels.of(None, where)


def _json(dataset: Dataset, text: str, where: str) -> Any:
    """The label in a .json member; None if there is none and none was asked for by name."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}.") from None
    key = dataset.labels or "label"
    if isinstance(values, dict) and key in values:
        return values[key]
    if dataset.labels is None:
        return None
    keys = ", ".join(values) if isinstance(values, dict) else "none"
    raise UserError(
        f"{where}: no key {key!r}; there are: {keys}. Name one with datasets.{dataset.name}.labels."
    )


def _text(stream: BinaryIO, member: tarfile.TarInfo) -> str:
    stream.seek(member.offset_data)
    return stream.read(member.size).decode("utf-8", "replace")
