"""What a workflow tells whoever watches it. The command line draws bars; a program may stay silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One stage under way."""

    note: str
    """What its closing line says."""

    def advance(self, count: int) -> None:
        """Count work that is done."""


class Display(Protocol):
    """Shows stages."""

    def stage(self, name: str, total: int = 0) -> AbstractContextManager[Stage]:
        """A stage for the time of the block; `total` is what `advance` adds up to, 0 where nobody knows."""

    def say(self, text: str) -> None:
        """A line of its own, such as whom a run waits for."""


class Quiet:
    """Shows nothing; also the one stage that it gives."""

    note = ""

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Stage]:
        """A stage that nobody sees."""
        yield self

    def advance(self, count: int) -> None:
        """Nobody counts."""

    def say(self, text: str) -> None:
        """Nobody reads."""
