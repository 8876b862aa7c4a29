"""What a person sees while a run works: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)


class Stage:
    """One stage under way; adds to its count and keeps a note for its closing line."""

    def __init__(self, name: str, total: int, bar: Progress | None, console: Console) -> None:
        self.name, self.total, self.done, self.note = name, total, 0, ""
        self._bar, self._console = bar, console
        self._task = bar.add_task(name, total=total or None) if bar else None
        self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count work that is done."""
        self.done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self._console.print(f"{self.name:<9} {self.done:,} of {self.total:,}")


class Display:
    """Shows stages on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Stage]:
        """Show a stage for the time of the block and close it with its time and note."""
        started = time.perf_counter()
        if self.console.is_terminal:
            columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description:<9}")]
            if total:
                columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            with Progress(*columns, console=self.console, transient=True) as bar:
                stage = Stage(name, total, bar, self.console)
                yield stage
        else:
            stage = Stage(name, total, None, self.console)
            yield stage
        self.console.print(f"{name:<9} {time.perf_counter() - started:6.1f} s  {stage.note}".rstrip())
