"""What a stage tells whoever watches it: what it does, and how much of what is to be done is done."""

from __future__ import annotations

from typing import Protocol

FIRST = "checks the config, and that the data are there"
"""What is done before a network is opened."""

LOOKS = "looks for what is there"
"""What a stage does first whose results are kept."""

LOADS = "starts workers, which load the network and take the first images"
"""What an extraction, or the first extra pass, does before its first images are done."""


class Stage(Protocol):
    """One stage under way."""

    note: str
    """What its closing line says."""

    def doing(self, text: str) -> None:
        """Say what it does until work advances, such as "loads the network"."""

    def count(self, what: str, total: int, there: int = 0) -> None:
        """Begin to count: `advance` adds up to `total`.

        Args:
            what: is counted, such as "images".
            total: how much is to be done.
            there: how much more of it need not be done, as it was there.
        """

    def advance(self, count: int) -> None:
        """Count work that is done."""


class Silent:
    """A stage that nobody sees."""

    note = ""

    def doing(self, text: str) -> None:
        """Nobody reads."""

    def count(self, what: str, total: int, there: int = 0) -> None:
        """Nobody counts."""

    def advance(self, count: int) -> None:
        """Nobody counts."""


SILENT = Silent()
