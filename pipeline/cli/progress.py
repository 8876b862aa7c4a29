"""What a person sees while a command works: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

EVERY = 10.0
"""Seconds between two lines about the same where there is no terminal."""

LASTS = 1.0
"""Seconds after the last line until one tells what else is done; what was over by then has none."""

_LOOKS = 0.25
"""Seconds between two looks at a stage."""

_SETTLES = 2.0
"""Seconds, at most, in which the first results of many workers come all at once: they tell no rate."""

_HOLDS = 30.0
"""Seconds after the last result, at most, until a rate falls for want of the next."""

_LEAST = 1e-3
"""The lowest rate that is shown: with one result in a quarter of an hour the next may be long in coming."""


class _State(NamedTuple):
    """What a stage was told so far."""

    since: float
    """When it began to do what it does."""
    doing: str = ""
    what: str = ""
    total: int = 0
    there: int = 0
    done: int = 0
    settled: float = 0.0
    """Until when results tell no rate."""
    base: tuple[float, int] = (0.0, 0)
    """When the rate begins, and what was done then."""
    last: float = 0.0
    """When the last result came."""


class Stage:
    """One stage under way; knows what it does, how much is done, at what rate, and when it will be over.

    What is told of it is read by another thread, so it is replaced as a whole.
    """

    def __init__(self, name: str, doing: str = "") -> None:
        self.name, self.note = name, ""
        self._state = _State(time.monotonic(), doing)

    @property
    def since(self) -> float:
        """When it began to do what it does."""
        return self._state.since

    @property
    def progress(self) -> tuple[int, int]:
        """How much is done, of how much; 0 where nothing is counted."""
        return self._state.done, self._state.total

    def doing(self, text: str) -> None:
        """Say what it does until work advances."""
        self._state = self._state._replace(since=time.monotonic(), doing=text)

    def count(self, what: str, total: int, there: int = 0) -> None:
        """Begin to count: `advance` adds up to `total`."""
        self._state = _State(time.monotonic(), what=what, total=total, there=there)

    def advance(self, count: int) -> None:
        """Count work that is done."""
        now, state = time.monotonic(), self._state
        if not state.done:
            state = state._replace(settled=now + min((now - state.since) / 2, _SETTLES))
        if state.doing:
            state = state._replace(since=now, doing="")
        state = state._replace(done=state.done + count, last=now)
        self._state = state._replace(base=(now, state.done)) if now <= state.settled else state

    def __str__(self) -> str:
        """What it does, in words."""
        now, state = time.monotonic(), self._state
        if state.doing or not state.total:
            so_far = f"{now - state.since:,.0f} s so far" if now - state.since >= EVERY else ""
            return ", ".join(filter(None, [state.doing, so_far]))
        parts = [f"{state.done:,} of {state.total:,} {state.what}"]
        begun, done = state.base
        if done < state.done < state.total:
            until = max(state.last, now - min(state.last - begun, _HOLDS))
            rate = (state.done - done) / (until - begun)
            if rate >= _LEAST:
                left = timedelta(seconds=round((state.total - state.done) / rate))
                parts += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s", f"{left} left"]
        if state.there:
            parts.append(f"{state.there:,} of {state.there + state.total:,} were there")
        return ", ".join(parts)


class _Bar(ProgressColumn):
    """How much is done, or only that something is."""

    def render(self, task: Task) -> ProgressBar:
        stage: Stage = task.fields["stage"]
        done, total = stage.progress
        return ProgressBar(total or None, done, width=20, animation_time=task.get_time())


class _Words(ProgressColumn):
    """What is done, in words."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["stage"]))


class Display:
    """Shows stages on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stage = Stage("")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, markup=False)

    def doing(self, text: str) -> None:
        """Say what the stage under way does until its work advances."""
        self._stage.doing(text)

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Stage]:
        """Show a stage for the time of the block and close it with its time and note."""
        started = time.perf_counter()
        with self._shown(Stage(name, doing), at_once=True) as stage:
            yield stage
        self.console.print(f"{name:<9} {time.perf_counter() - started:6.1f} s  {stage.note}".rstrip())

    @contextmanager
    def aside(self, name: str, doing: str) -> Iterator[Stage]:
        """Show what a command does in the block that has no stages; nothing of what takes no time."""
        with self._shown(Stage(name, doing), at_once=False) as stage:
            yield stage

    @contextmanager
    def _shown(self, stage: Stage, at_once: bool) -> Iterator[Stage]:
        self._stage = stage
        with self._bar(stage) if self.console.is_terminal else self._lines(stage, at_once):
            yield stage

    @contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        """A line that changes, until the end of the block."""
        words = _Words(Column(no_wrap=True, overflow="ellipsis"))
        columns = SpinnerColumn(), TextColumn("{task.description:<9}"), _Bar(), words
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
            bar.add_task(stage.name, total=None, stage=stage)
            yield

    @contextmanager
    def _lines(self, stage: Stage, at_once: bool) -> Iterator[None]:
        """A line of what a stage does first, if `at_once`, one of whatever else, and how far it is."""
        over, first = Event(), stage.since

        def tell() -> None:
            told, last = first if at_once else None, first
            while not over.wait(_LOOKS):
                now, since = time.monotonic(), stage.since
                if now - last >= (EVERY if since == told else LASTS) and (text := str(stage)):
                    told, last = since, now
                    self.say(f"{stage.name:<9} {text}")

        if at_once:
            self.say(f"{stage.name:<9} {stage}")
        teller = Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()
