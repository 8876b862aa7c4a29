"""What all commands share: the application, the console, and options."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipeline.config.schema import Config

app = typer.Typer(
    name="ood-pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Evaluate out-of-distribution detectors: one forward pass, every detector, tracked in MLflow.\n\n"
    "Start with `ood-pipeline run quickstart`.",
)


console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A config file, or the name of a bundled one.")
]

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one value; may be repeated.")
]


Workspace = Annotated[str, typer.Option(help="Folder for features, fits and runs; overrides the config's.")]


Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster's head."),
]

EngineName = Annotated[
    Literal["ray", "inline"],
    typer.Option("--engine", help="inline = in this process, without Ray; the same results to the bit."),
]
Threads = Annotated[
    int,
    typer.Option(min=0, help="Of the inline engine; 0 = one per CPU, 1 = all in one thread, for a debugger."),
]
Verbose = Annotated[
    int,
    typer.Option("-v", count=True, help="Workers log more to RUN/logs: -v what they do, -vv all there is."),
]


def level(verbose: int) -> int:
    """The level of logging for a number of -v."""
    return (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]


def changes(overrides: list[str], workspace: str) -> list[str]:
    """Overrides, with that of the workspace."""
    return [*overrides, f"workspace={json.dumps(workspace)}"] if workspace else overrides


def load(source: str, overrides: list[str], workspace: str) -> Config:
    """The config of a command."""
    from pipeline.config import loading

    return loading.load(source, changes(overrides, workspace))
