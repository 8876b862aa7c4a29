"""Reads arguments, calls the package, turns errors into exit statuses.

0 success, 2 a mistake of the user's (one message, no traceback), 3 an alarm that was asked for, 130
interrupted, 1 anything else; the job's status where a command waited for one.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.models import CommandInfo

from pipeline import __version__, imports
from pipeline.cli import (  # noqa: F401 - their commands
    bundles,
    checks,
    configs,
    detectors,
    explain,
    fiftyone,
    jobs,
    running,
    ui,
    validate,
    workspace,
)
from pipeline.cli.app import app, complain, console
from pipeline.errors import UserError

_ORDER = (
    *("run", "extract", "fit", "score", "evaluate", "report", "tune"),
    *("bundle", "apply"),
    *("submit", "status", "stop"),
    *("validate", "detectors", "doctor", "verify"),
    *("runs", "compare", "explain", "fiftyone", "ui", "clean"),
    *("init", "schema"),
)
"""Of the commands in the help."""


def _place(command: CommandInfo) -> int:
    return _ORDER.index(command.name or getattr(command.callback, "__name__", ""))


app.registered_commands.sort(key=_place)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the command itself."""
    if version:
        console.print(__version__)
        raise typer.Exit


def _end(number: int, _: object) -> None:
    """Leave by an exception, so that whatever is held is given back."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an old terminal gets question marks, not a traceback
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    atexit.register(gc.freeze)  # or Python looks through all that was imported once more, for a second
    signal.signal(signal.SIGTERM, _end)  # Ray, once started, has a handler that does the same
    os.environ[imports.FOLDER] = str(Path.cwd())  # inherited by Ray's workers
    try:
        app()
    except UserError as error:
        complain("\n".join([str(error), *getattr(error, "__notes__", ())]))
        raise SystemExit(2) from None
