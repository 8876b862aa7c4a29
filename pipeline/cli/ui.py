"""The command `ui`: MLflow's pages of a run."""

from __future__ import annotations

import os
import subprocess
import time
import webbrowser
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Quietly, app, aside, console
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.results.mlflow.tracking import Session

_PATIENCE = 120.0
"""Seconds in which a server must answer."""
_TRIES = 3
"""How often a server is started: others may take its port before it listens, seconds after it was free."""


@app.command()
def ui(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder: `<workspace>/runs/<name>[/<id>]`.")
    ],
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser, or only print its link.")
    ] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the server; 0 = 5000 or above.")] = 0,
    quiet: Quietly = False,
) -> None:
    """Show a run in MLflow; starts a server for the workspace's own store, if none runs, until Ctrl-C.

    The server can be reached from this machine alone.

    Example: `ood-pipeline ui ./workspace/runs/quickstart`
    """
    with aside("ui", "looks for a server that shows the run", quiet):
        from pipeline.results.mlflow import tracking
        from pipeline.workspace.runs import located

        session = tracking.session_of(located(run))
        found = tracking.address(session)
    if found is not None:
        _show(found + tracking.page(session), browser)
        return
    for _ in range(1 if port else _TRIES):
        if _serve(session, port or tracking.free_port(), browser, quiet):
            return
    raise UserError("MLflow's server did not start; what it said stands above. Choose another --port.")


def _serve(session: Session, port: int, browser: bool, quiet: bool) -> bool:
    """Show the run at a port until Ctrl-C; whether its server did not end before it answered.

    Raises:
        UserError: it answers nothing.
    """
    from pipeline.results.mlflow import tracking

    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(
        tracking.command(session, port), env=os.environ | settings, stdout=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + _PATIENCE
            with aside("ui", "starts MLflow's server", quiet):
                while not tracking.shows(session, port):
                    if server.poll() is not None:
                        return False
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"{tracking.local(port)}: MLflow's server does not answer. Try again."
                        )
                    time.sleep(0.1)
            _show(tracking.local(port) + tracking.page(session), browser)
            console.print("Ctrl-C ends the server.")
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()
    return True


def _show(link: str, browser: bool) -> None:
    console.print(link, markup=False, soft_wrap=True)
    if browser:
        webbrowser.open(link)
