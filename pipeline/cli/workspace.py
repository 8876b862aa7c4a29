"""Commands about a workspace: the runs in it (runs), and what none of them needs (clean)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.app import Json, Quietly, apart, app, aside, console, document

if TYPE_CHECKING:
    from pipeline.results.comparing import Comparing
    from pipeline.workspace.files import Place

Folder = Annotated[str, typer.Option("--workspace", help="Folder or URI of the workspace.")]


@app.command()
def runs(workspace: Folder = "workspace", quiet: Quietly = False, as_json: Json = False) -> None:
    """List the runs of a workspace: when, what, the best detectors, and how each went.

    Example: `ood-pipeline runs --workspace /shared/ood`
    """
    apart(as_json)
    with aside("runs", "looks for runs", quiet) as stage:
        from pipeline.results import history

        found = history.listed(_place(workspace), stage)
    if as_json:
        document(list(map(asdict, found)))
        return
    table = Table(box=SIMPLE, title=f"Runs of {workspace}")
    for name in ("name", "id", "state", "date (UTC)"):
        table.add_column(name, no_wrap=True)
    table.add_column("model", overflow="fold")
    for name in ("datasets", "detectors"):
        table.add_column(name, justify="right")
    for name in ("best on near-OOD", "best on far-OOD"):
        table.add_column(name)
    for run in found:
        best = [f"{name} {value:.4f}" if name else "" for name, value in run.best]
        date = run.finished[:16].replace("T", " ")
        texts = (run.name, run.id, run.state, date, run.model, str(run.datasets), str(run.detectors), *best)
        table.add_row(*map(Text, texts))
    if found:
        (console if console.is_terminal else Console(width=200, highlight=False)).print(table)
    else:
        console.print(f"no runs in {workspace}", markup=False)


@app.command()
def compare(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run folders, paths or URIs: `<workspace>/runs/<name>[/<id>]`."
        ),
    ],
    metric: Annotated[
        list[str], typer.Option(help="auroc (default), oscr, aurc, fpr95_id, ...; may be repeated.")
    ] = [],  # noqa: B006 - typer copies defaults
    dataset: Annotated[
        list[str],
        typer.Option(help="Or a group; may be repeated. Default: means over groups, and ID datasets."),
    ] = [],  # noqa: B006
    group: Annotated[
        bool,
        typer.Option(
            help="Runs of one config that differ in seed or weights alone become one column: mean ± std."
        ),
    ] = True,
    other_data: Annotated[
        bool, typer.Option("--other-data", help="Show runs on other images, too, without ranks and tests.")
    ] = False,
    format: Annotated[
        Literal["table", "csv", "markdown", "latex", "html", "json", "openood"],
        typer.Option(help="csv, json: a row for every value; openood: rows of OpenOOD's leaderboard."),
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    out: Annotated[str, typer.Option(metavar="FILE", help="Write it there; default: the terminal.")] = "",
    quiet: Quietly = False,
) -> None:
    """Compare detectors of several runs, of any workspaces: values, ranks, tests on the same images, cost.

    Example: `ood-pipeline compare ./workspace/runs/quickstart --metric auroc --metric aurc --format markdown`
    """
    from pipeline.errors import UserError

    if format == "openood" and (metric or dataset):
        raise UserError("--format openood: has its own metrics and groups. Leave out --metric and --dataset.")
    with aside("compare", "reads the runs", quiet) as stage:
        from pipeline.results.evaluation import opened
        from pipeline.workspace.runs import is_search

        named = [folder for folder in folders if not is_search(folder)] or folders  # `NAME/*` has these, too
        evaluations = list(dict.fromkeys(map(opened, named)))  # a run that is named twice is one
        stage.doing("compares them")
        from pipeline.results.comparing import compared
        from pipeline.results.report import leaderboards

        found = compared(evaluations, metric or ["auroc"], dataset, group)
        if not other_data:
            found.require_same_data()
    format = "json" if as_json else format
    if format == "table" and not out:
        show_comparison(found)
        return
    text = leaderboards.FORMATS["markdown" if format == "table" else format](found)
    if out:
        from pipeline.workspace import files

        files.write_text(files.at(out), text)
    else:
        typer.echo(text, nl=False)


def show_comparison(found: Comparing) -> None:
    """Runs side by side in the terminal."""
    from pipeline.results.report import leaderboards

    (console if console.is_terminal else Console(width=200, highlight=False)).print(
        leaderboards.console_table(found)
    )
    for note in found.notes:
        console.print(f"note     {note}", markup=False, soft_wrap=True)


@app.command()
def clean(
    workspace: Folder = "workspace",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them; without it they are only listed.")
    ] = False,
    quiet: Quietly = False,
) -> None:
    """List, or delete, what no run of a workspace refers to: features of other weights, old statistics.

    Runs themselves are never deleted. To give one up, delete its folder and clean.

    Example: `ood-pipeline clean --workspace /shared/ood --delete`
    """
    from pipeline.errors import UserError
    from pipeline.workspace import artifacts, leftovers
    from pipeline.workspace.claims import opened

    place = _place(workspace)
    with opened(place) as claims:
        claims.require_idle()  # what a run makes right now, none refers to yet
        with aside("clean", "looks for what no run refers to", quiet):
            try:
                found = sorted(leftovers.unreferred(place), key=lambda leftover: leftover.name)
            except ValueError as error:
                raise UserError(f"{error}.") from None
        for leftover in found:
            console.print(f"{leftover.size / 2**20:10,.1f} MiB  {leftover.name}", markup=False)
            if delete:
                artifacts.remove_folder(leftover.folder)
    if not found:
        console.print("nothing to delete")
        return
    size = sum(leftover.size for leftover in found) / 2**20
    done = "deleted" if delete else "in all; --delete deletes them"
    console.print(f"{size:10,.1f} MiB  {len(found)} folders {done}")


def _place(workspace: str) -> Place:
    """The workspace, which must be there."""
    from pipeline.errors import UserError
    from pipeline.workspace import files

    place = files.at(workspace)
    if not place.is_dir():
        raise UserError(f"--workspace: no such folder: {workspace}. Name the workspace of your runs.")
    return place
