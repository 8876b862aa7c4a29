"""Commands that check: the machine (doctor), and a finished run (verify)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from pipeline.cli.app import Json, Quietly, apart, app, aside, console, display, document

_MARKS = {True: "[green]ok[/green]  ", False: "[red]bad[/red] "}


@app.command()
def doctor(
    uri: Annotated[
        str, typer.Option("--mlflow", help="Also ask this MLflow server whether it is there.")
    ] = "",
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Versions, what torch and FAISS see of the machine, and free disk; exit status 1 if something is wrong.

    Example: `ood-pipeline doctor --mlflow http://127.0.0.1:5000`
    """
    from pipeline.cli.doctor import examine

    apart(as_json)
    with aside("doctor", "looks at what is installed", quiet) as stage:
        found = list(examine(uri, stage))
    for finding in found:
        console.print(f"{_MARKS[finding.good]} {finding.what:<12} {escape(finding.text)}")
    if as_json:
        document(list(map(asdict, found)))
    if not all(finding.good for finding in found):
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, path or URI: `<workspace>/runs/<name>`.")
    ],
    all_of_them: Annotated[
        bool, typer.Option("-v", "--verbose", help="Name every check, not only what is bad.")
    ] = False,
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Count a finished run again from its files; exit status 1 if anything does not add up.

    Example: `ood-pipeline verify ./workspace/runs/quickstart`
    """
    from pipeline.workspace.runs import located

    apart(as_json)
    place, found = located(folder), []
    with display(quiet).stage("verify", "reads the record") as stage:
        from pipeline.results import verify as recount

        stage.count("rows", recount.rows(place))
        for finding in recount.examine(place, stage.advance):
            found.append(finding)
            if all_of_them or not finding.good:
                text = f"{finding.what}: expected {finding.expected}; found {finding.found}"
                console.print(f"{_MARKS[finding.good]} {finding.where:<20} {escape(text)}")
        bad = [finding for finding in found if not finding.good]
        stage.note = f"{len(found)} checks, {len(bad)} bad"
    for fix in dict.fromkeys(finding.fix for finding in bad):
        console.print(f"fix  {fix}", markup=False)
    if as_json:
        document(list(map(asdict, found)))
    if bad:
        raise typer.Exit(1)
