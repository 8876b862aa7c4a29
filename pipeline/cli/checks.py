"""Commands that check: the machine (doctor), and a finished run (verify)."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from pipeline.cli.app import app, console


@app.command()
def doctor(
    uri: Annotated[
        str, typer.Option("--mlflow", help="Also ask this MLflow server whether it is there.")
    ] = "",
) -> None:
    """Versions, what torch and FAISS see of the machine, and free disk; exit status 1 if something is wrong.

    Example: `ood-pipeline doctor --mlflow http://127.0.0.1:5000`
    """
    from pipeline.cli.doctor import examine

    problems = 0
    for finding in examine(uri):
        mark = "[green]ok[/green]  " if finding.good else "[red]bad[/red] "
        console.print(f"{mark} {finding.what:<12} {escape(finding.text)}")
        problems += not finding.good
    if problems:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, path or URI: <workspace>/runs/<name>.")
    ],
) -> None:
    """Count a finished run again from its files; exit status 1 if anything does not add up.

    Example: `ood-pipeline verify ./workspace/runs/quickstart`
    """
    from pipeline.workspace.runs import located

    place = located(folder)
    from pipeline.cli.progress import Display
    from pipeline.results import verify as recount

    checks, fixes = 0, list[str]()
    with Display(console).stage("verify", recount.rows(place)) as stage:
        for finding in recount.examine(place, stage.advance):
            mark = "[green]ok[/green]  " if finding.good else "[red]bad[/red] "
            text = f"{finding.what}: expected {finding.expected}; found {finding.found}"
            console.print(f"{mark} {finding.where:<20} {escape(text)}")
            checks += 1
            fixes += [] if finding.good else [finding.fix]
        stage.note = f"{stage.done:,} rows, {checks} checks, {len(fixes)} bad"
    for fix in dict.fromkeys(fixes):
        console.print(f"fix  {fix}", markup=False)
    if fixes:
        raise typer.Exit(1)
