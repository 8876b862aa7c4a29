"""Commands about jobs of another cluster: submit, status, stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pipeline.cli.app import (
    Address,
    Json,
    Overrides,
    Quietly,
    Verbose,
    Workspace,
    apart,
    app,
    aside,
    changes,
    console,
    document,
    load,
)
from pipeline.cluster.remote.start import COMMANDS, OF_CONFIGS
from pipeline.errors import UserError

_PLACES = {
    "tune": ("output",),
    "bundle": ("run", "out", "export"),
    "apply": ("bundle", "data", "out", "workspace"),
    "verify": ("folder",),
}
"""Parameters that are files or folders, which the cluster must see."""

_OF_THE_CONFIG = {"overrides": "--set", "workspace": "--workspace"}
"""Parameters that change the config that is sent, and their options."""


@app.command()
def submit(
    source: Annotated[
        str, typer.Argument(metavar="FIRST", help="The command's first argument: CONFIG, RUN or BUNDLE.")
    ],
    address: Address,
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENTS", help="The command's others, after a --.")
    ] = None,
    name: Annotated[
        str, typer.Option("--command", metavar="NAME", help=f"One of {', '.join(COMMANDS)}.")
    ] = "run",
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Environment variable to send, or pattern; may be repeated."),
    ] = [],  # noqa: B006
    pip: Annotated[
        bool, typer.Option("--pip", help="Have Ray install what the code needs, where the cluster lacks it.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log while waiting.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the job is submitted.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")
    ] = False,
    quiet: Quietly = False,
    verbose: Verbose = 0,
) -> None:
    """Run an evaluation, or another long command, on a Ray cluster, and wait for its end.

    Submitting again resumes it. Arguments of the command itself come after `--`.

    Example: `ood-pipeline submit quickstart --address http://head:8265 --workspace /shared/ood --env 'AWS_*'`
    """
    with aside("submit", "loads Ray", quiet):
        from pipeline.cluster.remote import submit as jobs

    ours = [*(rest or ()), *["--fresh"] * fresh, *["-v"] * (verbose if _takes(name, "verbose") else 0)]
    if name not in OF_CONFIGS:
        ours += [f"--set={each}" for each in overrides]
        ours += [f"--workspace={workspace}"] if workspace else []
    order = jobs.Order(source, changes(overrides, workspace), name, tuple(ours), tuple(env), pip)
    _check(order.line)
    if name == "tune":
        load(source, overrides, workspace)  # refuses a sweep
    if dry_run:
        jobs.show(order, console, bool(verbose))
    else:
        sending = aside("submit", "sends code and files to the cluster", quiet)
        raise typer.Exit(jobs.submit(order, address, console, follow, not no_wait, sending))


def _check(line: list[str]) -> None:
    """Refuse what the command would refuse, and files that the cluster does not see."""
    from pipeline.cluster.remote import package

    name, *arguments = line
    given = _commands()[name].make_context(name, arguments).params
    for key in _PLACES.get(name, ()):
        for path in [given[key]] if isinstance(given[key], str) else given[key]:
            package.require_elsewhere(f"--command {name}: {key}", path)
    if name in OF_CONFIGS:
        _check_of_config(given)
    if name == "apply":
        from pipeline.workflows.apply import require_settable

        require_settable(given["overrides"])


def _check_of_config(given: Mapping[str, Any]) -> None:
    """The same of a command that takes a config."""
    from pipeline.cluster.remote import package
    from pipeline.config.loading import is_name

    for key, option in _OF_THE_CONFIG.items():
        if given[key]:
            raise UserError(
                f"{option}: after --, it would change the config on the cluster, where files of this machine "
                "are not. Give it before the --."
            )
    for weights in given.get("weights", ()):
        if not is_name(weights):
            package.require_elsewhere("--weights", weights)


def _commands() -> dict[str, Any]:
    """All commands by name."""
    return typer.main.get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def _takes(name: str, parameter: str) -> bool:
    """Whether there is a command of this name that has the parameter."""
    command = _commands().get(name)
    return command is not None and any(each.name == parameter for each in command.params)


@app.command()
def status(
    address: Address,
    job: Annotated[str, typer.Argument(help="One job in full.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log until it ends; the exit status is the job's.")
    ] = False,
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """List the jobs of a cluster, or show one.

    Example: `ood-pipeline status quickstart-1a2b3c4d --address http://head:8265 --follow`
    """
    apart(as_json)
    with aside("status", "asks the cluster", quiet):
        from pipeline.cluster.remote import submit as jobs

        cluster = jobs.Cluster(address)
    ending = jobs.watch(cluster, job, console, follow=True) if job and follow else None
    if as_json or ending is None:
        with aside("status", "asks the cluster", quiet):
            found = [cluster.info(job)] if job else cluster.jobs()
        if as_json:
            described = list(map(jobs.described, found))
            document(described[0] if job else described)
        elif job:
            jobs.describe(found[0], console)
        else:
            jobs.table(found, console)
    if ending is not None:
        raise typer.Exit(ending)


@app.command()
def stop(
    job: Annotated[str, typer.Argument(help="The job.")], address: Address, quiet: Quietly = False
) -> None:
    """Stop a job of a cluster and wait until it gave its workspace back; submitting again resumes it.

    Example: `ood-pipeline stop quickstart-1a2b3c4d --address http://head:8265`
    """
    with aside("stop", "asks the cluster", quiet):
        from pipeline.cluster.remote import submit as jobs

        cluster = jobs.Cluster(address)
    jobs.stop(cluster, job, console)
