"""What stages ask of whatever runs their work: tasks, a pipeline into model workers, actors, a shared value.

Two engines give it: `ray`, on this machine or a cluster, and `inline`, in this process. Results are the same
to the bit. What a stage hands over must be picklable and must not be written to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar, cast

from pipeline.cluster.logs import Logs
from pipeline.errors import UserError
from pipeline.workspace.files import Place

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Name = Literal["ray", "inline"]
Asked = Literal["auto", "ray", "inline"]
"""What a command may say; `auto` leaves the choice to `chosen`."""

SMALL = 20_000
"""Images up to which Ray is left out, whose start takes longer than so many small ones."""

Needs = Mapping[str, float]
"""Amounts by resource: CPU, GPU, and resources of the cluster's own."""
Row = dict[str, Any]
Decode = tuple[Callable[..., Row], tuple[Any, ...], int]
"""A function of a row that gives more columns of it, its further arguments, and the bytes it may hold."""
Work = tuple[Callable[..., Callable[[Row], Callable[[], Row]]], tuple[Any, ...]]
"""A class whose objects work on a row and return what finishes it and gives its receipt; and its arguments.

They work on one row at a time, but on the next one, in another thread, while one is finished.
"""
Pending = Callable[[], Any]
"""Waits for the result of a call that is under way."""


class Shared(Protocol[T_co]):
    """A value that is sent to each process once; travels to tasks and actors."""

    def get(self) -> T_co:
        """The value; read only."""


class Actor(Protocol):
    """An object that answers calls, one at a time, where its needs are met; travels to tasks."""

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Begin a call of one of its methods."""

    def send(self, value: T) -> Shared[T]:
        """Send a value once, for calls of this actor and of others of its engine."""

    def stop(self) -> None:
        """End it and report what it cost."""


class Pool(Protocol):
    """Equal actors that share the calls."""

    def each(self, method: str, arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of a method, in the order of the arguments."""

    def stop(self) -> None:
        """End the actors."""


class Engine(Protocol):
    """Runs the work of stages; nothing is started before something is asked of it."""

    @property
    def here(self) -> bool:
        """Whether work is done in this process, where it can call what it is given."""

    def carry(self, kinds: Iterable[type]) -> None:
        """Take along the code of classes that are not of this package."""

    def cpus(self) -> float:
        """CPUs for all work together."""

    def gpus(self) -> float:
        """GPUs that are there, whether work asks for them or not."""

    def nodes(self, dead: bool = False) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, or also those that were, by id: address, host name and resources."""

    def threads(self, needs: Needs) -> int:
        """How many threads a worker with these needs may compute with."""

    def capacity(self, needs: Needs, what: str, spare: int = 0) -> int:
        """How many workers with these needs there is room for at once, beside `spare` CPUs for tasks.

        Args:
            needs: of each.
            what: section of the config that asks.
            spare: CPUs to be left over.

        Raises:
            UserError: if not even one fits.
        """

    def holds(self, needs: Needs, count: int, spare: int = 0) -> bool:
        """Whether `count` workers with these needs fit at once, beside `spare` CPUs for tasks."""

    def share(self, value: T) -> Shared[T]:
        """Send a value once, for all tasks and actors that get what comes back."""

    def in_order(
        self,
        function: Callable[..., T],
        arguments: Iterable[tuple[Any, ...]],
        memory: Callable[..., int] | None = None,
        beside: Sequence[int] = (),
    ) -> Iterator[T]:
        """Results of a function as tasks, in the order of the arguments; they do not pile up.

        A task whose process or node died is begun again.

        Args:
            function: what a task does.
            arguments: of each task.
            memory: gives the bytes that a task with these arguments may hold. On a cluster a node runs no
                more at once than it has memory for; a task that needs more than any node has runs alone.
            beside: bytes that actors hold meanwhile, each.

        Raises:
            UserError: one that a task raised, as it is; or the cluster failed.
        """

    def stream(
        self,
        rows: Sequence[Row],
        decode: Decode | None,
        worker: Work,
        needs: Needs,
        count: int,
    ) -> Iterator[Row]:
        """Receipts of rows that go through model workers, as they come.

        Args:
            rows: what is to be done, each on its own; few: they are held by the driver.
            decode: function of a row, and its further arguments, that gives more columns; it runs in tasks
                of its own, no faster than the workers take them. None where the workers need nothing.
            worker: see `Work`.
            needs: of each worker.
            count: how many workers.

        Raises:
            UserError: the first that a function raised; or the cluster failed.
        """

    def gang(self, kind: type, needs: Needs, arguments: Sequence[tuple[Any, ...]]) -> tuple[Actor, ...]:
        """Objects of a class as actors, spread over nodes, that all run at once and leave a CPU for tasks.

        It waits until they do. After the loss of its process an actor begins again from its arguments.

        Args:
            kind: the class.
            needs: of each actor.
            arguments: for the class, of each actor.
        """

    def copied(self, kind: type, *arguments: Any) -> Actor:
        """An object of a class in each process that asks it, made by its first call there; for small ones."""

    def pool(self, kind: type, needs: Needs, count: int, *arguments: Any) -> Pool:
        """Objects of a class as actors that share the calls; those there is room for begin."""


def chosen(asked: Asked, images: int, plain: bool) -> Name:
    """The engine for some work; `auto` is Ray, but for a few images that no cluster is meant for.

    Args:
        asked: by the command.
        images: of all datasets.
        plain: whether no work asks for more than one CPU: GPUs and shares of CPUs only Ray hands out.
    """
    if asked != "auto":
        return asked
    ray = sys.modules.get("ray")
    there = "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())
    return "inline" if plain and images <= SMALL and not there else "ray"


def opened(
    name: Name,
    workspace: Place | None = None,
    logs: Logs | None = None,
    threads: int | None = None,
    before: Callable[[], object] = lambda: None,
    read: Sequence[Path] = (),
) -> AbstractContextManager[Engine]:
    """An engine for the time of a block; whatever it started ends with it.

    Nothing is imported or started before work is asked of it.

    Args:
        name: which.
        workspace: what the work writes to; if it is a local folder, every node must see it.
        logs: where workers log to.
        threads: of the inline engine; None = as many as there are CPUs, 1 = no thread but the caller's.
        before: is called first; what it imports computes with as many threads as work may.
        read: other folders that every node must see.

    Raises:
        UserError: threads for Ray.
    """
    if name == "ray" and threads is not None:
        raise UserError(
            "--threads: only the inline engine has threads. Add --engine inline, or leave it out."
        )

    def session() -> AbstractContextManager[Engine]:
        before()
        if name == "inline":
            from pipeline.cluster import inline

            return inline.session(logs, threads)
        return _on_ray().session(workspace, logs, read)  # type: ignore[no-any-return]

    return _later(session)


@contextmanager
def shared(name: Name) -> Iterator[None]:
    """One connection to Ray, or none if it is not asked to work, for all engines opened in the block."""
    with ExitStack() as stack:
        if name == "ray":
            stack.enter_context(_on_ray().kept())
        yield


def _on_ray() -> ModuleType:
    """The engine on Ray, which this imports."""
    if "RAY_ADDRESS" not in os.environ:  # Ray reads it when it is imported: it then binds to loopback only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from pipeline.cluster import on_ray

    return on_ray


@contextmanager
def _later(session: Callable[[], AbstractContextManager[Engine]]) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield cast(Engine, _Later(lambda: stack.enter_context(session())))


class _Later:
    """An engine that is opened when work is asked of it."""

    def __init__(self, opening: Callable[[], Engine]) -> None:
        self._opening = opening
        self._kinds: list[type] = []
        self._engine: Engine | None = None

    def carry(self, kinds: Iterable[type]) -> None:
        self._kinds += kinds
        if self._engine is not None:
            self._engine.carry(self._kinds)

    def nodes(self, dead: bool = False) -> dict[str, dict[str, Any]]:
        return {} if self._engine is None else self._engine.nodes(dead)

    def __getattr__(self, name: str) -> Any:
        if self._engine is None:
            self._engine = self._opening()
            self._engine.carry(self._kinds)
        return getattr(self._engine, name)
