"""Several evaluations one after the other: repeats of one, or a run for each model of a sweep.

What is wrong with one of several repeats ends all of them. The models of a sweep have nothing to do with each
other: what is wrong with one is told, and the others run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.stages.prepare import Prepared, Seen, prepare
from pipeline.stages.progress import FIRST
from pipeline.workflows.progress import Display, Quiet

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a run came to nothing, as text: the exception would keep its network and tensors in memory."""

    name: str
    """Of the run."""
    seed: int
    run: str
    """What it is called: its name, with the seed where others have that name."""
    error: str
    traceback: str
    """Empty of a mistake of the user's."""


class Several:
    """Evaluations, and why some of a sweep came to nothing."""

    def __init__(self, configs: Sequence[Config], tell: Callable[[Failure], None]) -> None:
        """Evaluations of these configs.

        Args:
            configs: of a sweep if their names differ.
            tell: is called when a run of a sweep fails.
        """
        self.configs = configs
        self.failed: list[Failure] = []
        self._names = [config.name for config in configs]
        self._tell = tell

    def prepared(self, display: Display | None = None) -> list[Prepared]:
        """Those that are ready to start; `display` shows what is opened.

        Raises:
            UserError: a mistake in a repeat, in every model of a sweep, or two repeats that are one run.
        """
        with (display or Quiet()).stage("prepare", FIRST) as stage:
            opened = partial(prepare, seen=Seen(), stage=stage)
            ready = self._each(opened, [(config, config) for config in self.configs])
            if not ready and not any(failure.traceback for failure in self.failed):
                raise UserError("\n".join(f"{failure.run}: {failure.error}" for failure in self.failed))
            stage.note = f"{sum(each.images for each in ready):,} images"
        for failure in self.failed:
            self._tell(failure)
        _require_others(ready)
        return ready

    def run(self, execute: Callable[[Prepared], T], ready: Sequence[Prepared]) -> list[T]:
        """What came of each that is ready."""
        return self._each(execute, [(each.config, each) for each in ready], self._tell)

    def _each(
        self,
        work: Callable[[Any], T],
        given: Sequence[tuple[Config, Any]],
        tell: Callable[[Failure], None] = lambda _: None,
    ) -> list[T]:
        found = []
        for config, each in given:
            try:
                found.append(work(each))
            except Exception as error:
                if len({*self._names}) == 1:
                    raise
                self.failed.append(self._failure(config, error))
                tell(self.failed[-1])
        return found

    def _failure(self, config: Config, error: Exception) -> Failure:
        run = config.name if self._names.count(config.name) == 1 else f"{config.name} (seed {config.seed})"
        trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        return Failure(config.name, config.seed, run, str(error), trace)


def _require_others(repeats: Sequence[Prepared]) -> None:
    """Refuse repeats that are one run, as of two files with the same weights."""
    seen: dict[tuple[str, str], Prepared] = {}
    for ready in repeats:
        first = seen.setdefault((ready.config.name, ready.fingerprint), ready)
        if first is not ready:
            model, other = first.config.model, ready.config.model
            raise UserError(
                f"--weights: {model.weights} and {other.weights} have the same content, so that both are one "
                "run. Give each its own."
            )
