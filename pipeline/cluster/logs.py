"""Log files of workers, in a folder of the run: one for each process while it works, merged at the end.

They hold what Python logs, warnings, what the user's own code prints, and, on a local workspace, the stack
of a process that crashed. In an object store, which knows no appending, a file is put anew after each piece
of work. A log that cannot be written costs no work.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pipeline.errors import UserError
from pipeline.workspace import files
from pipeline.workspace.files import Place

MERGED = "workers.log"

_PIECES = "worker-*.log"
_LAST = 15
"""Lines shown when a task fails."""
_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"
_BEGINS = re.compile(rb"\d{4}-\d{2}-\d{2}T")
"""Lines that do not begin so go on with the one before."""


@dataclass(frozen=True)
class Logs:
    """Where workers log to; travels with their work."""

    folder: Place
    level: int = logging.WARNING
    session: str = ""
    """Tells the files of one execution from those of the next in the same process."""

    def piece(self) -> Place:
        """The file of this process."""
        return self.folder / f"worker-{self.session}-{socket.gethostname()}-{os.getpid()}.log"

    def tail(self, pid: int | None = None) -> str:
        """The last lines of a process' file; without its number, of the file that grew last."""
        pieces = {piece: piece.read_bytes() for piece in _pieces(self.folder)}
        own = [piece for piece in pieces if piece.name.endswith(f"-{pid}.log")]
        ends = {piece: _stamps(content)[-1:] for piece, content in pieces.items() if not own or piece in own}
        if not any(ends.values()):
            return ""
        last = max(ends, key=lambda piece: ends[piece])
        lines = pieces[last].decode("utf-8", "replace").splitlines()[-_LAST:]
        return "\n".join([f"The last lines of {last}:", *lines])

    def merge(self) -> None:
        """Make one file of all, in the order of time; what an interrupted run left goes in, too."""
        try:
            self._merge()
        except (OSError, UserError) as error:
            logging.getLogger(__name__).warning("%s: the logs of workers stay apart: %s", self.folder, error)

    def _merge(self) -> None:
        pieces = _pieces(self.folder)
        target = self.folder / MERGED
        records = [*_records(target.read_bytes())] if pieces and target.is_file() else []
        known = set(records)  # of files that were merged, but not deleted
        for piece in pieces:
            records += [record for record in _records(piece.read_bytes()) if record not in known]
        if len(records) > len(known):
            with files.atomic(target) as draft:
                draft.write_bytes(b"".join(_in_time(records)))
        for piece in pieces:
            piece.unlink(missing_ok=True)


def _pieces(folder: Place) -> list[Place]:
    """The files of processes, by name."""
    return sorted(folder.glob(_PIECES), key=lambda piece: piece.name)


def _in_time(records: list[bytes]) -> list[bytes]:
    """Records sorted by their time stamps; those that are equal stay in their order."""
    stamps = [record[:23] for record in records]
    return [records[place] for place in sorted(range(len(records)), key=stamps.__getitem__)]


def _records(content: bytes) -> Iterator[bytes]:
    """Records of a log, each with the lines that go on with it."""
    held = b""
    for line in content.splitlines(keepends=True):
        if held and _BEGINS.match(line):
            yield held
            held = b""
        held += line if line.endswith(b"\n") else line + b"\n"
    if held:
        yield held


def _stamps(content: bytes) -> list[bytes]:
    return [line[:23] for line in content.splitlines() if _BEGINS.match(line)]


class _Lines(io.TextIOBase):
    """A stream whose lines become records of a logger."""

    def __init__(self, name: str) -> None:
        self._logger, self._held = logging.getLogger(name), ""

    def write(self, text: str) -> int:
        """Log every line that is complete."""
        *lines, self._held = (self._held + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.critical("%s", line)  # printed on purpose, so never left out
        return len(text)


class Handler(logging.FileHandler):
    """Writes records to a file, each at once; what cannot be written is lost.

    In the place of one in an object store it writes to a local file without a name, of which nothing is left
    however the process ends; `put` copies it.
    """

    def __init__(self, file: Place, level: int) -> None:
        super().__init__(str(file), encoding="utf-8", delay=True)
        self._file, self._put = file, 0
        formatter = logging.Formatter(_FORMAT)
        formatter.converter = time.gmtime
        formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
        formatter.default_msec_format = "%s.%03d"
        self.setFormatter(formatter)
        self.setLevel(level)

    def _open(self) -> Any:
        if not isinstance(self._file, Path):
            return TemporaryFile("w+", encoding="utf-8")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def put(self) -> None:
        """Copy the file to its place in an object store, if it has grown."""
        with suppress(OSError, UserError, ValueError):
            if self.stream and not isinstance(self._file, Path) and (size := self.stream.tell()) > self._put:
                with files.atomic(self._file) as draft:
                    draft.write_bytes(os.pread(self.stream.fileno(), size, 0))
                self._put = size

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if there is room for it."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: it would be said to the stream that cannot be written."""


@contextmanager
def attached(handler: Handler) -> Iterator[None]:
    """During the block, records of this process also go to a handler."""
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, handler.level))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


_opened: dict[Logs, Handler] = {}


@contextmanager
def writing(logs: Logs | None) -> Iterator[None]:
    """In a worker process: log to its file during the block, and put everything back afterwards."""
    if logs is None:
        yield
        return
    if logs not in _opened:
        _open(logs)
    handler = _opened[logs]
    logging.captureWarnings(True)
    try:
        with attached(handler), redirect_stdout(_Lines("stdout")), redirect_stderr(_Lines("stderr")):
            yield
    finally:
        logging.captureWarnings(False)
        handler.put()


def _open(logs: Logs) -> None:
    """Begin the file of these logs; it is this process' only one."""
    for handler in _opened.values():
        handler.close()
    _opened.clear()
    handler = Handler(logs.piece(), logs.level)
    with suppress(OSError):
        handler.stream = handler._open()
        faulthandler.enable(handler.stream)
    _opened[logs] = handler
