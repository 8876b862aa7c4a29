"""What benchmarks of one command share, so that it is done once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import commands
import fashion
import plain


@dataclass
class Session:
    """Where the images are, how much is to be measured, and a folder that is removed at the end."""

    images: Path
    scratch: Path
    quick: bool
    large: bool

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    @cached_property
    def plain(self) -> tuple[plain.Setting, list[tuple[plain.Setting, float]]]:
        """The best setting of the plain loop, and all that were tried."""
        print("  looking for the best setting of the plain loop", flush=True)
        pixels = fashion.images(self.images, self.size(8000, 1000))
        return plain.best(pixels, (128,) if self.quick else (64, 128, 256))

    @property
    def first(self) -> Path:
        """Folder of the quickstart's first run."""
        return self.scratch / "quickstart"

    @cached_property
    def quickstart(self) -> commands.Done:
        """The quickstart on Ray, in an empty workspace."""
        print("  quickstart", flush=True)
        return commands.run("run", fashion.quickstart(), self.first)
