"""What runs inside Ray's workers around the work: its log is opened, its cost measured, its restarts told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import ray

from pipeline.cluster import attempts, logs, usage
from pipeline.cluster.logs import Logs

T = TypeVar("T")

copied: dict[str, Any] = {}
"""Objects that the work at hand asks in this process, by the names of their `Copies`."""

_at_hand = ""
_told_by_actor: list[bool] = []


def measured(
    where: Logs | None, work: str, function: Callable[..., T], *arguments: Any
) -> tuple[T, dict[str, Any]]:
    """What a Ray task returns: a result and what it cost."""
    with metered(where, work) as costs:
        result = function(*arguments)
    return result, costs


def hosted(kind: type) -> type:
    """A class whose objects are Ray actors around one of another class; it has the other's name."""

    class Hosted:
        def __init__(self, where: Logs | None, *arguments: Any) -> None:
            self._where, self._costs = where, usage.Usage()
            with metered(where) as costs:
                self._object = kind(*arguments)
            self._costs.retries += costs["retries"]

        def call(self, method: str, *arguments: Any) -> Any:
            """Result of a method of the object."""
            with metered(self._where) as costs:
                result = getattr(self._object, method)(*arguments)
            self._costs.add(costs)
            return result

        def measured(self, method: str, *arguments: Any) -> tuple[Any, dict[str, Any]]:
            """Result of a method of the object, and what it cost, the start of this process included."""
            with metered(self._where) as costs:
                result = getattr(self._object, method)(*arguments)
            costs["retries"] += self._costs.retries
            self._costs.retries = 0
            return result, costs

        def costs(self) -> dict[str, Any]:
            """What the process has cost since its start, all calls together."""
            own = self._costs
            return {
                "tasks": own.tasks,
                "retries": own.retries,
                "cpu_seconds": time.process_time(),
                "gpu_seconds": own.gpu_seconds,
                "peak_memory": usage.peak_memory(),
                "node": ray.get_runtime_context().get_node_id(),
            }

    Hosted.__name__ = Hosted.__qualname__ = kind.__name__
    return Hosted


@contextmanager
def metered(where: Logs | None, work: str = "") -> Iterator[dict[str, Any]]:
    """Measure the block, a task or an actor's call; the result is filled in at its end.

    Args:
        where: logs go to.
        work: that a task belongs to; copies that other work has left in this process are dropped.
    """
    _begin(work)
    found: dict[str, Any] = {}
    wall, cpu, again = time.perf_counter(), time.process_time(), restarts()
    with logs.writing(where), attempts.replacing(again > 0):
        yield found
    context = ray.get_runtime_context()
    gpus = context.get_assigned_resources().get("GPU", 0.0)
    found |= {
        "cpu_seconds": time.process_time() - cpu,
        "gpu_seconds": (time.perf_counter() - wall) * gpus,
        "peak_memory": usage.peak_memory(),
        "retries": 0 if _is_told() else again,
        "node": context.get_node_id(),
    }


def _begin(work: str) -> None:
    """Drop what other work has left: Ray keeps its processes, and nobody asked a node for that memory."""
    global _at_hand  # a process does one work at a time
    if work != _at_hand:
        copied.clear()
        _at_hand = work


def restarts() -> int:
    """How often the process or node of this Ray task or actor was lost before; of an actor only whether.

    Ray counts the attempts at a task, but has no public function that tells.
    """
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        return _reconstructed()
    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())


@cache
def _reconstructed() -> int:
    """Whether this actor's process stands in for a lost one; asking the cluster takes a while."""
    return int(ray.get_runtime_context().was_current_actor_reconstructed)


def _is_told() -> bool:
    """Whether an actor has told of its restart, which it does in the first call of its new process."""
    if _told_by_actor:
        return True
    if ray.get_runtime_context().get_actor_id() is not None:
        _told_by_actor.append(True)
    return False
