"""What a person sees while a command works: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

EVERY = 10.0
"""Seconds between two lines about the same where there is no terminal."""

LASTS = 1.0
"""Seconds after which a line tells what a stage does; there is none of what takes less."""

_LOOKS = 0.25
"""Seconds between two looks at a stage."""

_SETTLES = 2.0
"""Seconds, at most, in which the first results of many workers come all at once: they tell no rate."""

_HOLDS = 30.0
"""Seconds after the last result, at most, until a rate falls for want of the next."""


class Stage:
    """One stage under way; knows what it does, how much is done, at what rate, and when it will be over."""

    def __init__(self, name: str) -> None:
        self.name, self.note = name, ""
        self.done = self.total = 0
        self._what, self._there, self._doing = "", 0, ""
        self._settled, self._base, self._last = 0.0, (0.0, 0), 0.0
        self.since = time.monotonic()
        """When it began to do what it does."""

    def doing(self, text: str) -> None:
        """Say what it does until work advances."""
        self._doing, self.since = text, time.monotonic()

    def count(self, what: str, total: int, there: int = 0) -> None:
        """Begin to count: `advance` adds up to `total`."""
        self._what, self.total, self._there, self.done = what, total, there, 0
        self.doing("")

    def advance(self, count: int) -> None:
        """Count work that is done."""
        self._last = now = time.monotonic()
        if not self.done:
            self._settled = now + min((now - self.since) / 2, _SETTLES)
        if self._doing:
            self.doing("")
        self.done += count
        if now <= self._settled:
            self._base = now, self.done

    def __str__(self) -> str:
        """What it does, in words."""
        now = time.monotonic()
        if self._doing or not self.total:
            so_far = f"{now - self.since:,.0f} s so far" if now - self.since >= EVERY else ""
            return ", ".join(filter(None, [self._doing, so_far]))
        parts = [f"{self.done:,} of {self.total:,} {self._what}"]
        begun, done = self._base
        if done < self.done < self.total:
            until = max(self._last, now - min(self._last - begun, _HOLDS))
            rate = (self.done - done) / (until - begun)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            parts += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s", f"{left} left"]
        if self._there:
            parts.append(f"{self._there:,} of {self._there + self.total:,} were there")
        return ", ".join(parts)


class _Bar(ProgressColumn):
    """How much is done, or only that something is."""

    def render(self, task: Task) -> ProgressBar:
        stage: Stage = task.fields["stage"]
        return ProgressBar(stage.total or None, stage.done, width=20, animation_time=task.get_time())


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
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage for the time of the block and close it with its time and note."""
        started = time.perf_counter()
        self._stage = stage = Stage(name)
        with self._bar(stage) if self.console.is_terminal else self._lines(stage):
            yield stage
        self.console.print(f"{name:<9} {time.perf_counter() - started:6.1f} s  {stage.note}".rstrip())

    @contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        """A line that changes, until the end of the block."""
        words = _Words(Column(no_wrap=True, overflow="ellipsis"))
        columns = SpinnerColumn(), TextColumn("{task.description:<9}"), _Bar(), words
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
            bar.add_task(stage.name, total=None, stage=stage)
            yield

    @contextmanager
    def _lines(self, stage: Stage) -> Iterator[None]:
        """A line when a stage begins, one for each thing that it does for longer, and how far it is."""
        over = Event()

        def tell() -> None:
            told, last = 0.0, time.monotonic()
            while not over.wait(_LOOKS):
                now = time.monotonic()
                begun = stage.since != told and now - stage.since >= LASTS
                if (begun or now - last >= EVERY) and (text := str(stage)):
                    told, last = stage.since, now
                    self.say(f"{stage.name:<9} {text}")

        self.say(f"{stage.name:<9} begins")
        teller = Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()
