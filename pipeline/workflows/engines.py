"""The engine of a workflow, with all that its detectors need where it works."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from threadpoolctl import threadpool_limits

from pipeline.cluster import engine
from pipeline.cluster.engine import Engine
from pipeline.cluster.logs import Logs
from pipeline.detectors.base import Detector
from pipeline.network.known import settings_kept
from pipeline.workspace.files import Place


class Asked(Protocol):
    """What a command says of its engine."""

    @property
    def engine(self) -> engine.Name:
        """Which."""

    @property
    def threads(self) -> int | None:
        """Of the inline engine; None = as many as there are CPUs."""


@contextmanager
def engine_for(
    asked: Asked, workspace: Place, logs: Logs, detectors: Collection[Detector], read: Sequence[Path] = ()
) -> Iterator[Engine]:
    """The engine that was asked for, with the code of detectors, and torch as it was after the block.

    Args:
        asked: by the command.
        workspace: what the work writes to.
        logs: where workers log to.
        detectors: all that score.
        read: other folders that every node must see.
    """
    load = partial(_load, any(detector.neighbours for detector in detectors))
    with (
        settings_kept(),
        threadpool_limits(limits=1),  # what the driver fits has the same bits on any machine of a kind
        engine.opened(asked.engine, workspace, logs, asked.threads, load, read) as chosen,
    ):
        chosen.carry(type(part) for detector in detectors for part in detector.parts())
        yield chosen


def _load(neighbours: bool) -> None:
    """Import what computes and takes seconds to import; a run that has nothing to do needs none of it."""
    from pipeline.stages import extract  # noqa: F401

    if neighbours:
        from pipeline.stages import faiss_shard  # noqa: F401
