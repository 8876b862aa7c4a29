"""The engine on Ray: a cluster is connected to, or started on this machine, when work comes.

Tasks and actors for everything but extraction, which streams through Ray Data (`ray_data`). What work costs
is metered where it runs and comes back with its result.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import secrets
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read when ray is imported
import ray
from ray import cloudpickle, exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from threadpoolctl import threadpool_limits

from pipeline import imports
from pipeline.cluster import ray_data, usage
from pipeline.cluster.engine import Decode, Needs, Pending, Row, Work
from pipeline.cluster.inline import Held
from pipeline.cluster.logs import Logs
from pipeline.cluster.ray_worker import copied, hosted, measured
from pipeline.errors import AGAIN, UserError
from pipeline.workspace.files import Place

T = TypeVar("T")

_log = logging.getLogger(__name__)

RESTARTS = 8
"""How often an actor is started again, and a call repeated, whose process or node died."""

_TOKEN = "RAY_AUTH_TOKEN"

_kept = 0
"""Blocks that a connection of ours is kept for; none where there was one before them."""

_STOPPING = 10.0
"""Seconds that an actor has to say what it cost; one that is just being started again is not waited for."""

_PATIENCE = 30.0
"""Seconds that a gang waits for room before it steps back; twice as long each time."""

_SLOW = 10
"""How many times as long it waits where there are CPUs that nobody holds: processes may start slowly."""

_START = 10.0
"""Seconds in which actors that there is room for are expected to begin."""

LAG = 3.0
"""Seconds in which Ray knows of room that our own work has left."""

_CURES = {
    exceptions.OutOfDiskError: "Free space where Ray keeps its objects (/tmp/ray, or where `ray start "
    "--object-spilling-directory` says)",
    exceptions.ObjectStoreFullError: "Give Ray a larger --object-store-memory, or lower extract.shard_rows",
    exceptions.OutOfMemoryError: "Lower extract.batch_size or the number of actors, or add memory",
    exceptions.WorkerCrashedError: "Its logs lie in /tmp/ray/session_latest/logs; often memory ran out",
    exceptions.ActorDiedError: "Its logs lie in /tmp/ray/session_latest/logs; often memory ran out",
    exceptions.ActorUnavailableError: "Its node does not answer; look at the cluster with `ray status`",
    exceptions.NodeDiedError: "Look at the cluster with `ray status`",
    exceptions.LocalRayletDiedError: "Its logs lie in /tmp/ray/session_latest/logs",
}
"""What to do about a failure of Ray's that is not the pipeline's."""


@contextmanager
def session(workspace: Place | None, logs: Logs | None, read: Sequence[Path] = ()) -> Iterator[OnRay]:
    """The engine. A connection that it opened ends with the block; one that was open before stays open.

    Libraries compute with one thread in the driver, too: what it fits has the same bits on any machine of a
    kind, and with any engine.
    """
    logs = logs and replace(logs, session=uuid.uuid4().hex[:8])
    try:
        with kept(), _left_if_lost(), threadpool_limits(limits=1):
            yield OnRay(logs, [workspace] if isinstance(workspace, Path) else [], [*read])
    finally:
        if logs is not None:
            logs.merge()


@contextmanager
def kept() -> Iterator[None]:
    """A connection that is opened in the block stays open until its end, also between sessions."""
    global _kept  # as the connection is: Ray has one a process
    ours, token = bool(_kept) or not ray.is_initialized(), os.environ.get(_TOKEN)
    _kept += ours
    try:
        yield
    finally:
        _kept -= ours
        if ours and not _kept:
            if ray.is_initialized():
                ray.shutdown()
            if token is None:
                os.environ.pop(_TOKEN, None)


@contextmanager
def _left_if_lost() -> Iterator[None]:
    """A connection of ours ends if what fails in the block has lost it: the next session opens another."""
    try:
        yield
    except Exception as error:
        if _kept and ray.is_initialized() and _is_lost(error):
            ray.shutdown()
        raise


def _is_lost(error: Exception) -> bool:
    """Whether the node that this process works through is gone; without a head, Ray ends the process."""
    lost = exceptions.LocalRayletDiedError, exceptions.RaySystemError
    if isinstance(error, lost) or isinstance(error.__context__, lost):  # told as a `UserError`
        return True
    try:
        return ray.get_runtime_context().get_node_id() not in nodes()
    except exceptions.RayError:  # nobody answers
        return True


def connect() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one here; nothing if there is a connection.

    Raises:
        UserError: if there is no such cluster.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        if (os.cpu_count() or 1) < 2:
            local["num_cpus"] = 2  # one for an index actor, one for the tasks that ask it
        where = {} if "RAY_ADDRESS" in os.environ else local
        if where and not {_TOKEN, "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ[_TOKEN] = _own_token()  # else Ray keeps one in a file, which others may read
        try:
            with _without_greeting():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, exceptions.RayError) as error:
            address = os.environ.get("RAY_ADDRESS", "local")
            raise UserError(
                f"RAY_ADDRESS: cannot connect to {address}: {_first_line(error)}. Check that it runs "
                "and that this machine has its token (RAY_AUTH_TOKEN); or unset it to use this machine alone."
            ) from None
    ray_data.quiet()


@cache
def _own_token() -> str:
    """What gives access to the Rays that this process starts; the same for all, as Ray reads it once."""
    return secrets.token_hex(32)


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


@dataclass(frozen=True)
class Put(Generic[T]):
    """A value in Ray's object store."""

    reference: Any

    def get(self) -> T:
        """The value; arrays are views of the store, which cannot be written to."""
        return ray.get(self.reference)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Handle:
    """A Ray actor."""

    actor: Any

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Begin a call of one of its methods."""
        reference = self.actor.call.remote(method, *arguments)
        return lambda: get(reference)

    def send(self, value: T) -> Put[T]:
        """Put a value into the object store."""
        return Put(ray.put(value))

    def stop(self) -> None:
        """End it and report what it cost."""
        with suppress(exceptions.RayError):
            usage.report(ray.get(self.actor.costs.remote(), timeout=_STOPPING))
        ray.kill(self.actor)


@dataclass(frozen=True)
class Copies:
    """An object in each process that asks it; what it costs, whoever asks does."""

    name: str
    """Tells it from others."""
    kind: type
    arguments: tuple[Any, ...]

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Call a method of this process' own."""
        result = getattr(self._own(), method)(*arguments)
        return lambda: result

    def _own(self) -> Any:
        if self.name not in copied:
            copied[self.name] = self.kind(*self.arguments)
        return copied[self.name]

    def send(self, value: T) -> Held[T]:
        """The value itself."""
        return Held(value)

    def stop(self) -> None:
        """Drop this process' own; each other goes with its process, or when other work begins there."""
        copied.pop(self.name, None)


@dataclass(frozen=True)
class Handles:
    """Ray actors that share the calls."""

    members: tuple[Handle, ...]
    logs: Logs | None

    def each(self, method: str, arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of a method, in the order of the arguments; whoever is free takes the next call.

        An actor that waits for room, which other work may hold for long, is given none.
        """
        todo = deque(enumerate(arguments))
        count, done = len(todo), dict[int, Any]()
        begun = {member.actor.costs.remote(): (-1, member.actor) for member in self.members}
        with told(self.logs):
            if count <= len(self.members):  # each has one call at most, if it can
                ray.wait(list(begun), num_returns=len(begun), timeout=_START)
            for number in range(count):
                while number not in done:
                    (reference,), _ = ray.wait(list(begun), num_returns=1)
                    finished, actor = begun.pop(reference)
                    found = ray.get(reference)
                    if finished >= 0:
                        done[finished], costs = found
                        usage.report(costs)
                    if todo:
                        following, given = todo.popleft()
                        begun[actor.measured.remote(method, *given)] = following, actor
                yield done.pop(number)

    def stop(self) -> None:
        """End the actors; what they cost came with their results."""
        for member in self.members:
            ray.kill(member.actor)


@dataclass(frozen=True)
class OnRay:
    """The engine."""

    logs: Logs | None
    unseen: list[Path] = field(default_factory=list)
    """The workspace still to be looked for on all nodes, as soon as there is a connection."""
    unread: list[Path] = field(default_factory=list)
    """The same for folders that are not written to."""
    here = False

    def connect(self) -> None:
        """Connect, and look whether all nodes see the folders.

        Raises:
            UserError: if there is no cluster, or a node does not see a folder.
        """
        connect()
        while self.unseen:
            _require_seen(self.unseen.pop())
        while self.unread:
            _require_there(self.unread.pop())

    def carry(self, kinds: Iterable[type]) -> None:
        """Send foreign classes with their modules' code: workers need not be able to import it."""
        for kind in kinds:
            if imports.is_foreign(kind):
                for module in imports.modules_of(kind):
                    cloudpickle.register_pickle_by_value(module)

    def cpus(self) -> float:
        """CPUs of the cluster."""
        self.connect()
        return float(ray.cluster_resources().get("CPU", 1))

    def gpus(self) -> float:
        """GPUs of the cluster."""
        self.connect()
        return float(ray.cluster_resources().get("GPU", 0))

    def nodes(self, dead: bool = False) -> dict[str, dict[str, Any]]:
        """The nodes of the cluster; none before there is a connection."""
        return nodes(dead)

    def threads(self, needs: Needs) -> int:
        """As many as it has CPUs."""
        return max(1, int(needs["CPU"]))

    def capacity(self, needs: Needs, what: str, spare: int = 0) -> int:
        """How many actors with these needs the cluster holds at once, beside `spare` CPUs for tasks.

        Raises:
            UserError: if not even one fits on any node.
        """
        fits = self._fits(needs, spare)
        if fits < 1:
            have = [node["resources"] for node in nodes().values()]
            wanted = {name: amount for name, amount in needs.items() if amount}
            beside = f" beside {spare} CPU for tasks" if spare else ""
            offers = "; ".join(sorted({_amounts(node, {**needs, "GPU": 0}) for node in have}))
            lower = "Lower the resources in the config"
            if wanted.get("GPU") and not any(node.get("GPU") for node in have):
                lower += " (with `hardware: cpu` it needs no GPU)"
            raise UserError(
                f"{what}: one actor needs {_amounts(wanted, wanted)} on one node{beside}; the cluster's "
                f"nodes have {offers}. {lower} or add nodes."
            )
        return fits

    def holds(self, needs: Needs, count: int, spare: int = 0) -> bool:
        """Whether the cluster has room for that many actors beside CPUs for tasks."""
        return count <= self._fits(needs, spare)

    def _fits(self, needs: Needs, spare: int) -> int:
        self.connect()
        have = [node["resources"] for node in nodes().values()]
        wanted = {name: amount for name, amount in needs.items() if amount}

        def fits(node: Mapping[str, float], less: int = 0) -> int:
            left = {**node, "CPU": node.get("CPU", 0) - less}
            return min(int(left.get(name, 0) / amount + 1e-9) for name, amount in wanted.items())

        spared = [fits(node) - fits(node, spare) for node in have if node.get("CPU", 0) >= spare]
        return sum(map(fits, have)) - min(spared) if spared else 0

    def share(self, value: T) -> Put[T]:
        """Put a value into the object store."""
        self.connect()
        return Put(ray.put(value))

    def in_order(
        self,
        function: Callable[..., T],
        arguments: Iterable[tuple[Any, ...]],
        memory: Callable[..., int] | None = None,
        beside: Sequence[int] = (),
    ) -> Iterator[T]:
        """Results of a function as Ray tasks, in the order of the arguments.

        Only about two tasks per CPU are under way at once, so results do not pile up.
        """
        self.connect()
        _tell_if_full({"CPU": 1}, function.__name__)
        task, options = ray.remote(measured), {"max_retries": RESTARTS, "name": function.__name__}
        work = uuid.uuid4().hex
        width = 2 * max(1, int(self.cpus()))
        asked = cache(partial(_asked, function.__name__, beside=beside))
        waiting: deque[Any] = deque()
        try:
            for given in arguments:
                need = None if memory is None else asked(memory(*given))
                sized = task.options(num_cpus=1, memory=need, **options)
                waiting.append(sized.remote(self.logs, work, function, *given))
                if len(waiting) >= width:
                    yield self._metered(waiting.popleft())
            while waiting:
                yield self._metered(waiting.popleft())
        finally:
            for reference in waiting:  # after an error: nobody waits for them
                ray.cancel(reference)

    def _metered(self, reference: Any) -> Any:
        """The result of a task; its costs are reported."""
        with told(self.logs):
            result, costs = ray.get(reference)
        usage.report(costs)
        return result

    def stream(
        self,
        rows: Sequence[Row],
        decode: Decode | None,
        worker: Work,
        needs: Needs,
        count: int,
    ) -> Iterator[Row]:
        """Receipts of rows that go through one execution of Ray Data, as they come.

        A decoding task asks for the memory that it may hold, but for at most half of that of the smallest
        node with a CPU: it fits on each.
        """
        self.connect()
        if decode is not None:
            found = [node["resources"] for node in nodes().values()]
            have = [each.get("memory", 0) for each in found if each.get("CPU", 0) >= 1]
            decode = (*decode[:2], int(min(decode[2], min(filter(None, have), default=0) // 2)))
        # an actor that took the last CPU would wait for its decoding tasks, and others' actors for theirs
        beside = needs if decode is None else {**needs, "CPU": needs["CPU"] + 1}
        _tell_if_full(beside, worker[0].__name__, wait=decode is not None)
        with told(self.logs):
            yield from ray_data.stream(rows, decode, worker, needs, count, self.logs)

    def gang(self, kind: type, needs: Needs, arguments: Sequence[tuple[Any, ...]]) -> tuple[Handle, ...]:
        """Actors that all run, with a CPU beside them for tasks.

        While other work holds some of that, they step back from the rest and try again: two runs that each
        held a part of what they need would wait for each other for ever.
        """
        self.connect()
        patience = _PATIENCE
        while True:
            handles = tuple(self._start(kind, needs, given, "SPREAD") for given in arguments)
            runs = False
            try:
                runs = _all_run(handles, needs, patience)
            finally:
                if not runs:
                    for handle in handles:
                        ray.kill(handle.actor)
            if runs:
                return handles
            _log.warning(
                "%s: %d actors with %s each and a CPU for tasks found no room at once within %.0f s, as "
                "other work holds the cluster; they try again",
                *(kind.__name__, len(handles), _amounts(needs, filter(needs.get, needs)), patience),
            )
            time.sleep(random.uniform(0.1, 0.5) * patience)
            patience *= 2

    def _start(self, kind: type, needs: Needs, arguments: tuple[Any, ...], where: str = "DEFAULT") -> Handle:
        """An actor; it and its calls survive the loss of its process or node."""
        own = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
        remote = ray.remote(hosted(kind)).options(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            memory=needs.get("memory"),
            resources=own,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy=where,
        )
        return Handle(remote.remote(self.logs, *arguments))

    def copied(self, kind: type, *arguments: Any) -> Copies:
        """An object in each process that asks it."""
        return Copies(uuid.uuid4().hex, kind, arguments)

    def pool(self, kind: type, needs: Needs, count: int, *arguments: Any) -> Handles:
        """Actors that share the calls."""
        self.connect()
        _tell_if_full(needs, kind.__name__)
        return Handles(tuple(self._start(kind, needs, arguments) for _ in range(count)), self.logs)


def _all_run(handles: Sequence[Handle], needs: Needs, patience: float) -> bool:
    """Whether actors have begun after a while, and then a task does.

    They are waited for longer where nobody holds what one of them needs: processes may start slowly.
    """
    until = time.monotonic() + _SLOW * patience
    actors: list[Callable[[], Any]] = [handle.actor.costs.remote for handle in handles]
    for begins, each in (actors, needs), ([ray.remote(_nothing).remote], {"CPU": 1}):
        waiting = [begin() for begin in begins]
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=patience)
            if waiting and (_lacking(each) or time.monotonic() > until):
                for reference in waiting:
                    ray.cancel(reference)
                return False
    return True


def _nothing() -> None:
    """What a task does that only shows that there is room for one."""


def _tell_if_full(needs: Needs, what: str, wait: bool = False) -> None:
    """Say that work will have to wait if others hold all there is of something it needs.

    Args:
        needs: of the work.
        what: is to be done.
        wait: until they no longer do.
    """
    until, told = time.monotonic() + LAG, False
    while full := _lacking(needs):
        if not told and time.monotonic() > until:
            has = _amounts(ray.cluster_resources(), full)
            _log.warning("%s: waits, as other work holds the cluster (%s)", what, has)
            told = True
        if told and not wait:
            return
        time.sleep(0.1)


def _lacking(needs: Needs) -> list[str]:
    """Resources of which the cluster has less left than a worker needs."""
    left = ray.available_resources()
    return [name for name, amount in needs.items() if amount and left.get(name, 0) < amount]


def _asked(task: str, need: int, beside: Sequence[int]) -> int | None:
    """Bytes that a task asks a node for; None where nodes do not say what they have.

    Actors ask for none: Ray takes only CPUs back from tasks that wait, so an actor that begins again after
    its process died could wait for the memory of tasks that wait for its answer. Tasks ask for more instead.
    """
    found = [node["resources"] for node in nodes().values()]
    have = sorted(int(each["memory"]) for each in found if each.get("CPU", 0) >= 1 and "memory" in each)
    if not have:
        return None
    held = sum(sorted(beside, reverse=True)[: math.ceil(len(beside) / len(have))])  # where most actors are
    room = [each for each in have if each >= need + held]
    if room:
        return need * room[0] // (room[0] - held)
    _log.warning(
        "%s: a task may hold %.1f GiB, beside actors %.1f GiB; the largest node has %.1f GiB: it runs alone",
        *(task, need / 2**30, held / 2**30, have[-1] / 2**30),
    )
    return have[-1]


def _require_seen(folder: Path) -> None:
    """Refuse a workspace that is not the same one on every node."""
    if not _others():
        return
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        blind = _blind(mark)
    finally:
        mark.unlink()
    if blind:
        raise UserError(
            f"workspace: {folder} is a folder of this machine that {blind}. On a cluster the workspace must "
            "be a folder that all nodes share, or an object store (s3://bucket/prefix)."
        )


def _require_there(folder: Path) -> None:
    """Refuse a folder that is not on every node."""
    if blind := _blind(folder):
        raise UserError(
            f"{folder} is a folder of this machine that {blind}. On a cluster it must be one that all nodes "
            "share."
        )


def _blind(path: Path) -> str:
    """Which other nodes do not see a path, in words; empty if all do."""
    others, look = _others(), ray.remote(os.path.exists)
    asked = {
        node: look.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(str(path))
        for node in others
    }
    blind = [others[node]["host"] for node, answer in asked.items() if not _answer(answer)]
    named = ", ".join(sorted(blind)[:3])
    return f"{len(blind)} of {len(others)} other nodes do not see ({named})" if blind else ""


def _others() -> dict[str, dict[str, Any]]:
    """The nodes but this one."""
    others = nodes()
    others.pop(ray.get_runtime_context().get_node_id(), None)
    return others


def _answer(reference: Any) -> bool:
    """What a node says; one that died meanwhile does no harm."""
    try:
        return bool(ray.get(reference))
    except exceptions.RayError:
        return True


def _amounts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in names)


def get(reference: Any) -> Any:
    """`ray.get` that lets a `UserError` of the worker through as itself."""
    with told(None):
        return ray.get(reference)


@contextmanager
def told(logs: Logs | None) -> Iterator[None]:
    """Inside the block, a `UserError` that a task or actor raised comes out as itself; others with their log.

    Raises:
        UserError: also where the cluster failed, which running again mends or continues.
    """
    try:
        yield
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        _annotate(error, logs)
        raise
    except tuple(_CURES) as error:
        cure = next(cure for kind, cure in _CURES.items() if isinstance(error, kind))
        _annotate(error, logs)
        found = UserError(f"Ray: {_first_line(error)}. {cure}. {AGAIN}")
        for note in getattr(error, "__notes__", ()):
            found.add_note(note)
        raise found from None


def _annotate(error: Exception, logs: Logs | None) -> None:
    """Add the last lines of a log to an error: of the worker it names, or else of the last that wrote."""
    named = re.search(r"\bpid[=:]\s*(\d+)", str(error))
    with suppress(OSError):
        if logs is not None and (lines := logs.tail(int(named[1]) if named else None)):
            error.add_note(lines)


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), repr(error))
