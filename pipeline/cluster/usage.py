"""What work costs: CPU and GPU seconds, memory, retries, measured where it runs and summed per stage."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(eq=False)  # those that cost the same are not the same
class Usage:
    """Sum over the driver and the tasks of a stage."""

    tasks: int = 0
    retries: int = 0
    """How often a task or an actor was started again because its process or node died."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Wall seconds of tasks times the GPUs they held."""
    peak_memory: int = 0
    """Bytes: the most memory that one process had, up to the end of its last task."""
    nodes: set[str] = field(default_factory=set)
    """Ids of the nodes that tasks ran on; none where they ran in the driver."""

    def numbers(self) -> dict[str, float]:
        """What can be counted, for the record."""
        return {
            "tasks": self.tasks,
            "retries": self.retries,
            "cpu_seconds": round(self.cpu_seconds, 3),
            "gpu_seconds": round(self.gpu_seconds, 3),
            "peak_memory_mib": round(self.peak_memory / 2**20),
        }

    def add(self, found: Mapping[str, Any]) -> None:
        """Add the costs of one task, or of all calls of an actor."""
        self.tasks += found.get("tasks", 1)
        self.retries += found.get("retries", 0)
        self.cpu_seconds += found.get("cpu_seconds", 0.0)
        self.gpu_seconds += found.get("gpu_seconds", 0.0)
        self.peak_memory = max(self.peak_memory, found.get("peak_memory", 0))
        self.nodes |= {found["node"]} if "node" in found else set()


_collecting: list[Usage] = []
_adding = Lock()


@contextmanager
def collect() -> Iterator[Usage]:
    """Sum what is reported during the block in this process, and what the process itself costs meanwhile."""
    usage, cpu = Usage(), time.process_time()
    _collecting.append(usage)
    try:
        yield usage
    finally:
        _collecting.remove(usage)
        usage.cpu_seconds += time.process_time() - cpu
        usage.peak_memory = max(usage.peak_memory, peak_memory())


def report(found: Mapping[str, Any]) -> None:
    """Add a task's costs to the blocks that collect them."""
    with _adding:
        for usage in _collecting:
            usage.add(found)


def peak_memory() -> int:
    """Bytes: the most memory that this process had.

    What `getrusage` says on Linux is at least what the process that started this one had then.
    """
    status = Path("/proc/self/status")
    for line in status.read_text("ascii").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):  # some containers have no such line
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT
