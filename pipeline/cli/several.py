"""What the commands show of several evaluations: repeats, or the models of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from pipeline.cli.app import complain

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.workflows.several import Failure, Several


def several_of(configs: Sequence[Config]) -> Several:
    """Evaluations that tell why they fail; what is no mistake of the user's with its traceback."""
    from pipeline.workflows.several import Several

    def tell(failure: Failure) -> None:
        sys.stderr.write(failure.traceback)
        complain(f"{failure.run}: {failure.error}")

    return Several(configs, tell)


def documented(found: Sequence[Mapping[str, Any]], several: Several) -> object:
    """What came of each as one document: a list of several, in which failures come last."""
    failed = [{"name": each.name, "seed": each.seed, "error": each.error} for each in several.failed]
    return [*found, *failed] if len(several.configs) > 1 else found[0]


def end(several: Several, status: int = 1) -> None:
    """Leave with a status if models of a sweep failed, after their names."""
    if several.failed:
        runs = ", ".join(failure.run for failure in several.failed)
        complain(f"{len(several.failed)} of {len(several.configs)} failed: {runs}")
        raise typer.Exit(status)
