"""Log files of workers, in a folder of the run: one for each process while it works, merged at the end.

They hold what Python logs, warnings, what the user's own code prints, and the stack of a process that
crashed. In an object store, which knows no appending, a file is put anew after each piece of work.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def piece(self) -> Place:
        """The file of this process."""
        return self.folder / f"worker-{socket.gethostname()}-{os.getpid()}.log"

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
        target = self.folder / MERGED
        records = [*_records(target.read_bytes())] if target.is_file() else []
        pieces = _pieces(self.folder)
        for piece in pieces:
            records += _records(piece.read_bytes())
        if records:
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
    """Writes records to a file, each at once."""

    def __init__(self, file: Path, level: int) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        formatter = logging.Formatter(_FORMAT)
        formatter.converter = time.gmtime
        formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
        formatter.default_msec_format = "%s.%03d"
        self.setFormatter(formatter)
        self.setLevel(level)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


_opened: dict[Logs, Path] = {}


@contextmanager
def writing(logs: Logs | None) -> Iterator[None]:
    """In a worker process: log to its file during the block, and afterwards until another takes over."""
    if logs is None:
        yield
        return
    if logs not in _opened:
        _open(logs)
    file, size = _opened[logs], _opened[logs].stat().st_size
    try:
        yield
    finally:
        if not isinstance(logs.folder, Path) and file.stat().st_size > size:
            with suppress(OSError):
                files.put(_copy(file), logs.piece())


def _open(logs: Logs) -> None:
    """Send all records of this process to the file of these logs."""
    piece = logs.piece()
    file = piece if isinstance(piece, Path) else Path(tempfile.mkdtemp(prefix="ood-pipeline-")) / piece.name
    handler, root = Handler(file, logs.level), logging.getLogger()
    for other in [each for each in root.handlers if isinstance(each, Handler)]:
        root.removeHandler(other)
        other.close()
    root.addHandler(handler)
    root.setLevel(min(logs.level, logging.WARNING))
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = _Lines("stdout"), _Lines("stderr")
    handler.stream = handler._open()
    faulthandler.enable(handler.stream)
    _opened.clear()
    _opened[logs] = file


def _copy(file: Path) -> Path:
    """A file as it is now: uploading maps it into memory, and it may grow."""
    copy = file.with_suffix(".copy")
    copy.write_bytes(file.read_bytes())
    return copy
