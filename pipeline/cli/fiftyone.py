"""The command `fiftyone`: images of a run that are worth a look, as a dataset of FiftyOne."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.app import Quietly, app, aside, console, warn


@app.command()
def fiftyone(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, path or URI: `<workspace>/runs/<name>[/<id>]`.")
    ],
    name: Annotated[str, typer.Option(help="Of the dataset; default: of the run and its id.")] = "",
    images: Annotated[int, typer.Option(min=1, help="How many of each kind and dataset.")] = 100,
    files: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="Write images of archives, arrays and object stores there; else left out."
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset of that name.")] = False,
    quiet: Quietly = False,
) -> None:
    """Make a dataset of FiftyOne of the images that a finished run has most wrong and most right.

    Needs its package: `pip install 'ood-pipeline[fiftyone]'`.

    Example: `ood-pipeline fiftyone workspace/runs/quickstart --files pictures`
    """
    with aside("fiftyone", "reads the run", quiet) as stage:
        from pipeline.results import fiftyone as work

        made = work.export(run, name, images, files, force, stage)
    console.print(f"dataset  {made.name}, {made.samples:,} images", markup=False, soft_wrap=True)
    console.print(f"show it  fiftyone app launch {made.name}", markup=False, soft_wrap=True)
    if made.inside:
        text = f"{made.inside:,} images are no files of their own on this machine and are left out"
        warn([f"{text}; --files FOLDER writes them there."], "notice")
    if made.gone:
        warn([f"{len(made.gone):,} images can be read no more and are left out, first: {made.gone[0]}"])
