"""Work that kills its process again and again is given up, and the images it was at are named.

Ray begins a task anew whose process or node died, as often as it takes. In a process that stands in for a
lost one, the work keeps a file beside its result: how often it was begun, and which images it is at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import AGAIN, UserError
from pipeline.workspace import files, storage
from pipeline.workspace.files import Place

LIMIT = 3
"""How often the work on a part is begun again."""

_FILES = ".attempts-*"


@dataclass(frozen=True)
class Attempt:
    """One start of the work on a part."""

    number: int
    """0 in a process that replaces no other: where it is, nobody will ask."""
    file: Place

    @property
    def last(self) -> bool:
        """Whether it is the last one: then single images are worth a note."""
        return self.number == LIMIT

    def at(self, keys: Sequence[str]) -> None:
        """Note which images are next, in case that they end the process."""
        if self.number:
            files.write_json(self.file, {"number": self.number, "keys": list(keys)})


FIRST = Attempt(0, Path())
"""Work that is not counted."""

_replaces: ContextVar[bool] = ContextVar("replaces", default=False)


@contextmanager
def replacing(lost: bool) -> Iterator[None]:
    """Work in the block is done in the place of a process that was lost, or not."""
    token = _replaces.set(lost)
    try:
        yield
    finally:
        _replaces.reset(token)


@contextmanager
def begun(part: str, what: str) -> Iterator[Attempt]:
    """Count a start of the work on a part.

    Args:
        part: path of the result.
        what: what is done, for the message and for the name of the file.

    Raises:
        UserError: if it was begun too often; names the images that the last start was at.
    """
    file = files.at(storage.parent(part)) / f".attempts-{what}-{storage.name_of(part)}.json"
    again = _replaces.get()
    earlier: dict[str, Any] = {"number": 0, "keys": []}
    if again and file.is_file():
        earlier = files.read_json(file)
    if earlier["number"] >= LIMIT:
        keys = earlier["keys"]
        shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        at = f", the last time at {len(keys)} images: {shown}. Look at these, or remove them" if keys else ""
        raise UserError(
            f"{what}: the process died again and again over {part}, {LIMIT} times after a restart{at}. "
            f"If memory ran out, lower extract.batch_size or the number of actors. {AGAIN}"
        )
    attempt = Attempt(earlier["number"] + again, file)
    attempt.at(earlier["keys"])
    yield attempt
    if attempt.number:
        file.unlink(missing_ok=True)


def forget(folder: Place) -> None:
    """Delete what an earlier run noted."""
    for file in folder.glob(_FILES):
        file.unlink(missing_ok=True)
