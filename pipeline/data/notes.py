"""What the reader of a dataset's results should know of how it was listed: files left out, class order."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

NAMED = 5
"""Endings that are named, the most frequent ones."""

NO_IMAGES = {
    "hidden",
    ".csv",
    ".html",
    ".ini",
    ".json",
    ".md",
    ".pdf",
    ".py",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
}
"""Kinds of files that nobody would miss among images."""

_KEPT = 1000
"""Endings that are counted apart, so that names made up by the thousand take no memory."""


class Seen:
    """Files, or members of archives: how many there are, and which of them are not read."""

    def __init__(self, what: str) -> None:
        """Start counting.

        Args:
            what: they are, in plural.
        """
        self.what, self.total, self.first = what, 0, ""
        self.left_out: Counter[str] = Counter()

    def read(self, count: int = 1) -> None:
        """Count some that are read."""
        self.total += count

    def leave_out(self, name: str, kind: str | None = None) -> None:
        """Count one that is not read; without a `kind` it is that of the ending of its name."""
        file = PurePosixPath(name)
        kind = kind or ("hidden" if file.name.startswith(".") else file.suffix.lower() or "no ending")
        self.total += 1
        self.first = self.first or name
        self.left_out[kind if kind in self.left_out or len(self.left_out) < _KEPT else "others"] += 1

    def add(self, other: Seen) -> None:
        """Count what was counted elsewhere, too."""
        self.total += other.total
        self.first = self.first or other.first
        self.left_out += other.left_out

    @property
    def sentence(self) -> str:
        """What is not read; empty if everything is."""
        if not self.left_out:
            return ""
        count, ranked = self.left_out.total(), self.left_out.most_common()
        named = ", ".join(f"{kind} {number:,}" for kind, number in ranked[:NAMED])
        more = f", {len(ranked) - NAMED} more" if len(ranked) > NAMED else ""
        return f"{count:,} of {self.total:,} {self.what} not read: {named}{more} (first: {self.first})"


def harmless(sentence: str) -> bool:
    """Whether a sentence of `Seen` counts nothing but files that nobody would miss."""
    counts = re.search(r" not read: (.*?) \(first: ", sentence)
    return counts is not None and {each.rpartition(" ")[0] for each in counts[1].split(", ")} <= NO_IMAGES


class Notes:
    """Gathered while a dataset is listed."""

    def __init__(self) -> None:
        self.files, self.members = Seen("files"), Seen("members")
        self.said: list[str] = []
        """Sentences beyond the counts."""

    def add(self, other: Notes) -> None:
        """Take over what was gathered elsewhere."""
        self.files.add(other.files)
        self.members.add(other.members)
        self.said += [text for text in other.said if text not in self.said]

    @property
    def sentences(self) -> tuple[str, ...]:
        """Everything, in sentences without a full stop."""
        return tuple(filter(None, (self.files.sentence, self.members.sentence, *self.said)))
