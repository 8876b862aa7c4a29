"""What all commands share: the application, the console, and options."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.workflows.progress import Display, Stage


class Commands(TyperGroup):
    """All commands; one that is interrupted ends with status 130 and says how to go on."""

    def invoke(self, ctx: Any) -> Any:
        """Call the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            text = "interrupted; what was finished is kept, and the same command goes on from there"
            Console(stderr=True).print(text)
            # not imported for this: its import may be what was interrupted
            inline = sys.modules.get("pipeline.cluster.inline")
            if inline and any(thread.name.startswith(inline.THREADS) for thread in threading.enumerate()):
                sys.stdout.flush()
                os._exit(130)  # interrupted again: Python would wait for them at its end, too
            raise typer.Exit(130) from None
        finally:
            console.stderr = False


app = typer.Typer(
    name="ood-pipeline",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    Literal["auto", "ray", "inline"],
    typer.Option(
        "--engine",
        help="inline = in this process, without Ray; the same results to the bit. auto = ray, but for up to "
        "20,000 images where no cluster (RAY_ADDRESS), GPU or more than one CPU a worker is asked for.",
    ),
]
Threads = Annotated[
    int,
    typer.Option(min=0, help="Of the inline engine; 0 = one per CPU, 1 = all in one thread, for a debugger."),
]
Verbose = Annotated[
    int,
    typer.Option("-v", count=True, help="Workers log more to RUN/logs: -v what they do, -vv all there is."),
]

Quietly = Annotated[bool, typer.Option("-q", "--quiet", help="Results and warnings, but no progress.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document; all else goes to standard error."),
]


def display(quiet: bool) -> Display:
    """What shows the progress of a command."""
    from pipeline.cli import progress
    from pipeline.workflows.progress import Quiet

    return Quiet() if quiet else progress.Display(console)


@contextmanager
def aside(name: str, doing: str, quiet: bool) -> Iterator[Stage]:
    """Tell on standard error what a command does in the block that has no stages, if it takes a while.

    Nothing else may be printed there meanwhile.
    """
    from pipeline.cli import progress

    shown = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), quiet=quiet)
    with progress.Display(shown).aside(name, doing) as stage:
        yield stage


def apart(json: bool) -> None:
    """Keep standard output free for a JSON document, if there is to be one."""
    console.stderr = json


def document(content: Any) -> None:
    """Print a JSON document; numbers that are not finite are null."""
    typer.echo(json.dumps(_finite(content), indent=1, ensure_ascii=False, default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def warn(texts: Iterable[str], word: str = "warning") -> None:
    """Print texts, each after a word that says what it is."""
    for text in texts:
        console.print(f"{word:<8} {text}", markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print what went wrong to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", markup=False)


def level(verbose: int) -> int:
    """The level of logging for a number of -v."""
    return (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]


def changes(overrides: list[str], workspace: str) -> list[str]:
    """Overrides, with that of the workspace."""
    return [*overrides, f"workspace={json.dumps(workspace)}"] if workspace else overrides


def load(source: str, overrides: list[str], workspace: str) -> Config:
    """The config of a command that is about one model."""
    from pipeline.config import loading

    return loading.load(source, changes(overrides, workspace))


def load_all(source: str, overrides: list[str], workspace: str) -> list[Config]:
    """The config of a command, one for each of its models."""
    from pipeline.config import loading

    return loading.load_all(source, changes(overrides, workspace))
