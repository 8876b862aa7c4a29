"""The command `explain`: one image of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from pipeline.cli.app import Json, Quietly, apart, app, console, display, document


@app.command()
def explain(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, path or URI: <workspace>/runs/<name>[/<id>].")
    ],
    key: Annotated[
        str, typer.Argument(help="Of the image, as tables of scores and report/review.csv have it.")
    ],
    dataset: Annotated[str, typer.Option(help="That it is in, if several have such a key.")] = "",
    nearest: Annotated[
        int, typer.Option(min=0, max=100, help="Closest training images to find; 0 = none, which is quick.")
    ] = 5,
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """What each detector says of one image, and the training images that are most like it to the detectors.

    Example: `ood-pipeline explain ./workspace/runs/quickstart ood_animals_x/00000007 --nearest 3`
    """
    apart(as_json)
    from pipeline.workflows import explain as work

    found = work.explain(run, key, dataset or None, nearest, display(quiet))
    if as_json:
        document(asdict(found))
    else:
        _show(found)


def _show(found: Any) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    label = f", class {found.label}" if found.label >= 0 else ""
    console.print(
        f"{found.key} of {found.dataset}{label}, predicted as class {found.prediction}", markup=False
    )
    table = Table("detector", "score", "above ID images", "p-value", "flagged", box=SIMPLE)
    for said in found.said:
        share = "" if said.percentile is None else f"{said.percentile:.1%}"
        flagged = {None: "", True: "yes", False: "no"}[said.is_ood]
        table.add_row(*map(Text, (said.detector, _number(said.score), share, _number(said.p_value), flagged)))
    console.print(table)
    if found.norms:
        norms = ", ".join(f"{block} {value:.4g}" for block, value in found.norms.items())
        console.print(f"FeatureNorm of the blocks: {norms}", markup=False, soft_wrap=True)
    for name, neighbours in found.nearest.items():
        near = Table(
            "distance", "training image", "class", "predicted", box=SIMPLE, title=f"Nearest by {name}"
        )
        for each in neighbours:
            near.add_row(
                f"{each.distance:.4g}",
                Text(f"{each.dataset}/{each.key}"),
                str(each.label),
                str(each.prediction),
            )
        console.print(near)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
