"""The Ray cluster a run uses: connected to, or started on this machine, quiet, and asked for what it has.

Work goes out as tasks, actors or Ray Data functions; what it costs is metered where it runs and comes back
with its result.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read when ray is imported
import ray
from ray import cloudpickle, exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import imports
from pipeline.cluster import usage
from pipeline.errors import AGAIN, UserError
from pipeline.workspace.files import Place

T = TypeVar("T")

RESTARTS = 8
"""How often an actor is started again, and a call repeated, whose process or node died."""

_CURES = {
    exceptions.OutOfDiskError: "Free space where Ray keeps its objects (/tmp/ray, or where `ray start "
    "--object-spilling-directory` says)",
    exceptions.ObjectStoreFullError: "Give Ray a larger --object-store-memory, or lower extract.shard_rows",
    exceptions.OutOfMemoryError: "Lower extract.batch_size or the number of actors, or add memory",
    exceptions.WorkerCrashedError: "Its logs lie in /tmp/ray/session_latest/logs; often memory ran out",
    exceptions.ActorDiedError: "Its logs lie in /tmp/ray/session_latest/logs; often memory ran out",
    exceptions.ActorUnavailableError: "Its node does not answer; look at the cluster with `ray status`",
    exceptions.NodeDiedError: "Look at the cluster with `ray status`",
}
"""What to do about a failure of Ray's that is not the pipeline's."""

_unseen: list[Path] = []
"""The folder still to be looked for on all nodes, as soon as there is a connection."""


@contextmanager
def session(workspace: Place | None = None) -> Iterator[None]:
    """Ends the connection that something inside the block opened; one that was open before stays open.

    Args:
        workspace: if it is a local folder, every node must see it.
    """
    ours = not ray.is_initialized()
    _unseen[:] = [workspace] if isinstance(workspace, Path) else []
    try:
        yield
    finally:
        if ours and ray.is_initialized():
            ray.shutdown()


def connect() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one here; nothing if there is a connection.

    Raises:
        UserError: if there is no such cluster, or a node does not see a folder that it should.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        if (os.cpu_count() or 1) < 2:
            local["num_cpus"] = 2  # one for an index actor, one for the tasks that ask it
        where = {} if "RAY_ADDRESS" in os.environ else local
        try:
            with _without_greeting():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, exceptions.RayError) as error:
            address = os.environ.get("RAY_ADDRESS", "local")
            raise UserError(
                f"RAY_ADDRESS: cannot connect to {address}: {_first_line(error)}. Check that it runs "
                "and that this machine has its token (RAY_AUTH_TOKEN); or unset it to use this machine alone."
            ) from None
    quiet()
    while _unseen:
        _require_seen(_unseen.pop())


def carry(kind: type) -> None:
    """Send objects of a foreign class' module with their code: workers need not be able to import it."""
    if imports.is_foreign(kind):
        cloudpickle.register_pickle_by_value(sys.modules[kind.__module__])


def nodes(dead: bool = False) -> dict[str, dict[str, Any]]:
    """The nodes that are alive, or also those that were, by Ray's id: address, host name and resources."""
    return {
        node["NodeID"]: {
            "address": node["NodeManagerAddress"],
            "host": node["NodeManagerHostname"],
            "resources": {
                name: amount
                for name, amount in sorted(node["Resources"].items())
                if not name.startswith(("node:", "object_store"))
            },
        }
        for node in (ray.nodes() if ray.is_initialized() else ())
        if node["Alive"] or dead
    }


def _require_seen(folder: Path) -> None:
    """Refuse a folder that is not the same one on every node."""
    others = nodes()
    others.pop(ray.get_runtime_context().get_node_id(), None)
    if not others:
        return
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        look = ray.remote(os.path.exists)
        asked = {
            node: look.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(str(mark))
            for node in others
        }
        blind = [others[node]["host"] for node, answer in asked.items() if not _answer(answer)]
    finally:
        mark.unlink()
    if blind:
        raise UserError(
            f"workspace: {folder} is a folder of this machine that {len(blind)} of {len(others)} other nodes "
            f"do not see ({', '.join(sorted(blind)[:3])}). On a cluster the workspace must be a folder that "
            "all nodes share, or an object store (s3://bucket/prefix)."
        )


def _answer(reference: Any) -> bool:
    """What a node says; one that died meanwhile does no harm."""
    try:
        return bool(ray.get(reference))
    except exceptions.RayError:
        return True


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


def capacity(needs: Mapping[str, float], what: str, spare: int = 0) -> int:
    """How many actors with these needs the cluster holds at once, beside `spare` CPUs for tasks.

    Args:
        needs: amounts by resource: CPU, GPU, and resources of the cluster's own.
        what: section of the config that asks.
        spare: CPUs to be left over.

    Raises:
        UserError: if not even one fits on any node.
    """
    connect()
    have = [node["resources"] for node in nodes().values()]
    wanted = {name: amount for name, amount in needs.items() if amount}
    fits = sum(
        min(int(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items()) for node in have
    )
    cpus, each = sum(node.get("CPU", 0) for node in have), needs["CPU"]
    fits = min(fits, int((cpus - spare) / each + 1e-9))
    if fits < 1:
        beside = f" beside {spare} CPU for tasks" if spare else ""
        offers = "; ".join(sorted({_amounts(node, {**needs, "GPU": 0}) for node in have}))
        raise UserError(
            f"{what}: one actor needs {_amounts(wanted, wanted)} on one node{beside}; the cluster's nodes "
            f"have {offers}. Lower the resources in the config or add nodes."
        )
    return fits


def _amounts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in names)


def actor(kind: type, needs: Mapping[str, float], *arguments: Any, spread: bool = False) -> Any:
    """Start an actor with these needs; it and its calls survive the loss of its process or node.

    What it must know comes with its arguments: after a restart it begins again from them.
    """
    own = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")}
    remote = ray.remote(kind).options(
        num_cpus=needs["CPU"],
        num_gpus=needs["GPU"],
        resources=own,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        scheduling_strategy="SPREAD" if spread else "DEFAULT",
    )
    return remote.remote(*arguments)


def in_order(function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Run a function as Ray tasks and yield the results in the order of the arguments.

    Only about two tasks per CPU are under way at once, so results do not pile up. A `UserError` that a
    task raises comes out as it is.
    """
    connect()
    task = ray.remote(measured).options(num_cpus=1, max_retries=RESTARTS, name=function.__name__)
    width = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for item in arguments:
        waiting.append(task.remote(function, *item))
        if len(waiting) >= width:
            yield metered(waiting.popleft())
    while waiting:
        yield metered(waiting.popleft())


def measured(function: Callable[..., T], *arguments: Any) -> tuple[T, dict[str, Any]]:
    """What a Ray task or actor call returns: a result and what it cost; `metered` takes it apart."""
    with usage.metered() as costs:
        result = function(*arguments)
    return result, costs


def metered(reference: Any) -> Any:
    """The result of a metered call; its costs are reported."""
    result, costs = get(reference)
    usage.report(costs)
    return result


def get(reference: Any) -> Any:
    """`ray.get` that lets a `UserError` of the worker through as itself."""
    with user_errors():
        return ray.get(reference)


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside the block, a `UserError` that a Ray task or actor raised comes out as itself.

    Raises:
        UserError: also where the cluster failed, which running again mends or continues.
    """
    try:
        yield
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except tuple(_CURES) as error:
        cure = next(cure for kind, cure in _CURES.items() if isinstance(error, kind))
        raise UserError(f"Ray: {_first_line(error)}. {cure}. {AGAIN}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), repr(error))


def receipt(work: Callable[[], dict[str, Any]], before: Iterable[Any] = ()) -> dict[str, Any]:
    """What a Ray Data function returns: its receipt with its costs and those of functions `before` it.

    A `UserError` is returned as text, because Ray Data would bury it.
    """
    found: dict[str, Any] = {}
    failure = ""
    with usage.metered() as costs:
        try:
            found = work()
        except UserError as error:
            failure = str(error)
    return {**found, "costs": [*before, costs], "failure": failure}


def receipts(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Run a dataset of receipts and yield them as they come; their costs are reported.

    Raises:
        UserError: the first that a worker raised.
    """
    with user_errors():
        for row in dataset.iter_rows():
            if row["failure"]:
                raise UserError(row["failure"])
            for costs in row["costs"]:
                usage.report(costs)
            yield row
