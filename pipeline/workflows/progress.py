"""What a workflow tells whoever watches it. The command line draws bars; a program may stay silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pipeline.stages import shards
from pipeline.stages.progress import Silent
from pipeline.stages.progress import Stage as Stage

LOADS = "starts workers, which load the network"
"""What an extraction, or the first extra pass, does before its first images are done."""


class Display(Protocol):
    """Shows stages."""

    def stage(self, name: str) -> AbstractContextManager[Stage]:
        """A stage for the time of the block."""

    def doing(self, text: str) -> None:
        """Say what the stage under way does until its work advances."""

    def say(self, text: str) -> None:
        """A line of its own, such as whom a run waits for."""


class Quiet(Silent):
    """Shows nothing; also the one stage that it gives."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage that nobody sees."""
        yield self

    def say(self, text: str) -> None:
        """Nobody reads."""


def count_images(
    stage: Stage, jobs: Sequence[shards.Job], plan: shards.Plan, complete: Sequence[shards.Job] = ()
) -> None:
    """Tell a stage how many images an extraction has still to do.

    Args:
        stage: is told.
        jobs: what is extracted; these must be claimed.
        plan: how they are cut.
        complete: other datasets of the run, which are there.
    """
    stage.doing("looks for what is there")
    lacking = [shard for job in jobs if not job.complete for shard in shards.missing(job, plan)]
    todo = sum(shard.stop - shard.start for shard in lacking)
    rows = sum(job.manifest.rows for job in (*jobs, *complete))
    stage.count("images", todo, rows - todo)
    stage.doing(LOADS)
