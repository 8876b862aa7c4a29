"""What work costs: CPU and GPU seconds, memory, retries, measured where it runs and summed per stage."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass
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
    """Ray's ids of the nodes that tasks ran on."""

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
        """Add what `metered` found out about one task."""
        self.tasks += 1
        self.retries += found["retries"]
        self.cpu_seconds += found["cpu_seconds"]
        self.gpu_seconds += found["gpu_seconds"]
        self.peak_memory = max(self.peak_memory, found["peak_memory"])
        self.nodes.add(found["node"])


_collecting: list[Usage] = []
_told_by_actor: list[bool] = []


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
        usage.peak_memory = max(usage.peak_memory, _peak_memory())


def report(found: Mapping[str, Any]) -> None:
    """Add a task's costs to the blocks that collect them."""
    for usage in _collecting:
        usage.add(found)


@contextmanager
def metered() -> Iterator[dict[str, Any]]:
    """Measure the block, the work of a Ray task or actor call; the result is filled in at its end."""
    found: dict[str, Any] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= _costs(time.perf_counter() - wall, time.process_time() - cpu)


def of_process() -> dict[str, Any]:
    """What this process has cost since its start, all tasks together."""
    return _costs(0.0, time.process_time())


def _costs(wall: float, cpu: float) -> dict[str, Any]:
    context = ray.get_runtime_context() if _in_worker() else None  # elsewhere, asking for it starts Ray
    return {
        "cpu_seconds": cpu,
        "gpu_seconds": wall * context.get_assigned_resources().get("GPU", 0.0) if context else 0.0,
        "peak_memory": _peak_memory(),
        "retries": _untold_restarts(),
        "node": context.get_node_id() if context else "",
    }


def restarts() -> int:
    """How often the process or node of this Ray task or actor was lost before; of an actor only whether.

    Ray counts the attempts at a task, but has no public function that tells.
    """
    if not _in_worker():
        return 0
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        return int(context.was_current_actor_reconstructed)
    return int(_worker().core_worker.get_current_task_attempt_number())


def _untold_restarts() -> int:
    """The restarts; of an actor only in the first call of its new process."""
    if _told_by_actor:
        return 0
    if _in_worker() and ray.get_runtime_context().get_actor_id() is not None:
        _told_by_actor.append(True)
    return restarts()


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT


def _in_worker() -> bool:
    return bool(_worker().mode == ray._private.worker.WORKER_MODE)


def _worker() -> Any:
    return ray._private.worker.global_worker
