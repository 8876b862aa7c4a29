"""Files of a workspace: `pathlib.Path` on the local disk, `Remote` in an object store; and what both can do.

A file is written to the local disk first and then renamed, or uploaded: an object appears when its upload is
complete, so in both cases nothing half-written is ever seen under its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import AGAIN, UserError
from pipeline.workspace import storage

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_LEAST = 2**20
"""Bytes: a disk with fewer is full."""

_APPEAR_WHOLE = {"s3", "gcs", "abfs"}
"""Kinds of storage in which a file that is being written cannot be seen."""


@dataclass(frozen=True)
class Remote:
    """A file or folder by URI, with the methods of `pathlib.Path` that a workspace needs."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Remote:
        return Remote(storage.join(self.uri, name))

    @property
    def name(self) -> str:
        """The last part, decoded."""
        return storage.name_of(self.uri)

    def is_file(self) -> bool:
        """Whether there is a file."""
        found = storage.find(self.uri)
        return found is not None and not found.folder

    def is_dir(self) -> bool:
        """Whether there is a folder, or anything below one."""
        found = storage.find(self.uri)
        return found is not None and found.folder

    def glob(self, pattern: str) -> Iterator[Remote]:
        """What lies in the folder under names of a pattern, in the order of the names."""
        with suppress(FileNotFoundError):
            for entry in storage.entries(self.uri):
                if fnmatchcase(entry.name, pattern):
                    yield Remote(entry.uri)

    def read_bytes(self) -> bytes:
        """Content of the file."""
        return storage.read(self.uri)

    def read_text(self, encoding: str) -> str:
        """Text of the file."""
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file.

        Raises:
            FileNotFoundError: if there is none and that is not expected.
        """
        with suppress(FileNotFoundError) if missing_ok else nullcontext():
            storage.remove(self.uri)


Place = Path | Remote


def at(path: str) -> Place:
    """The place of a path or URI."""
    if storage.is_remote(path):
        return Remote(path)
    return Path(storage.located(path)[1])


def put(file: Path, to: Place) -> None:
    """Make a local file, which is complete, appear at a place, on the disk; its folder is made if need be.

    Raises:
        OSError: no access, or no room. What was at the place is then still there.
    """
    if isinstance(to, Remote):
        storage.upload(file, to.uri)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        _sync(file)
        file.replace(to)
        _sync(to.parent)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk: power loss then takes nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: Place) -> Iterator[Path]:
    """A local path to write to, put at `path` if the block succeeds and removed if it does not.

    Raises:
        UserError: no room or no access, there or where the draft lies.
    """
    with _clear(path), _draft(path) as draft:
        yield draft
        put(draft, path)


@contextmanager
def _draft(path: Place) -> Iterator[Path]:
    """A local path, on the disk of `path` if that is local, that is gone after the block."""
    if isinstance(path, Remote):
        with TemporaryDirectory(prefix="ood-pipeline-") as folder:
            yield Path(folder, path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _clear(path: Place) -> Iterator[None]:
    """Tell a full disk or missing rights apart from mistakes of ours; writers do not always say which."""
    folder = tempfile.gettempdir() if isinstance(path, Remote) else path.parent
    try:
        with roomy(path, folder):
            yield
    except OSError as error:
        if _is_full(folder):
            raise _no_room(path, folder) from None
        if error.errno not in _REFUSED and not isinstance(path, Remote):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path}: {reason}. Check the rights and the credentials. {AGAIN}"
        ) from None


@contextmanager
def roomy(what: object, folder: Path | str) -> Iterator[None]:
    """In the block, a full disk is told as that: of libraries, some have errors of their own for it.

    Raises:
        UserError: what could not be written, and the folder on whose disk there is no room.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = isinstance(error, OSError) and error.errno in _FULL
        if not told and not any(os.strerror(number) in str(error) for number in _FULL):
            raise
        named = error.filename if isinstance(error, OSError) else None
        raise _no_room(what, Path(os.fsdecode(named)).parent if named else folder) from None


def _no_room(what: object, folder: Path | str) -> UserError:
    return UserError(f"cannot write {what}: no space left on the disk of {folder}. Free some space. {AGAIN}")


def _is_full(folder: Path | str) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(folder).free < _LEAST
    return False


@contextmanager
def scratch(folder: Place) -> Iterator[Path]:
    """A local folder for drafts, on the disk of `folder` if that is local; gone after the block.

    Raises:
        UserError: no room there.
    """
    beside = folder if isinstance(folder, Path) else Path(tempfile.gettempdir())
    with roomy(f"to {folder}", beside):
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=beside, prefix=".ood-pipeline-", ignore_cleanup_errors=True) as made:
            yield Path(made)


@contextmanager
def local(path: Place) -> Iterator[Path]:
    """A file as a local one: itself, or a copy of a remote one that is deleted after the block.

    What the block mapped into memory stays readable, and its disk space in use, as long as it is mapped.

    Raises:
        UserError: no room for the copy.
    """
    if isinstance(path, Path):
        yield path
        return
    with TemporaryDirectory(prefix="ood-pipeline-") as folder:
        with roomy(f"a copy of {path}", folder):
            storage.download(path.uri, Path(folder, path.name))
        yield Path(folder, path.name)


def remove_folder(folder: Place) -> None:
    """Delete a folder and all below it; nothing if there is none."""
    if isinstance(folder, Remote):
        storage.remove_folder(folder.uri)
    elif folder.is_dir():
        shutil.rmtree(folder)


def replace_folder(draft: Path, folder: Place, last: str) -> None:
    """Put a local folder in the place of another.

    Args:
        draft: the new one, on the same disk if `folder` is local.
        folder: renamed over if it is local. If not, the files are put one by one, `last` the last, and then
            those that are not in the draft are deleted.
        last: name of the file that makes the others known.
    """
    if isinstance(folder, Path):
        if folder.exists():
            folder.rename(draft.with_name("old"))
        draft.rename(folder)
        return
    files = [file.relative_to(draft) for file in draft.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (str(file) == last, file)):
        put(draft / file, folder / str(file))
    kept = {file.parts[0] for file in files}
    for stale in folder.glob("*"):
        if stale.name not in kept:
            stale.unlink()


def require_writable(path: str, field: str) -> None:
    """Refuse a folder that cannot be made or written to, or where incomplete files would be seen.

    Raises:
        UserError: naming the config field and the reason.
    """
    try:
        _require_whole(path)
        folder = at(path)
        probe = folder / f".write-test-{uuid.uuid4().hex}"
        with _draft(probe) as draft:
            draft.touch()
            put(draft, probe)
        probe.unlink()
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        advice = "Check its name and the credentials" if storage.is_remote(path) else "Choose another folder"
        raise UserError(f"{field}: cannot write to {path}: {reason}. {advice}.") from None


def _require_whole(path: str) -> None:
    system, _ = storage.located(path)
    if system is not None and system.type_name not in _APPEAR_WHOLE:
        raise UserError(
            f"files at {path} can be seen before they are complete; expected a local or shared folder, or an "
            "object store (s3://, gs://)."
        )


def write_text(path: Place, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Place, value: Any) -> None:
    """Write a JSON document atomically."""
    with atomic(path) as draft:
        dump_json(value, draft)


def dump_json(value: Any, path: Path) -> None:
    """Write a JSON document to the local disk."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Place) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))
