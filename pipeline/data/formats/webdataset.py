"""Tar files of samples: members `x.jpg` (or another image) with `x.cls` or `x.json`, one after the other.

The archives are never unpacked: a row says where in its tar the image lies. Compressed tars are refused,
because their members cannot be read on their own. A tar that was cut off gives the samples before the cut,
and for what was cut one row that fails: it is counted like any unreadable image.

As everywhere in WebDataset, a sample's name ends at its first dot: `x.input.png` is the member `input.png` of
the sample `x`, and is read where `images` says so. Members that are neither images nor labels are counted.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.config.schema import Dataset
from pipeline.data import labels
from pipeline.data.decode import EXTENSIONS
from pipeline.data.formats import _files
from pipeline.data.formats._files import Source
from pipeline.data.notes import Notes
from pipeline.errors import UserError
from pipeline.workspace import storage

PLACE = "file or folder"

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
THREADS = 8
"""Remote tars that are listed at once."""
LABEL_BYTES = 2**26
"""Larger .cls and .json members are no labels."""
LABELS = (".cls", ".json")
_DOTTED = (
    "a sample's name ends at its first dot: rename members such as {}, or say which are the images, as in \
images: input.png"
)


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
        for batches, own in storage.ahead(partial(_listed, dataset), shards, THREADS):
            notes.add(own)
            yield from batches
    else:
        for shard in shards:
            yield from _files.batched(_rows(dataset, notes, *shard))


def _listed(dataset: Dataset, shard: tuple[str, Source]) -> tuple[list[pa.RecordBatch], Notes]:
    notes = Notes()
    return list(_files.batched(_rows(dataset, notes, *shard))), notes


def _rows(dataset: Dataset, notes: Notes, name: str, shard: Source) -> Iterator[dict[str, Any]]:
    """Rows of one tar."""
    name, labelled = _files.spelled(name), labels.read(dataset)
    where, prefix = f"datasets.{dataset.name}.path: {name}", name.removesuffix(".tar")
    with storage.open_input(shard.uri) as stream:
        tar, lost, apart = _Tar(stream, where), False, _Apart(where)
        known = _counted(tar.members(), dataset, notes)
        for sample, grouped in groupby(known, key=lambda member: _split(member)[0]):
            members = list(grouped)  # reads one member ahead, so `tar.cut` is known for the last sample
            whole = all(map(tar.holds, members))
            label = _label(dataset, stream, members, where) if labelled and whole else labels.of(None, where)
            lost = tar.cut and not (whole and (label["label"] >= 0 or not labelled))
            images = [member for member in members if _is_image(member, dataset)]
            if labelled:
                apart.require_together(sample, bool(images), len(images) < len(members))
            for image in images:
                bad = lost or not image.isreg()
                place = {} if bad else {"uri": shard.uri, "offset": image.offset_data, "length": image.size}
                key = f"{prefix}/{_files.spelled(sample)}"
                yield {"key": key, "identity": shard.identity, **label, **place}
        if tar.cut and not lost:
            key = f"{prefix}/(cut off at byte {tar.size})"
            yield {"key": key, "identity": shard.identity, **labels.of(None, where)}


def _counted(members: Iterator[tarfile.TarInfo], dataset: Dataset, notes: Notes) -> Iterator[tarfile.TarInfo]:
    """The images and labels among members; the others are counted."""
    for member in members:
        ending = _split(member)[1]
        if _is_image(member, dataset) or ending in LABELS:
            notes.members.read()
            yield member
            continue
        last, name = ending[ending.rfind(".") :], _files.spelled(member.name)
        hidden = member.name.rpartition("/")[2].startswith(".")
        dotted = last != ending and last in (*EXTENSIONS, *LABELS) and not hidden
        notes.members.leave_out(name, f"{last} after a second dot" if dotted else None)
        if dotted and dataset.images is None and not notes.said:
            notes.said.append(_DOTTED.format(name))


def _is_image(member: tarfile.TarInfo, dataset: Dataset) -> bool:
    ending = _split(member)[1]
    return ending in EXTENSIONS if dataset.images is None else ending == f".{dataset.images.lower()}"


class _Apart:
    """Samples whose image and label do not follow each other."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.images, self.labels = set[str](), set[str]()
        """Samples that had only the one or the other."""

    def require_together(self, sample: str, image: bool, label: bool) -> None:
        """Refuse a sample that comes twice, once with its image and once with its label.

        Raises:
            UserError: it does.
        """
        if image != label:
            (self.images if image else self.labels).add(sample)
            if sample in (self.labels if image else self.images):
                raise UserError(
                    f"{self.where}: image and label of the sample {_files.spelled(sample)!r} do not follow "
                    "each other, as they must. Pack the archive sorted: tar --sort=name -cf new.tar FOLDER"
                )


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

    def read(self, size: int = -1) -> bytes:
        """Bytes of the archive, for `tarfile`: however many a header promises, no more than there are."""
        left = max(self.size - self.stream.tell(), 0)
        return self.stream.read(left if size < 0 else min(size, left))

    def tell(self) -> int:
        """Where it is read next."""
        return self.stream.tell()

    def seek(self, offset: int) -> int:
        """Read there next."""
        return self.stream.seek(offset)

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Files in order; sets `cut` when the archive lacks its end.

        Raises:
            UserError: where a header should be there is something else, or a member's path leads out.
        """
        end, reason = 0, ""
        try:
            with tarfile.open(fileobj=cast(Any, self), mode="r:") as archive:
                while end <= self.size and (member := archive.next()) is not None:
                    if member.size < 0 or archive.offset <= end:  # it would be read again and again
                        raise tarfile.ReadError(f"a member of {member.size} bytes")
                    end = archive.offset
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        raise UserError(
                            f"{self.where}: the member {member.name!r} lies outside of the archive. Pack it "
                            "again with relative paths."
                        )
                    if not member.isdir():
                        yield member
        except UserError:
            raise
        except (tarfile.TarError, ValueError, OverflowError) as error:
            reason = f" ({error})"
        exhausted = self.stream.tell() >= self.size
        self.stream.seek(min(end, self.size))
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
            return labels.of(_text(stream, member, where_).strip(), where_)
        if ending == ".json":
            found = _json(dataset, _text(stream, member, where_), where_)
            if found is not None:
                return labels.of(found, where_)
    return labels.of(None, where)


def _json(dataset: Dataset, text: str, where: str) -> Any:
    """The label in a .json member; None if there is none and none was asked for by name."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON, or nested too deeply: {error}.") from None
    key = dataset.labels or "label"
    if isinstance(values, dict) and key in values:
        return values[key]
    if dataset.labels is None:
        return None
    keys = ", ".join(values) if isinstance(values, dict) else "none"
    raise UserError(
        f"{where}: no key {key!r}; there are: {keys}. Name one with datasets.{dataset.name}.labels."
    )


def _text(stream: BinaryIO, member: tarfile.TarInfo, where: str) -> str:
    if member.size > LABEL_BYTES:
        raise UserError(f"{where}: {member.size:,} bytes are no label. Leave them out of the archive.")
    stream.seek(member.offset_data)
    return stream.read(member.size).decode("utf-8", "replace")
