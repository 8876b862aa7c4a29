"""What a recount says: one finding per check, with what was expected, what was found and a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

EXAMPLES = 3
"""Most examples that a finding names."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    what: str
    expected: str
    found: str
    good: bool
    where: str = ""
    """The dataset or file that was checked."""
    fix: str = ""
    """What to do if it is not good."""


class Unreadable(Exception):
    """A file that is missing, damaged or not what it should be; the message names it."""


def same(what: str, expected: object, found: object) -> Finding:
    """Whether a recorded value is the one that was counted or computed again."""
    return Finding(what, shown(expected), shown(found), expected == found)


def shown(value: object) -> str:
    """A value for people."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass
class Tally:
    """How often something is wrong, and the first cases."""

    count: int = 0
    cases: list[str] = field(default_factory=list)

    def add(self, cases: Iterable[object]) -> None:
        """Count cases."""
        for case in cases:
            self.count += 1
            if self.count <= EXAMPLES:
                self.cases.append(str(case))

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.cases) else ""
        return f"{self.count:,} ({', '.join(self.cases)}{more})" if self.count else "none"

    def finding(self, what: str, expected: str) -> Finding:
        """A finding that is good if nothing was counted."""
        return Finding(
            what, expected, f"exceptions: {self}" if self.count else "no exception", not self.count
        )
