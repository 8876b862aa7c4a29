"""Files by path or URI: the local disk, and whatever pyarrow has a file system for (s3, gs, hdfs, ...).

A local path is used as it is. A URI is percent-encoded after its host, so that any name can be written in
one; `file://` URIs are local. Credentials and endpoints come from the environment, as each service's own
tools read them, and only the endpoint may stand in a URI (`?endpoint_override=...`).

What a store may do a moment later is asked for again; what never comes is `patience.Unavailable`.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import lru_cache
from itertools import count, groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError, has_credentials
from pipeline.workspace.patience import insist, is_transient, patient

BUFFER = 2**20
"""Bytes that a sequential reader of a remote file asks for at once."""

CHUNK = 2**23
"""Bytes that a download asks for at once."""

LISTINGS = 32
"""Folders that are listed at once where each waits for an answer, as over a network."""

TRIES = 3
"""How often pyarrow's own client sends a request, before `patience` makes the whole call again."""

SILENCE = 10.0
"""Seconds without a byte after which a client takes a request for lost."""

MISSING = "missing"
"""Identity of a file that is not there."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """A file or folder of a listing."""

    uri: str
    name: str
    folder: bool
    identity: str
    """Size and time stamp of a file; `MISSING` for a link to nowhere."""
    size: int = 0
    """Bytes."""

    @property
    def modified(self) -> float:
        """When a file was changed, in seconds since 1970."""
        return int(self.identity.rpartition("-")[2]) / 1e9


def is_remote(path: str) -> bool:
    """Whether a path is a URI of another file system than the local one."""
    return "://" in path and not path.startswith("file://")


def join(folder: str, name: str) -> str:
    """Path of a file (a name or a relative path) in a folder; an absolute local name stays as it is."""
    if "://" not in folder:
        above, _, last = name.rpartition("/")
        if (
            above and folder[:1] == "/" != above[0] and last not in ("", ".")
        ):  # a list names a million of them
            return local_uri(f"{_inside(folder, above)}/{last}")
        return local_uri(str(Path(folder) / name))
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(os.fsencode(PurePosixPath(name.lstrip('/'))))}{mark}{query}"


@lru_cache(maxsize=2**12)
def _inside(folder: str, name: str) -> str:
    return str(Path(folder) / name).rstrip("/")


def parent(path: str) -> str:
    """The folder a file lies in."""
    if "://" not in path:
        return str(Path(path).parent)
    base, mark, query = path.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def name_of(path: str) -> str:
    """The last part of a path, decoded."""
    return Path(located(path)[1]).name


@patient
def find(path: str) -> Entry | None:
    """The file or folder at a path, or None.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no access.
    """
    system, place = located(path)
    if system is None:
        return _local_entry(Path(place)) if _exists(place) else None
    info = system.get_file_info(place)
    return None if info.type == fs.FileType.NotFound else _remote_entry(path, info)


@patient
def touched(path: str) -> int:
    """When anything of a local file changed last, in nanoseconds since 1970.

    It tells of another file that took its place with its time stamp, and cannot be set; a copy has another.
    0 in a store, which is not asked, and where there is no file.
    """
    found = None if is_remote(path) else status(Path(located(path)[1]))
    return 0 if found is None else found.st_ctime_ns


@patient
def entries(folder: str) -> list[Entry]:
    """What lies in a folder, in the order of the names; links are followed.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such folder, or no access.
    """
    system, place = located(folder)
    if system is None:
        with os.scandir(place) as found:
            listed = [_local_entry(entry) for entry in found]
    else:
        listed = [_remote_entry(join(folder, info.base_name), info) for info in children(system, place)]
    return sorted(listed, key=lambda entry: entry.name)


def open_input(path: str) -> BinaryIO:
    """A file to read, seekable and buffered.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such file, or no access.
    """
    system, place = located(path)
    if system is None:
        return insist(path, _open_regular, place)
    return cast(BinaryIO, io.BufferedReader(Reader(path), BUFFER))


def _open_regular(place: str) -> BinaryIO:
    """A local file to read. What may never end, or waits for somebody to write, is not opened.

    Raises:
        OSError: no such file, no access, or a pipe, device or socket.
    """
    kind = Path(place).stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(errno.EINVAL, "not a regular file but a pipe, device or socket", place)
    return Path(place).open("rb")


class Reader(io.RawIOBase):
    """A remote file to read, without a buffer; a connection that breaks costs only the bytes asked for."""

    def __init__(self, path: str) -> None:
        """Open it.

        Raises:
            UserError: a URI that names no usable storage.
            OSError: no such file, or no access.
        """
        system, place = located(path)
        self._path = path
        self._open: Callable[[], Any] = lambda: system.open_input_file(place)
        self._file = insist(path, self._open)
        self._size, self._position = self._file.size(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        start: int = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        position = start + offset
        if position < 0:
            raise OSError(errno.EINVAL, "before the beginning of the file", self._path)
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there is room for; fewer only at the end."""
        size = max(min(len(buffer), self._size - self._position), 0)
        content = insist(self._path, self._read, size) if size else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        """Read to the end, at once."""
        return self.read(max(self._size - self._position, 0)) or b""

    def _read(self, size: int) -> bytes:
        if self._file.closed:  # by pyarrow, when a connection to Google broke
            self._file = self._open()
        return cast(bytes, self._file.read_at(size, self._position))


class Changed(UserError):
    """A file is another one than was listed."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} was changed after it was listed. Run again: it is listed anew.")
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Changed, (self.path,)


class TooLarge(ValueError):
    """More bytes than are to be read."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size:,} bytes, more than the {limit:,} that are read")


@patient
def read(
    path: str,
    offset: int | None = None,
    length: int | None = None,
    identity: str | None = None,
    limit: int | None = None,
) -> bytes:
    """Content of a file, or `length` bytes of it from `offset` on.

    Args:
        path: of the file.
        offset: where to begin; None = all of it.
        length: how many bytes; None = to the end.
        identity: what the file had when it was listed; None = whatever it is.
        limit: most bytes that are read; None = any number.

    Raises:
        Changed: it has another identity.
        TooLarge: it would be more bytes than `limit`.
        UserError: a URI that names no usable storage.
        OSError: no such file, or no access.
        EOFError: a file that ends earlier.
    """
    system, place = located(path)
    opened: Any = _open_regular(place) if system is None else system.open_input_file(place)
    with opened as file:
        wanted = length
        if wanted is None:
            wanted = os.fstat(file.fileno()).st_size if system is None else file.size()
        if limit is not None and wanted > limit:
            raise TooLarge(wanted, limit)
        if offset is not None:
            file.seek(offset)
        content = cast(bytes, file.read(wanted))
        if identity is not None and identity != _identity_of(file, system, place):
            raise Changed(path)
    if length is not None and len(content) < length:
        raise EOFError(f"the file ends {length - len(content)} bytes too early")
    return content


def require_unchanged(path: str, identity: str) -> None:
    """Refuse a file that has another identity than when it was listed.

    Raises:
        Changed: it has.
        FileNotFoundError: it is not there any more.
    """
    found = find(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", path)
    if found.identity != identity:
        raise Changed(path)


def _identity_of(file: Any, system: Any, place: str) -> str:
    """The identity of an open file, as a listing gives it."""
    if system is None:
        return identity(os.fstat(file.fileno()))
    modified = file.metadata().get("Last-Modified") if system.type_name == "s3" else None
    if modified is None:
        return _remote_entry(place, system.get_file_info(place)).identity
    seconds = round(datetime.fromisoformat(modified.decode()).timestamp())
    return f"{file.size()}-{seconds * 10**9}"


def local_identities(paths: Iterable[str]) -> list[str]:
    """The identities that `find` gives local files, `MISSING` where there is none; for lists of a million.

    Of files beside each other the way to their folder is looked up once.
    """
    beside = groupby(paths, lambda path: path[: path.rfind("/") + 1])
    return [each for folder, some in beside for each in _local_identities(folder, list(some))]


@patient
def _local_identities(folder: str, paths: list[str]) -> list[str]:
    """Those of files in a folder, which is empty or ends with a slash."""
    handle = _way_to(folder) if len(paths) > 1 else None
    if handle is None:
        return [_local_identity(located(path)[1]) for path in paths]
    try:
        return [_local_identity(path[len(folder) :], handle) for path in paths]
    finally:
        os.close(handle)


_LOOK = getattr(os, "O_PATH", os.O_RDONLY)
"""On Linux a folder need not be readable to look up a name in it; elsewhere one that is not is not opened."""


def _way_to(folder: str) -> int | None:
    """A handle of a local folder to look things up in; None where each path has to tell what is wrong."""
    try:
        return None if "://" in folder else os.open(folder, _LOOK | os.O_DIRECTORY)
    except (OSError, ValueError):
        return None


def _local_identity(path: str, folder: int | None = None) -> str:
    try:
        return identity(os.stat(path, dir_fd=folder))
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        return MISSING


def identity(found: os.stat_result | None) -> str:
    """Size and time stamp of a local file, `MISSING` for one that is not there."""
    return MISSING if found is None else f"{found.st_size}-{found.st_mtime_ns}"


def upload(file: Path, uri: str) -> None:
    """Write a local file to a URI; in an object store it appears when it is complete, or not at all.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no access.
    """
    insist(uri, _upload, file, uri)


def _upload(file: Path, uri: str) -> None:
    system, place = located(uri)
    # Closing a stream completes the object, whatever went wrong before: so everything is written in one
    # call, and in a thread, where no interrupt comes before it. `fs.copy_files` ignores errors of late parts.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_write, system, place, file).result()


def _write(system: Any, place: str, file: Path) -> None:
    with pa.memory_map(str(file)) as content, system.open_output_stream(place) as stream:
        stream.write(content.read_buffer())


def download(uri: str, file: Path) -> None:
    """Copy the file at a URI to the local disk.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such file, or no access.
    """
    with Reader(uri) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)


def remove(uri: str) -> None:
    """Delete the file at a URI.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no such file, or no access.
    """
    system, place = located(uri)
    tries = count()

    def delete() -> None:
        with suppress(FileNotFoundError) if next(tries) else nullcontext():  # its answer may have been lost
            system.delete_file(place)

    insist(uri, delete)


@patient
def remove_folder(uri: str) -> None:
    """Delete the folder at a URI and all below it; nothing if there is none.

    Raises:
        UserError: a URI that names no usable storage.
        OSError: no access.
    """
    system, place = located(uri)
    if system.type_name != "gcs":
        with suppress(FileNotFoundError):
            system.delete_dir(place)
        return
    for info in system.get_file_info(fs.FileSelector(place, allow_not_found=True, recursive=True)):
        if info.type == fs.FileType.File:  # pyarrow deletes no folder that has no object of its own
            system.delete_file(info.path)


def ahead(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results of a call, in order, with the next ones under way in threads: hides a network's latency."""
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque(pool.submit(call, item) for item in islice(source, threads))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(call, item) for item in islice(source, 1))


def located(path: str) -> tuple[Any, str]:
    """The file system of a path (None for the local disk) and the path in it.

    Raises:
        UserError: a URI that names no usable storage.
    """
    if "://" not in path:
        return None, path
    parts = urlsplit(path)
    if parts.scheme == "file":
        return None, os.fsdecode(unquote_to_bytes(parts.path))
    if has_credentials(path):
        raise UserError(
            f"{parts.scheme}://...@{parts.hostname}: a path must not hold credentials; "
            "set them in the environment."
        )
    system, root = _system(parts.scheme, parts.netloc, parts.query)
    return system, f"{root.rstrip('/')}/{unquote(parts.path).strip('/')}".rstrip("/") or "/"


@lru_cache(maxsize=32)
def _system(scheme: str, host: str, query: str) -> tuple[Any, str]:
    """The file system of a service and the path of its root; made once in a process."""
    # with these pyarrow lists, and opens connections, whoever asks
    if pa.io_thread_count() < LISTINGS and "ARROW_IO_THREADS" not in os.environ:
        pa.set_io_thread_count(LISTINGS)
    uri = f"{scheme}://{host}" + (f"/?{query}" if query else "")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        uri += f"{'&' if query else '/?'}retry_limit_seconds={SILENCE:.0f}"
    try:
        system, root = insist(uri, fs.FileSystem.from_uri, uri)
        if system.type_name == "s3":  # as its URI makes it, it asks up to 31 times, five times a second
            options = system.__reduce__()[1][0] | {"request_timeout": SILENCE}
            system = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(TRIES))
        return system, root
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot use this storage: {str(error).splitlines()[0]}.") from None


def local_uri(path: str) -> str:
    """A local path, as a URI if it is no valid text and could not be stored."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file://{quote(os.fsencode(Path(path).absolute()))}"
    return path


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        return False
    return True


def _local_entry(entry: Path | os.DirEntry[str]) -> Entry:
    uri, folder, found = local_uri(os.fspath(entry)), entry.is_dir(), status(entry)
    return Entry(uri, entry.name, folder, identity(found), 0 if found is None else found.st_size)


def status(entry: Path | os.DirEntry[str]) -> os.stat_result | None:
    """What the system knows of a local file or folder; None for a link to nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if is_transient(error):
            raise
        return None


def children(system: Any, place: str) -> Iterator[fs.FileInfo]:
    """What lies in a folder. Of GCS, all below it is listed: pyarrow sees folders there only by files."""
    implied = system.type_name == "gcs"
    found: set[str] = set()
    infos = system.get_file_info(fs.FileSelector(place, allow_not_found=implied, recursive=implied))
    if not infos and system.get_file_info(place).type == fs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such folder", place)
    for info in infos:
        name, below, _ = info.path.removeprefix(f"{place.rstrip('/')}/").partition("/")
        if below:
            info = fs.FileInfo(f"{place.rstrip('/')}/{name}", fs.FileType.Directory)
        if name not in found:
            found.add(name)
            yield info


def _remote_entry(uri: str, info: fs.FileInfo) -> Entry:
    folder = info.type == fs.FileType.Directory
    return Entry(uri, info.base_name, folder, remote_identity(info), info.size or 0)


def remote_identity(info: fs.FileInfo) -> str:
    """Size and time stamp of a remote file, as far as its store knows them."""
    return f"{info.size}-{info.mtime_ns}"
