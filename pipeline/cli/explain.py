"""The command `explain`: one image of a run."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Json, Quietly, apart, app, aside, console, display, document

if TYPE_CHECKING:
    from pipeline.workflows.explain import Explained, Neighbour, Said


@app.command()
def explain(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, path or URI: `<workspace>/runs/<name>[/<id>]`.")
    ],
    key: Annotated[
        str, typer.Argument(help="Of the image, as tables of scores and report/review.csv have it.")
    ],
    dataset: Annotated[str, typer.Option(help="That it is in, if several have such a key.")] = "",
    nearest: Annotated[
        int, typer.Option(min=0, max=100, help="Closest training images to find; 0 = none, which is quick.")
    ] = 5,
    page: Annotated[
        str, typer.Option("--html", metavar="FILE", help="Write it as a page with pictures, too.")
    ] = "",
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """What each detector says of one image, and the training images that are most like it to the detectors.

    Example: `ood-pipeline explain ./workspace/runs/quickstart ood_animals_x/00000007 --nearest 3`
    """
    apart(True)  # progress, too: it is not what a pipe is for
    from pipeline.workflows import explain as work

    found = work.explain(run, key, dataset or None, nearest, display(quiet))
    if page:  # first: who reads standard output may stop before its end
        from pipeline.workspace import files

        with aside("explain", "reads the pictures", quiet):
            pictures = work.pictures(run, found)
        files.write_text(files.at(page), _page(found, pictures))
    apart(as_json)
    if as_json:
        document(asdict(found))
    else:
        _show(found)
    if page:
        console.print(f"page     {page}", markup=False, soft_wrap=True)


def _show(found: Explained) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    console.print(f"{found.key} of {found.dataset}, {_classes(found, found)}", markup=False)
    table = Table("detector", "score", "above ID images", "p-value", "flagged", box=SIMPLE)
    for said in found.said:
        table.add_row(*map(Text, _cells(said)))
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
                Text(found.shown(each.label)),
                Text(found.shown(each.prediction)),
            )
        console.print(near)


_STYLE = (
    "body{font:14px sans-serif;margin:2em}td,th{padding:2px 1em;text-align:left}"
    "figure{display:inline-block;margin:0 2em 1em 0}img{min-height:96px;image-rendering:pixelated}"
)


def _page(found: Explained, pictures: Mapping[tuple[str, str], bytes]) -> str:
    """The same as an HTML page that stands alone."""

    def figure(dataset: str, key: str, text: str) -> str:
        data = b64encode(pictures.get((dataset, key), b"")).decode()
        image = f'<img src="data:image/jpeg;base64,{data}" alt="">' if data else "no picture"
        return f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>"

    def row(cells: Iterable[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    said = [row(("detector", "score", "above ID images", "p-value", "flagged"), "th")]
    said += [row(_cells(each)) for each in found.said]
    parts = [
        f'<!doctype html>\n<meta charset="utf-8"><title>{escape(found.key)}</title><style>{_STYLE}</style>',
        f"<h1>{escape(found.key)} of {escape(found.dataset)}</h1>",
        figure(found.dataset, found.key, _classes(found, found)),
        f"<table>{''.join(said)}</table>",
    ]
    for name, neighbours in found.nearest.items():
        texts = [(each, f"{each.distance:.4g}: {each.key}, {_classes(found, each)}") for each in neighbours]
        figures = "".join(figure(each.dataset, each.key, text) for each, text in texts)
        parts.append(f"<h2>Nearest training images by {escape(name)}</h2>{figures}")
    return "\n".join(parts) + "\n"


def _classes(found: Explained, image: Explained | Neighbour) -> str:
    label = f"class {found.shown(image.label)}, " if image.label >= 0 else ""
    return f"{label}predicted as class {found.shown(image.prediction)}"


def _cells(said: Said) -> tuple[str, ...]:
    """What a detector says, as it is shown."""
    share = "" if said.percentile is None else f"{said.percentile:.1%}"
    flagged = {None: "", True: "yes", False: "no"}[said.is_ood]
    return said.detector, _number(said.score), share, _number(said.p_value), flagged


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
