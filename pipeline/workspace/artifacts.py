"""What a workspace keeps: folders named by what their files were made of, complete when a record says so.

The record, `_manifest.json`, is written last and holds size and SHA-256 of every file. A file that is one of
many has a receipt beside it, written after it: what was killed goes on with the parts that have one.
docs/workspace.md tells the whole story.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipeline.errors import AGAIN, UserError
from pipeline.workspace import files, storage
from pipeline.workspace.claims import Claims
from pipeline.workspace.files import Place

RECORD, ARRAYS = "_manifest.json", "arrays.safetensors"

Arrays = Mapping[str, NDArray[Any]]

_LARGE = 2**26
"""Bytes from which an array is left in its file where that does."""

_SEAL = "sha256 of the rest"
_INPUTS = "_inputs.json"
_log = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Damaged(UserError):
    """A file of an artifact is not what was written; `mend` lets it be made again."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}. Run the whole evaluation again: it is made anew.")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return Damaged, (self.path, self.reason)


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    size: int
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)
    """What whoever wrote it says of it, such as its rows."""


@dataclass(frozen=True)
class Record:
    """What a complete artifact says of itself."""

    kind: str
    identity: dict[str, Any]
    inputs: dict[str, str]
    """Content digests of the artifacts it was made of, by name."""
    files: dict[str, File]
    facts: dict[str, Any]

    @property
    def content(self) -> str:
        """Digest of all bytes that others are made of: names and digests of the files, but those `aside`."""
        aside = self.facts.get("aside", ())
        return digest({name: file.sha256 for name, file in self.files.items() if name not in aside})


@dataclass(frozen=True)
class Artifact:
    """A folder of files that were made of something."""

    folder: Place
    kind: str
    identity: Mapping[str, Any]
    """What it was made of and how; its digest names the folder."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Content digests, by name, of what it is to be made of: if they differ, it is made again."""

    @property
    def name(self) -> str:
        """Its place in the workspace: what others that are made of it have in their identity."""
        return name_of(self.folder)

    def record(self) -> Record | None:
        """Its record if it is complete.

        Raises:
            Damaged: a record, or a file of the wrong size.
        """
        entries = _listed(self.folder)
        if RECORD not in entries:
            return None
        found = _record_in(self.folder, entries[RECORD].identity)
        if digest([found.kind, found.identity]) != digest([self.kind, self.identity]):
            raise Damaged(str(self.folder / RECORD), "it is the record of something else")
        for name, file in found.files.items():
            if name not in entries or entries[name].size != file.size:
                there = f"it has {entries[name].size:,} bytes" if name in entries else "it is missing"
                raise Damaged(str(self.folder / name), f"{there}, {file.size:,} were written")
        return found

    def require(self) -> Record:
        """Its record; it was complete before.

        Raises:
            Damaged: it is not any more.
        """
        found = self.record()
        if found is None:
            raise Damaged(str(self.folder / RECORD), "it is missing")
        return found

    def intact(self) -> Record | None:
        """Its record if it is complete, of the written sizes, and made of what it is to be made of."""
        try:
            found = self.record()
        except Damaged as damaged:
            _log.warning("%s is damaged: %s", damaged.path, damaged.reason)
            return None
        return found if found is not None and found.inputs == dict(self.inputs) else None

    def done(self) -> dict[str, File]:
        """The parts that are there, by name; those whose writer was killed are not."""
        entries = _listed(self.folder)
        names = [part for name in entries if _is_receipt(name) and (part := _part_of(name)) in entries]
        receipts = storage.ahead(receipt_of, [self.folder / name for name in names], 8)
        found = zip(names, receipts, strict=True)
        return {name: file for name, file in found if file is not None and entries[name].size == file.size}

    def begin(self) -> dict[str, File]:
        """The parts that are there and were made of the same inputs; others are deleted, and the record."""
        if self.inputs and self._begun_with() != dict(self.inputs):
            self.discard()
            _seal(self.folder / _INPUTS, {"inputs": dict(self.inputs)})
        (self.folder / RECORD).unlink(missing_ok=True)
        return self.done()

    def _begun_with(self) -> dict[str, str] | None:
        """The inputs that its parts were made of; None if nobody knows."""
        try:
            return dict(_unsealed(self.folder / _INPUTS)["inputs"])
        except (Damaged, FileNotFoundError):
            return None

    def finish(self, made: Mapping[str, File], alone: bool = True, **facts: Any) -> Record:
        """Mark it as complete.

        Args:
            made: all its files.
            alone: whether what else lies in its folder, such as drafts, is deleted.
            facts: what else is to be known about it; under `aside`, the files that nothing is made of.
        """
        for entry in _listed(self.folder).values() if alone else ():
            name = _part_of(entry.name) if _is_receipt(entry.name) else entry.name
            if not entry.folder and name not in (*made, _INPUTS):
                files.at(entry.uri).unlink(missing_ok=True)
        record = Record(self.kind, dict(self.identity), dict(self.inputs), dict(made), facts)
        _seal(self.folder / RECORD, asdict(record))
        _records.pop(str(self.folder), None)
        return record

    def checked(self) -> Record | None:
        """The same, and all its files have the bytes that were written; for small ones."""
        found = self.intact()
        try:
            for name, file in found.files.items() if found is not None else ():
                with opened(self.folder / name, file.sha256):
                    pass
        except Damaged as damaged:
            mend(damaged)
            return None
        return found

    def discard(self) -> None:
        """Delete its files, the record first: what a kill leaves then never looks complete."""
        if self.folder.is_dir():
            (self.folder / RECORD).unlink(missing_ok=True)
            for entry in storage.entries(str(self.folder)):
                if not entry.folder:
                    files.at(entry.uri).unlink(missing_ok=True)

    def arrays(
        self, record: Record, arrays_of: Callable[[Path], dict[str, NDArray[Any]]] = load_file
    ) -> dict[str, NDArray[Any]]:
        """The arrays of one that holds arrays.

        Args:
            record: of it.
            arrays_of: reads the arrays of a file: `load_file` or `mapped`.

        Raises:
            Damaged: other bytes than were written.
        """
        with opened(self.folder / ARRAYS, record.files[ARRAYS].sha256) as file:
            return arrays_of(file)

    def keep(self, arrays: Arrays, **facts: Any) -> Record:
        """Make it of arrays."""
        return self.finish({ARRAYS: write(self.folder / ARRAYS, saved(arrays))}, **facts)


@dataclass(frozen=True)
class Kept:
    """A complete artifact that holds arrays."""

    artifact: Artifact
    record: Record

    @property
    def content(self) -> dict[str, str]:
        """Its content digest by its name, as what is made of it has it among its inputs."""
        return {self.artifact.name: self.record.content}

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.record.files.values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it holds.

        Raises:
            Damaged: other bytes than were written.
        """
        return self.artifact.arrays(self.record)

    def pages(self) -> dict[str, NDArray[Any]]:
        """What it holds, as `mapped`.

        Raises:
            Damaged: other bytes than were written.
        """
        return self.artifact.arrays(self.record, mapped)


def _listed(folder: Place) -> dict[str, storage.Entry]:
    """What lies in a folder, by name; nothing if there is none."""
    with suppress(FileNotFoundError):
        return {entry.name: entry for entry in storage.entries(str(folder))}
    return {}


_records: dict[str, tuple[str, Record]] = {}
"""The records that this process has read, by folder, each with the size and time stamp it had."""


def _record_in(folder: Place, identity: str) -> Record:
    """The record in a folder, read again only if its size or time stamp is another one by now."""
    known = _records.get(str(folder))
    if known is None or known[0] != identity:
        known = _records[str(folder)] = identity, read_record(folder)
    return known[1]


def read_record(folder: Place) -> Record:
    """The record of whatever artifact is complete in a folder.

    Raises:
        FileNotFoundError: there is none.
        Damaged: other bytes than were written.
    """
    content = _unsealed(folder / RECORD)
    listed = {name: File(**file) for name, file in content.pop("files").items()}
    return Record(files=listed, **content)


def is_older(folder: Place) -> bool:
    """Whether the record in a folder is one of versions before 0.3, which had no digest of their own."""
    try:
        content = files.read_json(folder / RECORD)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(content, dict) and _SEAL not in content


@lru_cache(maxsize=256)
def digests(folder: str, content: str) -> dict[str, str]:
    """SHA-256 of every file of an artifact of some content, by name; read once in a process.

    Raises:
        UserError: if it has another content by now.
    """
    try:
        record = read_record(files.at(folder))
    except FileNotFoundError:
        raise Damaged(str(files.at(folder) / RECORD), "it is missing") from None
    if record.content != content:
        raise UserError(f"{folder}: its files were made again by another run meanwhile. {AGAIN}")
    return {name: file.sha256 for name, file in record.files.items()}


def name_of(folder: Place) -> str:
    """Name of the artifact in a folder, as in `fits/1f2e3d4c5b6a7988`."""
    return f"{storage.name_of(storage.parent(str(folder)))}/{folder.name}"


def saved(arrays: Arrays) -> Callable[[Path], object]:
    """A function that writes arrays to a path, without another copy of them in memory."""
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}

    def fill(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode
        save_file(whole, path)
        path.chmod(mode)  # which shuts out other users by itself

    return fill


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a file that `saved` wrote, to be read only; large ones are pages of the file, not memory.

    They hold the file open, and need it: on NFS, a process ends with a bus error that reads a page for the
    first time after another client has deleted the file.
    """
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
    whole = np.memmap(path, np.uint8, "r")

    def array(dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
        kind = "?" if dtype == "BOOL" else f"{dtype[0].lower()}{int(dtype[1:]) // 8}"  # of F64, f8
        found = np.ndarray(shape, kind, whole, start + data_offsets[0])
        found = found if found.nbytes >= _LARGE else found.copy()
        found.flags.writeable = False
        return found

    return {name: array(**each) for name, each in header.items()}


def write(path: Place, fill: Callable[[Path], object], **facts: Any) -> File:
    """Write a file; it appears when it is complete.

    Args:
        path: the file.
        fill: writes a draft of it at a local path.
        facts: what is to be known about it.
    """
    with files.atomic(path) as draft:
        fill(draft)
        return File(draft.stat().st_size, _sha256(draft), facts)


def write_part(path: Place, fill: Callable[[Path], object], **facts: Any) -> File:
    """The same for a file that need not be written again if the work is interrupted later."""
    file = write(path, fill, **facts)
    _seal(_receipt(path), asdict(file))
    return file


def remove(path: Place) -> None:
    """Delete a file, its receipt first."""
    _receipt(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def mend(damaged: Damaged) -> None:
    """Take away a damaged file, the record of its artifact first: it is then to be made again."""
    _log.warning("%s is damaged: %s; it is made again", damaged.path, damaged.reason)
    path = files.at(damaged.path)
    (files.at(storage.parent(damaged.path)) / RECORD).unlink(missing_ok=True)
    if path.name != RECORD:
        remove(path)


@contextmanager
def opened(path: Place, sha256: str) -> Iterator[Path]:
    """A file as a local one, as `files.local` gives it, whose bytes are those that were written.

    Raises:
        Damaged: if they are not, or there is no such file.
    """
    try:
        with files.local(path) as file:
            stat = file.stat()
            if _found(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) != sha256:
                raise Damaged(str(path), "other bytes than were written")
            yield file
    except FileNotFoundError:
        raise Damaged(str(path), "it is missing") from None


@lru_cache(maxsize=2**16)
def _found(path: str, *_: int) -> str:
    """Digest of a file; once in a process as long as it stays the same."""
    return _sha256(Path(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _receipt(path: Place) -> Place:
    return files.at(storage.join(storage.parent(str(path)), f".{path.name}.json"))


def _is_receipt(name: str) -> bool:
    return name.startswith(".") and name.endswith(".json")


def _part_of(receipt: str) -> str:
    return receipt[1 : -len(".json")]


def receipt_of(path: Place) -> File | None:
    """What the receipt of a file says; nothing if there is none, or it is damaged."""
    try:
        return File(**_unsealed(_receipt(path)))
    except (Damaged, FileNotFoundError):
        return None


def _seal(path: Place, content: Mapping[str, Any]) -> None:
    """Write a JSON document that holds its own digest."""
    files.write_json(path, {_SEAL: digest(content), **content})


def _unsealed(path: Place) -> dict[str, Any]:
    """What `_seal` wrote.

    Raises:
        Damaged: something else.
    """
    written = path.read_bytes()
    try:
        content = dict(json.loads(written))
    except (ValueError, TypeError):
        raise Damaged(str(path), "no JSON") from None
    if content.pop(_SEAL, None) != digest(content):
        raise Damaged(str(path), "other bytes than were written")
    return content


@dataclass
class Store:
    """Artifacts of one folder of a workspace, and whether what is lacking may be made."""

    folder: Place
    mode: Literal["reuse", "frozen", "fresh"] = "reuse"
    """Make what is not there; or refuse to; or make everything again, once."""
    afresh: set[str] = field(default_factory=set)
    """Names of what was made again."""
    used: set[str] = field(default_factory=set)
    """Names of all that was asked for."""
    made_now: set[str] = field(default_factory=set)
    """Names of what was made."""
    claims: Claims | None = None
    """Who makes what, where others may make the same."""

    def artifact(
        self, kind: str, identity: Mapping[str, Any], inputs: Mapping[str, str] | None = None
    ) -> Artifact:
        """The artifact of a kind and an identity.

        Args:
            kind: what it is, with the format of its files, as in `bank 1`.
            identity: what it is made of and how.
            inputs: content digests, by name, of what it is made of.
        """
        return Artifact(self.folder / digest([kind, identity])[:16], kind, dict(identity), inputs or {})

    def ready(self, artifact: Artifact) -> Record | None:
        """The record of an artifact that can be used; None if it has to be made.

        What is damaged of it is taken away; the rest of it stays.

        Raises:
            UserError: if it has to be made and that is not for this command.
        """
        self.used.add(artifact.name)
        if self.mode == "fresh" and artifact.name not in self.afresh:
            return None
        try:
            found = artifact.record()
            if found is not None and found.inputs != dict(artifact.inputs):
                self._refuse(artifact)
                _log.warning("%s was made of files that are others by now; it is made again", artifact.name)
                found = None
        except Damaged as damaged:
            if self.mode == "frozen":
                raise
            mend(damaged)
            found = None
        if found is None:
            self._refuse(artifact)
        return found

    def _refuse(self, artifact: Artifact) -> None:
        if self.mode == "frozen":
            kind = artifact.kind.rpartition(" ")[0]
            raise UserError(f"fit: no {kind} in the workspace. Run `ood-pipeline fit` first.")

    def kept(
        self, artifacts: Sequence[Artifact], compute: Callable[[list[int]], Iterable[Arrays]]
    ) -> list[Kept]:
        """Artifacts that hold arrays; those that are lacking are computed together.

        Args:
            artifacts: what is wanted.
            compute: gives the arrays of those at some positions.

        Raises:
            UserError: if one is lacking and that is not for this command.
        """

        def make(names: set[str]) -> None:
            lacking = [number for number, artifact in enumerate(artifacts) if artifact.name in names]
            for number, arrays in zip(lacking, compute(lacking), strict=True):
                artifacts[number].keep(arrays)

        return [Kept(*each) for each in zip(artifacts, self.shared(artifacts, make), strict=True)]

    def shared(self, artifacts: Sequence[Artifact], make: Callable[[set[str]], None]) -> list[Record]:
        """Records of artifacts; those that are lacking are made, by us or by whoever has claimed them.

        Args:
            artifacts: what is wanted.
            make: makes those of some names.

        Raises:
            UserError: if one is lacking and that is not for this command.
        """
        records: dict[str, Record] = {}

        def lacking() -> list[str]:
            for artifact in artifacts:
                if artifact.name not in records and (found := self.ready(artifact)) is not None:
                    records[artifact.name] = found
            return [artifact.name for artifact in artifacts if artifact.name not in records]

        def noted(names: set[str]) -> None:
            self._note([artifact for artifact in artifacts if artifact.name in names])
            make(names)

        if self.claims is not None:
            self.claims.share(lacking, noted)
        elif names := set(lacking()):
            noted(names)
            lacking()
        return [records[artifact.name] for artifact in artifacts]

    def _note(self, made: Iterable[Artifact]) -> None:
        """Remember what is made; of what is made afresh, the old is deleted."""
        for artifact in made:
            self.made_now.add(artifact.name)
            if self.mode == "fresh" and artifact.name not in self.afresh:
                artifact.discard()
                self.afresh.add(artifact.name)


def remove_folder(folder: Place) -> None:
    """Delete a folder, all completion markers first: what a kill leaves then never looks complete."""
    if folder.is_dir():
        _unmark(folder)
        files.remove_folder(folder)


def _unmark(folder: Place) -> None:
    """Delete the completion markers of a folder and of those in it."""
    inside = [entry.uri for entry in storage.entries(str(folder)) if entry.folder]
    (folder / RECORD).unlink(missing_ok=True)
    for each in inside:
        _unmark(files.at(each))
