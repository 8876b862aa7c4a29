"""Peak memory of a process and of everything it starts, sampled from /proc (Linux).

Anonymous is what a process has asked the system for. RSS also counts pages of files, which the system takes
back when it needs room, and of Ray's object store, which is shared: each that the process has touched.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PERIOD = 0.25
"""Seconds between two samples; shorter peaks are missed, and more samples slow down what is measured."""

KINDS = {
    "Extractor": "model actor",
    "ray::Worker": "model actor of the extra passes",
    "ray::IndexShard": "index actor",
    r"ray::(score_part|_assembled)\b": "score task",
    r"ray::(_sums|_whole|_write_bank|_fit)\b": "fit task",
    r"ray::(_evaluate|_sample)\b": "evaluate task",
    r"ray::(_discovered|_decided)\b": "decision task",
    r"ray::_compare\b": "duplicates task",
}
"""Process titles that Ray gives its workers -> what is shown."""

DRIVER = "driver"


class Watch:
    """Samples until the end of the `with` block, and once there: a short one is not left out."""

    def __init__(self, pid: int, period: float = PERIOD) -> None:
        self.pid, self.period = pid, period
        self.cpu = 0.0
        """Seconds that sampling took of this process, once the block has ended."""
        self.peaks: dict[str, tuple[int, int]] = {}
        """Kind of process -> largest anonymous memory and RSS in bytes of any one process of that kind."""
        self._kind: dict[int, str] = {pid: DRIVER}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(self.period)
            for pid in family(self.pid):
                try:
                    self._sample(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has just ended
        self.cpu = time.thread_time()

    def _sample(self, pid: int) -> None:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if pid != self.pid:
            for pattern, shown in KINDS.items():
                if re.search(pattern, title):
                    self._kind[pid] = shown
        if kind := self._kind.get(pid):  # a worker between two tasks keeps the kind of the last
            anonymous, rss = usage(pid)
            peak = self.peaks.get(kind, (0, 0))
            self.peaks[kind] = (max(peak[0], anonymous), max(peak[1], rss))


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += children.get(found, [])


def usage(pid: int) -> tuple[int, int]:
    """Anonymous memory and RSS in bytes."""
    found = {"RssAnon": 0, "VmRSS": 0}  # of a process that has ended there is neither
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]
