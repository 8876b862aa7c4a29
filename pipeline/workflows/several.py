"""Several evaluations one after the other: repeats of one, or a run for each model of a sweep.

What is wrong with one of several repeats ends all of them. The models of a sweep have nothing to do with each
other: what is wrong with one is told, and the others run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.stages.prepare import Prepared, prepare

T = TypeVar("T")


class Several:
    """Evaluations, and why some of a sweep came to nothing."""

    def __init__(self, configs: Sequence[Config], tell: Callable[[str, Exception], None]) -> None:
        """Evaluations of these configs.

        Args:
            configs: of a sweep if their names differ.
            tell: is called with the name of a run of a sweep that fails, and why.
        """
        self.configs = configs
        self.failed: dict[str, Exception] = {}
        self._apart = len({config.name for config in configs}) > 1
        self._tell = tell

    def prepared(self) -> list[Prepared]:
        """Those that are ready to start.

        Raises:
            UserError: a mistake in a repeat, in every model of a sweep, or two repeats that are one run.
        """
        ready = self._each(prepare, [(config.name, config) for config in self.configs])
        if not ready and all(isinstance(error, UserError) for error in self.failed.values()):
            raise UserError("\n".join(f"{name}: {error}" for name, error in self.failed.items()))
        for name, error in self.failed.items():
            self._tell(name, error)
        _require_others(ready)
        return ready

    def run(self, execute: Callable[[Prepared], T], ready: Sequence[Prepared]) -> list[T]:
        """What came of each that is ready."""
        return self._each(execute, [(each.config.name, each) for each in ready], self._tell)

    def _each(
        self,
        work: Callable[[Any], T],
        given: Sequence[tuple[str, Any]],
        tell: Callable[[str, Exception], None] = lambda *_: None,
    ) -> list[T]:
        found = []
        for name, each in given:
            try:
                found.append(work(each))
            except Exception as error:
                if not self._apart:
                    raise
                self.failed[name] = error
                tell(name, error)
        return found


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
