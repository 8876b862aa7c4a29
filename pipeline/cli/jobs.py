"""Commands about jobs of another cluster: submit, status, stop."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.app import (
    Address,
    ConfigFile,
    Json,
    Overrides,
    Verbose,
    Workspace,
    apart,
    app,
    changes,
    console,
    document,
)


@app.command()
def submit(
    source: ConfigFile,
    address: Address,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    stage: Annotated[str, typer.Option(help="run, extract, fit, score or evaluate.")] = "run",
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Environment variable to send, or pattern; may be repeated."),
    ] = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log while waiting.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the job is submitted.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")
    ] = False,
    verbose: Verbose = 0,
) -> None:
    """Run an evaluation on a Ray cluster, and wait for its end; submitting again resumes it.

    Example: `ood-pipeline submit quickstart --address http://head:8265 --workspace /shared/ood --env 'AWS_*'`
    """
    from pipeline.cluster.remote import submit as jobs

    order = jobs.Order(source, changes(overrides, workspace), stage, fresh, tuple(env), verbose)
    if dry_run:
        jobs.show(order, console)
    else:
        raise typer.Exit(jobs.submit(order, address, console, follow, wait=not no_wait))


@app.command()
def status(
    address: Address,
    job: Annotated[str, typer.Argument(help="One job in full.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log until it ends; the exit status is the job's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs of a cluster, or show one.

    Example: `ood-pipeline status quickstart-1a2b3c4d --address http://head:8265 --follow`
    """
    apart(as_json)
    from pipeline.cluster.remote import submit as jobs

    cluster = jobs.Cluster(address)
    ending = jobs.watch(cluster, job, console, follow=True) if job and follow else None
    found = [cluster.info(job)] if job else cluster.jobs()
    if as_json:
        described = list(map(jobs.described, found))
        document(described[0] if job else described)
    elif not job:
        jobs.table(found, console)
    elif ending is None:
        jobs.describe(found[0], console)
    if ending is not None:
        raise typer.Exit(ending)


@app.command()
def stop(job: Annotated[str, typer.Argument(help="The job.")], address: Address) -> None:
    """Stop a job of a cluster and wait until it gave its workspace back; submitting again resumes it.

    Example: `ood-pipeline stop quickstart-1a2b3c4d --address http://head:8265`
    """
    from pipeline.cluster.remote import submit as jobs

    jobs.stop(jobs.Cluster(address), job, console)
