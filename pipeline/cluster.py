"""The Ray cluster a run uses: connected to, or started on this machine, quiet, and asked for what it has."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read when ray is imported
import ray

from pipeline.errors import UserError

T = TypeVar("T")


@contextmanager
def session() -> Iterator[None]:
    """Ends the connection that something inside the block opened; one that was open before stays open."""
    ours = not ray.is_initialized()
    try:
        yield
    finally:
        if ours and ray.is_initialized():
            ray.shutdown()


def connect() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one here; nothing if there is a connection."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        if (os.cpu_count() or 1) < 2:
            local["num_cpus"] = 2  # one for an index actor, one for the tasks that ask it
        where = {} if "RAY_ADDRESS" in os.environ else local
        with _without_greeting():
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    quiet()


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Keep the line in which Ray's core announces its log level off the screen; other lines come late."""
    with tempfile.TemporaryFile() as held:
        screen = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            held.seek(0)
            for line in held:
                if b"Set ray log level" not in line:
                    os.write(2, line)


def quiet() -> None:
    """Keep Ray Data's own bars and log lines away from ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def capacity(cpus: float, gpus: float, what: str, spare: int = 0) -> int:
    """How many actors of this size the cluster holds at once, beside `spare` CPUs for tasks.

    Raises:
        UserError: if not even one fits.
    """
    connect()
    have = ray.cluster_resources()
    fits = [int(max(have.get("CPU", 0) - spare, 0) / cpus)]
    if gpus:
        fits.append(int(have.get("GPU", 0) / gpus))
    if min(fits) < 1:
        beside = f" beside {spare} CPU for tasks" if spare else ""
        raise UserError(
            f"{what}: one needs {cpus:g} CPU and {gpus:g} GPU{beside}, the cluster has "
            f"{have.get('CPU', 0):g} CPU and {have.get('GPU', 0):g} GPU. "
            "Lower the resources in the config or add nodes."
        )
    return min(fits)


def in_order(function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Run a function as Ray tasks and yield the results in the order of the arguments.

    Only about two tasks per CPU are under way at once, so results do not pile up. A `UserError` that a
    task raises comes out as it is.
    """
    connect()
    task = ray.remote(function).options(num_cpus=1)
    width = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for item in arguments:
        waiting.append(task.remote(*item))
        if len(waiting) >= width:
            yield get(waiting.popleft())
    while waiting:
        yield get(waiting.popleft())


def get(reference: Any) -> Any:
    """`ray.get` that lets a `UserError` of the worker through as itself."""
    with user_errors():
        return ray.get(reference)


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside the block, a `UserError` that a Ray task or actor raised comes out as itself."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def receipt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a Ray Data function returns: its receipt, or a `UserError` as text, which Ray Data would bury."""
    try:
        return {**work(), "failure": ""}
    except UserError as error:
        return {"failure": str(error)}


def receipts(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Run a dataset of receipts and yield them as they come.

    Raises:
        UserError: the first that a worker raised.
    """
    for row in dataset.iter_rows():
        if row["failure"]:
            raise UserError(row["failure"])
        yield row
