"""What a workflow tells whoever watches it. The command line draws bars; a program may stay silent."""

from __future__ import annotations

from contextlib import AbstractContextManager
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
