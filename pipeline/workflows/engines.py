"""The engine of a workflow, with all that its detectors need where it works."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from threadpoolctl import threadpool_limits

from pipeline.cluster import engine
from pipeline.cluster.engine import Engine
from pipeline.cluster.logs import Logs
from pipeline.detectors.base import Detector
from pipeline.network.known import settings_kept
from pipeline.stages.prepare import Prepared
from pipeline.workflows.progress import Display
from pipeline.workspace.files import Place


class Asked(Protocol):
    """What a command says of its engine."""

    @property
    def engine(self) -> engine.Asked:
        """Which."""

    @property
    def threads(self) -> int | None:
        """Of the inline engine; None = as many as there are CPUs."""


@contextmanager
def engine_for(
    asked: Asked,
    images: int,
    plain: bool,
    display: Display,
    workspace: Place,
    logs: Logs,
    detectors: Collection[Detector],
    read: Sequence[Path] = (),
) -> Iterator[Engine]:
    """The engine that was asked for, with the code of detectors, and torch as it was after the block.

    Args:
        asked: by the command.
        images: of all datasets.
        plain: whether no work asks for more than one CPU.
        display: tells what opening it does, and if work stays here without having been asked to.
        workspace: what the work writes to.
        logs: where workers log to.
        detectors: all that score.
        read: other folders that every node must see.
    """
    name = engine.chosen(asked.engine, images, plain)
    neighbours = any(detector.neighbours for detector in detectors)
    load = partial(_load, name, neighbours, display, unasked=name == "inline" != asked.engine)
    with (
        settings_kept(),
        threadpool_limits(limits=1),  # what the driver fits has the same bits on any machine of a kind
        engine.opened(name, workspace, logs, asked.threads, load, read) as chosen,
    ):
        chosen.carry(type(part) for detector in detectors for part in detector.parts())
        try:
            yield chosen
        except KeyboardInterrupt:
            if chosen.here and chosen.cpus() > 1:
                display.say(
                    "interrupted; what threads have begun is finished first, another Ctrl-C leaves it"
                )
            raise


def connected(asked: engine.Asked, several: Iterable[Prepared]) -> AbstractContextManager[None]:
    """One connection to Ray for all engines opened in the block, if any of several runs takes Ray."""
    names = {engine.chosen(asked, ready.images, ready.plain) for ready in several}
    return engine.shared("ray" if "ray" in names else "inline")


def _load(name: engine.Name, neighbours: bool, display: Display, unasked: bool) -> None:
    """Import what computes and takes seconds to import; a run that has nothing to do needs none of it."""
    if unasked:
        display.say(
            f"work stays in this process, as up to {engine.SMALL:,} images do; `--engine ray` starts Ray"
        )
    display.doing("loads PyTorch")
    from pipeline.stages import extract  # noqa: F401

    if neighbours:
        from pipeline.stages import faiss_shard  # noqa: F401
    if name == "ray":
        display.doing("starts Ray")
