"""What a workflow tells whoever watches it. The command line draws bars; a program may stay silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pipeline.stages.progress import Silent
from pipeline.stages.progress import Stage as Stage


class Display(Protocol):
    """Shows stages."""

    def stage(self, name: str, doing: str) -> AbstractContextManager[Stage]:
        """A stage for the time of the block, and what it does first."""

    def doing(self, text: str) -> None:
        """Say what the stage under way does until its work advances."""

    def say(self, text: str) -> None:
        """A line of its own, such as whom a run waits for."""


class Quiet(Silent):
    """Shows nothing; also the one stage that it gives."""

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Stage]:
        """A stage that nobody sees."""
        yield self

    def say(self, text: str) -> None:
        """Nobody reads."""
