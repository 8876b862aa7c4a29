"""The command `detectors`: what there is, and one in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.cli.app import Json, Quietly, apart, app, aside, console, document

if TYPE_CHECKING:
    from pipeline.detectors.base import Detector


@app.command()
def detectors(
    name: Annotated[
        str, typer.Argument(help="One detector in full: its name, or ./file.py:Class of your own.")
    ] = "",
    applying: Annotated[
        str,
        typer.Option("--config", metavar="CONFIG", help="Also tell which ones apply to this model and data."),
    ] = "",
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """List the detectors, or explain one: formula, needs, parameters with defaults, paper.

    Example: `ood-pipeline detectors grood`
    """
    from pipeline import detectors as known

    apart(as_json)
    if name:
        if as_json:
            document(_documented(name))
        else:
            _explain(name)
        return
    found = {
        method: known.get(method)() for method in [*known.names(), *known.combining(), *known.installed()]
    }
    obstacles = None
    if applying:
        with aside("detectors", "opens the network", quiet):
            obstacles = _obstacles(applying, found)
    if as_json:
        document([_row(label, detector, obstacles) for label, detector in found.items()])
    else:
        _list_detectors(found, obstacles)


def _obstacles(source: str, found: dict[str, Detector]) -> dict[str, str]:
    """Why detectors do not apply to a config; adds those that the config names.

    Args:
        source: the config.
        found: detectors by name; replaced by that of the config where it has one of that label.
    """
    from pipeline.config import loading
    from pipeline.stages import prepare

    settings = loading.load(source)
    found |= settings.built()
    return prepare.obstacles(found, settings)


def _list_detectors(found: Mapping[str, Detector], obstacles: Mapping[str, str] | None) -> None:
    """One line each; cost: cheap, or what is built before scoring."""
    from rich.measure import Measurement
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    for column in (
        "method",
        "year",
        "paper",
        "needs",
        "cost",
        *(["applies"] if obstacles is not None else ()),
    ):
        table.add_column(column, overflow="fold")
    for label, detector in found.items():
        table.add_row(*map(escape, _row(label, detector, obstacles).values()))
    if console.is_terminal:
        console.print(table)
    else:  # one line each, for other programs
        whole = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        Console(highlight=False, width=whole).print(table)


def _row(label: str, detector: Detector, obstacles: Mapping[str, str] | None) -> dict[str, str]:
    """One line of the list."""
    methods, years, papers = zip(*map(_described, detector.parts()), strict=True)
    cost = ["index"] * detector.neighbours + ["pass"] * bool(detector.passes()) + per_image(detector)
    names = ("method", "year", "paper", "cost")
    texts = (" + ".join(dict.fromkeys(words)) for words in (methods, years, papers, cost))
    found = {"name": label, **dict(zip(names, texts, strict=True)), "needs": _needs(detector)}
    found["cost"] = found.pop("cost") or "cheap"
    if obstacles is not None:
        found["applies"] = f"no: {obstacles[label]}" if label in obstacles else "yes"
    return found


def per_image(detector: Detector) -> list[str]:
    """What the extra columns of a detector cost beyond the one forward pass; empty if nothing."""
    passes = sum(extra.forwards for extra in detector.extras() if not extra.tapped)
    return [f"{passes} passes per image"] if passes else []


def _described(detector: Detector) -> tuple[str, str, str]:
    """Method and year; first author, venue and where to find the paper."""
    method, _, year = detector.title.removesuffix(")").rpartition(" (")
    authors, _, rest = detector.paper.partition(": ")
    first, others, _ = authors.partition(", ")
    return method, year, f"{first}{' et al.' if others else ''}, {rest.rpartition('. ')[2]}"


def _needs(detector: Detector) -> str:
    """What a detector reads and learns from."""
    from pipeline import columns
    from pipeline.detectors._combination import Combination

    words = {columns.FEATURE: "features", columns.BLOCK_NORM: "feature maps (block norms)"}
    needs = [words.get(column, column) for column in detector.columns]
    needs += ["scores of other detectors", "calibration images"] * isinstance(detector, Combination)
    needs += dict.fromkeys(extra.needs for extra in detector.extras())
    needs += ["training statistics"] * bool(detector.statistics()) + ["index"] * detector.neighbours
    needs += ["held-out or training statistics"] * bool(detector.calibration())
    needs += [f"extra pass ({type(spec).__name__.lower()})" for spec in detector.passes()]
    return ", ".join(needs + ["OOD data"] * detector.uses_ood())


def _documented(name: str) -> dict[str, object]:
    """What `_explain` shows, as a document."""
    from pipeline import detectors as found

    detector = found.get(name)
    return {
        "name": name,
        "title": detector.title,
        "paper": detector.paper,
        "formula": detector.formula,
        "reading": detector.reading,
        "needs": _needs(detector()),
        "parameters": {
            key: {"default": field.default, "description": field.description}
            for key, field in detector.model_fields.items()
        },
    }


def _explain(name: str) -> None:
    from pipeline import detectors as found

    detector = found.get(name)
    console.print(f"[bold]{escape(detector.title)}[/bold]  {escape(detector.paper)}\n")
    console.print(escape(detector.formula) + "\n")
    if detector.reading:
        console.print(f"How to read it: {escape(detector.reading)}\n")
    extras = [f"{extra.kind} ({extra.needs})" for extra in detector().extras()]
    reads = ", ".join([*detector.columns, *extras]) or "scores of other detectors"
    console.print(f"reads: {reads}; higher = more OOD")
    passes = ", ".join(type(spec).__name__ for spec in detector().passes())
    console.print(
        f"extra passes: {passes or 'none'}; nearest neighbours: {'yes' if detector.neighbours else 'no'}\n"
    )
    for key, field in detector.model_fields.items():
        console.print(f"  [bold]{key}[/bold] = {field.default!r}  {escape(field.description or '')}")
