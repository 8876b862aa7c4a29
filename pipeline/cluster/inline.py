"""The engine in this process: no Ray, no second process; for debuggers, notebooks, tests and small data.

With one thread all work is done in the caller's, so a breakpoint anywhere shows the whole evaluation. With
more, tasks and model workers share them; each computes with one thread, as a worker with one CPU does.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, TypeVar

from threadpoolctl import ThreadpoolController

from pipeline.cluster import usage
from pipeline.cluster.engine import Decode, Needs, Pending, Row, Work
from pipeline.cluster.logs import MERGED, Handler, Logs, attached

T = TypeVar("T")

THREADS = "inline"
"""What the names of its threads begin with."""


@contextmanager
def session(logs: Logs | None, threads: int | None) -> Iterator[Inline]:
    """The engine with its threads, which end with the block."""
    count, controller = threads or cpus(), ThreadpoolController()

    def begin() -> None:
        controller.limit(limits=1)  # OpenMP counts by thread

    with (
        _logging(logs),
        warnings.catch_warnings(),  # decoders of several threads change the filters in turns
        controller.limit(limits=1),
        ThreadPoolExecutor(count, THREADS, begin) as pool,
    ):
        yield Inline(count, pool)


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _logging(logs: Logs | None) -> Iterator[None]:
    """During the block, records of this process also go to the file of the run."""
    if logs is None:
        yield
        return
    handler = Handler(logs.folder / MERGED, logs.level)
    try:
        with attached(handler):
            yield
    finally:
        handler.put()
        handler.close()


@dataclass(frozen=True)
class Held(Generic[T]):
    """A value of this process."""

    value: T

    def get(self) -> T:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Object:
    """An object that answers at once, in the thread that asks, one call at a time."""

    target: Any
    lock: Any = field(default_factory=Lock)

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Call a method."""
        with self.lock:
            result = getattr(self.target, method)(*arguments)
        _report()
        return lambda: result

    def send(self, value: T) -> Held[T]:
        """The value itself."""
        return Held(value)

    def stop(self) -> None:
        """Nothing to end: what it cost, this process did."""


@dataclass(frozen=True)
class Objects:
    """Equal objects, each used by one thread at a time."""

    engine: Inline
    free: SimpleQueue[Any]

    def each(self, method: str, arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of a method, in the order of the arguments."""

        def call(*given: Any) -> Any:
            with _borrowed(self.free) as target:
                return getattr(target, method)(*given)

        return self.engine.in_order(call, arguments)

    def stop(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Inline:
    """The engine."""

    count: int
    """Threads."""
    executor: ThreadPoolExecutor
    here = True

    def carry(self, kinds: Iterable[type]) -> None:
        """All classes are here."""

    def cpus(self) -> float:
        """One for each thread."""
        return self.count

    def gpus(self) -> float:
        """Those that torch sees."""
        import torch

        return torch.cuda.device_count()

    def nodes(self, dead: bool = False) -> dict[str, dict[str, Any]]:
        """None but this process."""
        return {}

    def threads(self, needs: Needs) -> int:
        """One, whatever the needs: there are as many workers as CPUs."""
        return 1

    def capacity(self, needs: Needs, what: str, spare: int = 0) -> int:
        """As many workers as threads; where they need GPUs, as many as share one."""
        gpus = needs.get("GPU", 0)
        return min(self.count, max(1, int(1 / gpus))) if gpus else self.count

    def holds(self, needs: Needs, count: int, spare: int = 0) -> bool:
        """More workers than threads do no harm: they are not made."""
        return True

    def share(self, value: T) -> Held[T]:
        """The value itself."""
        return Held(value)

    def in_order(
        self,
        function: Callable[..., T],
        arguments: Iterable[tuple[Any, ...]],
        memory: Callable[..., int] | None = None,
        beside: Sequence[int] = (),
    ) -> Iterator[T]:
        """Results of a function, in the order of the arguments; at most two of each thread are waiting."""
        if self.count == 1:
            for given in arguments:
                yield function(*given)
                _report()
            return
        waiting: deque[Future[T]] = deque()
        try:
            for given in arguments:
                waiting.append(self.executor.submit(function, *given))
                if len(waiting) >= 2 * self.count:
                    yield waiting.popleft().result()
                    _report()
            while waiting:
                yield waiting.popleft().result()
                _report()
        finally:
            for future in waiting:
                future.cancel()

    def stream(
        self,
        rows: Sequence[Row],
        decode: Decode | None,
        worker: Work,
        needs: Needs,
        count: int,
    ) -> Iterator[Row]:
        """Receipts of rows that go through workers, in their order."""
        kind, given = worker
        free = _free(kind, given, self._fitting(needs, count))

        def work(row: Row) -> Row:
            more = {} if decode is None else decode[0](row, *decode[1])
            with _borrowed(free) as target:
                return target({**row, **more})()  # type: ignore[no-any-return]

        return self.in_order(work, ((row,) for row in rows))

    def gang(self, kind: type, needs: Needs, arguments: Sequence[tuple[Any, ...]]) -> tuple[Object, ...]:
        """Objects."""
        return tuple(Object(kind(*given)) for given in arguments)

    def copied(self, kind: type, *arguments: Any) -> Object:
        """An object: there is one process."""
        return Object(kind(*arguments))

    def pool(self, kind: Callable[..., Any], needs: Needs, count: int, *arguments: Any) -> Objects:
        """Objects, no more than threads."""
        return Objects(self, _free(kind, arguments, self._fitting(needs, count)))

    def _fitting(self, needs: Needs, count: int) -> int:
        return min(count, self.capacity(needs, "inline"))


def _free(kind: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> SimpleQueue[Any]:
    """Objects that nobody uses."""
    free: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        free.put(kind(*arguments))
    return free


@contextmanager
def _borrowed(free: SimpleQueue[Any]) -> Iterator[Any]:
    """One of them for the block, as soon as there is one."""
    target = free.get()
    try:
        yield target
    finally:
        free.put(target)


def _report() -> None:
    """Count a task; its seconds are those of this process."""
    usage.report({"tasks": 1, "peak_memory": usage.peak_memory()})
