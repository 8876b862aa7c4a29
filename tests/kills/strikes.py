"""Processes that are killed at the moment when a file of a workspace appears.

Everything there appears by a rename: each is two moments, one before it, when the draft is written, and one
after it, when its receipt or record is not. They are counted by stage and by who is at work, the evaluation
itself or what its engine runs; on Ray these are processes of their own, which count together.
"""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("prepare", "extract", "fit", "score", "evaluate", "report")
DRIVER, WORKER = "driver", "worker"

Moments = Mapping[tuple[str, str], int]
"""How many there are by stage and by who is at work."""


@dataclass(frozen=True)
class Strike:
    """The moment at which a process is killed."""

    stage: str
    who: str
    number: int
    victim: str = ""
    """Who is killed, if it is not the one whose moment it is."""


def drawn(moments: Moments, stage: str, seed: Any, *who: str) -> Strike:
    """A moment of a stage, any as likely as any other; of some who are at work, or of all."""
    some = [Strike(stage, each, n) for each in who or (DRIVER, WORKER) for n in range(moments[stage, each])]
    return random.Random(f"{stage} {seed}").choice(some)


@dataclass(frozen=True)
class Plan:
    """Where moments are counted, and which are struck; travels to workers."""

    workspace: str
    counts: str
    """A folder, with a file for each stage and who works there, of a byte for each moment."""
    strikes: tuple[Strike, ...] = ()
    driver: int = 0
    """Process of the evaluation itself."""

    def moment(self, stage: str, who: str, what: str) -> None:
        """Count, and die if that is planned: once, as no two moments have the same number."""
        number = self._append(f"{stage}-{who}", ".")
        for strike in self.strikes:
            if (strike.stage, strike.who, strike.number) == (stage, who, number):
                self._append("struck", f"{strike}: {what}\n")
                os.kill(self.driver if strike.victim == DRIVER else os.getpid(), signal.SIGKILL)

    def _append(self, name: str, text: str) -> int:
        """Add to a file at the place that is returned."""
        file = os.open(Path(self.counts, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, text.encode())
            return os.lseek(file, 0, os.SEEK_CUR) - len(text)
        finally:
            os.close(file)

    def moments(self) -> Moments:
        """How many there were."""
        files = {
            (stage, who): Path(self.counts, f"{stage}-{who}") for stage in STAGES for who in (DRIVER, WORKER)
        }
        return {place: file.stat().st_size if file.exists() else 0 for place, file in files.items()}

    def struck(self) -> list[str]:
        """Who was struck, and when."""
        file = Path(self.counts, "struck")
        return file.read_text("utf-8").splitlines() if file.exists() else []


_place: ContextVar[tuple[Plan, str, str] | None] = ContextVar("place", default=None)
"""The plan, the stage, and who is at work."""

_patched: list[str] = []


@contextmanager
def at(plan: Plan, stage: str, who: str) -> Iterator[None]:
    """Count what the block makes appear."""
    for name in ("replace", "rename") if not _patched else ():
        setattr(os, name, _counted(getattr(os, name)))
        _patched.append(name)
    token = _place.set((plan, stage, who))
    try:
        yield
    finally:
        _place.reset(token)


def _counted(rename: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(rename)
    def counted(source: Any, target: Any, **options: Any) -> None:
        place = _place.get()
        if place is None or not str(target).startswith(f"{place[0].workspace}/"):
            rename(source, target, **options)
            return
        plan, *where = place
        plan.moment(*where, f"before {target}")
        rename(source, target, **options)
        plan.moment(*where, f"after {target}")

    return counted


@dataclass
class Display:
    """Shows nothing, but knows the stage; what appears between two belongs to the first."""

    plan: Plan
    name: str = STAGES[0]
    note: str = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what the evaluation in the block makes appear."""
        with at(self.plan, self.name, DRIVER):
            yield

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Display]:
        self.name = name
        _place.set((self.plan, name, DRIVER))
        yield self

    def doing(self, text: str) -> None: ...

    def count(self, what: str, total: int, there: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, text: str) -> None: ...


def _watched(function: Callable[..., Any], plan: Plan, stage: str) -> Callable[..., Any]:
    """The function, counted, and so is what it returns if that has to be called."""

    @functools.wraps(function)
    def watched(*arguments: Any) -> Any:
        with at(plan, stage, WORKER):
            found = function(*arguments)
        return _watched(found, plan, stage) if callable(found) else found

    return watched


@dataclass
class Engine:
    """An engine whose work is counted wherever it is done."""

    engine: Any
    display: Display

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def in_order(
        self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *memory: Any
    ) -> Iterator[Any]:
        return self.engine.in_order(self._watched(function), arguments, *memory)

    def stream(self, rows: Any, decode: Any, worker: Any, needs: Any, count: int) -> Iterator[Any]:
        kind, given = worker
        return self.engine.stream(rows, decode, (self._subclass(kind, "__call__"), given), needs, count)

    def gang(self, kind: type, needs: Any, arguments: Any) -> Any:
        return self.engine.gang(self._subclass(kind, "load", "search", "distance", "train"), needs, arguments)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _watched(function, self.display.plan, self.display.name)

    def _subclass(self, kind: type, *methods: str) -> type:
        """The class with some methods watched."""
        watched = {name: self._watched(getattr(kind, name)) for name in methods}
        return type(kind.__name__, (kind,), {**watched, "__module__": __name__})
