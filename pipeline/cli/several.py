"""What the commands show of several evaluations: repeats, or the models of a sweep."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from pipeline.cli.app import complain

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.workflows.several import Several


def several_of(configs: Sequence[Config]) -> Several:
    """Evaluations that tell why they fail; what is no mistake of the user's with its traceback."""
    from pipeline.errors import UserError
    from pipeline.workflows.several import Several

    def tell(name: str, error: Exception) -> None:
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        complain(f"{name}: {error}")

    return Several(configs, tell)


def documented(found: Sequence[Mapping[str, Any]], several: Several) -> object:
    """What came of each as one document: a list of several, in which failures come last."""
    failed = [{"name": name, "error": str(error)} for name, error in several.failed.items()]
    return [*found, *failed] if len(several.configs) > 1 else found[0]


def end(several: Several, status: int = 1) -> None:
    """Leave with a status if models of a sweep failed, after their names."""
    if several.failed:
        complain(f"{len(several.failed)} of {len(several.configs)} failed: {', '.join(several.failed)}")
        raise typer.Exit(status)
