"""Runs side by side as text: for a terminal, a paper, a page, or a program."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from pipeline.results.comparing import Cell, Comparing, shown
from pipeline.results.report.tables import GROUPS, ID_GROUPS


@dataclass(frozen=True)
class Section:
    """Detectors against columns for one metric on one dataset or group."""

    title: str
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def sections(found: Comparing) -> Iterator[Section]:
    """One for each metric and place; detectors by their best rank."""
    places = dict.fromkeys((cell.metric, cell.group, cell.dataset) for cell in found.cells)
    for metric, group, dataset in places:
        cells = {
            (cell.detector, cell.column): cell
            for cell in found.cells
            if (cell.metric, cell.group, cell.dataset) == (metric, group, dataset)
        }
        detectors = list(dict.fromkeys(detector for detector, _ in cells))
        detectors.sort(
            key=lambda name: min(c.rank or len(cells) + 1 for (d, _), c in cells.items() if d == name)
        )
        where = (GROUPS | ID_GROUPS)[group] + ("" if dataset == group else f", {dataset}")
        rows = (
            (name, tuple(cells.get((name, column.name)) for column in found.columns)) for name in detectors
        )
        yield Section(f"{where}: {shown(metric)[0]}", tuple(rows))


def _costs(found: Comparing) -> Iterator[tuple[str, list[str]]]:
    costs = [column.costs() for column in found.columns]
    for what in costs[0]:
        values = [each[what] for each in costs]
        if any(value is not None for value in values):
            yield what, ["" if value is None else f"{value:,.0f}" for value in values]


def text_of(cell: Cell | None) -> str:
    """A cell in one line."""
    if cell is None:
        return ""
    rank = "" if cell.rank is None else f" ({cell.rank})"
    few = f" [{cell.n} of {cell.runs} runs]" if cell.n < cell.runs else ""
    if cell.std is not None:
        return f"{cell.value:.4f} ± {cell.std:.4f}{rank}{few}"
    mark = "=" if cell.level and cell.rank != 1 else ""
    return f"{mark}{cell.value:.4f} {cell.ci_low:.3f}–{cell.ci_high:.3f}{rank}{few}"


def console_table(found: Comparing) -> Table:
    """For the terminal; the best of each section in green."""
    table = Table(caption=found.caption, box=SIMPLE)
    table.add_column("Detector", overflow="fold")
    for column in found.columns:
        table.add_column(Text(column.name), justify="right", overflow="fold")
    for section in sections(found):
        table.add_section()
        table.add_row(Text(section.title, "bold"))
        for name, cells in section.rows:
            table.add_row(Text(name), *(Text(text_of(cell), _style(cell)) for cell in cells))
    costs = list(_costs(found))
    if costs:
        table.add_section()
        table.add_row(Text("Seconds per million images", "bold"))
        for what, values in costs:
            table.add_row(Text(what), *values)
    return table


def _style(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return "bold green" if cell.rank == 1 else "green" if cell.level else ""


def _lines(found: Comparing) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows of every table."""
    for section in sections(found):
        yield section.title, [[name, *map(text_of, cells)] for name, cells in section.rows]
    costs = [[what, *values] for what, values in _costs(found)]
    if costs:
        yield "Seconds per million images", costs


def _markdown(found: Comparing) -> str:
    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    head = ["Detector", *(column.name for column in found.columns)]
    parts = [
        "\n".join([f"### {title}", "", row(head), "|---" * len(head) + "|", *map(row, rows)])
        for title, rows in _lines(found)
    ]
    return "\n\n".join([*parts, found.caption, *found.notes]) + "\n"


_TEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "±": r"$\pm$",
        "–": "--",
    }
)


def _latex(found: Comparing) -> str:
    def row(cells: list[str]) -> str:
        return " & ".join(cell.translate(_TEX) for cell in cells) + r" \\"

    head = row(["Detector", *(column.name for column in found.columns)])
    width = len(found.columns) + 1
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(found.columns)}}}",
        r"\toprule",
        head,
    ]
    for title, rows in _lines(found):
        lines += [
            r"\midrule",
            rf"\multicolumn{{{width}}}{{l}}{{\textbf{{{title.translate(_TEX)}}}}} \\",
            *map(row, rows),
        ]
    notes = [f"% {note}" for note in (found.caption, *found.notes)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes]) + "\n"


def _html(found: Comparing) -> str:
    def row(cells: list[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = row(["Detector", *(column.name for column in found.columns)], "th")
    parts = [
        "\n".join([f"<h3>{html.escape(title)}</h3>", "<table>", head, *map(row, rows), "</table>"])
        for title, rows in _lines(found)
    ]
    notes = [f"<p>{html.escape(note)}</p>" for note in (found.caption, *found.notes)]
    return "\n".join(['<!doctype html>\n<meta charset="utf-8">', *parts, *notes]) + "\n"


def _csv(found: Comparing) -> str:
    records, stream = found.records(), io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def _json(found: Comparing) -> str:
    return json.dumps({"cells": found.records(), "notes": found.notes}, indent=1, ensure_ascii=False) + "\n"


_OPENOOD = (
    *("Training", "Postprocessor", "Near-OOD_AUROC", "Far-OOD_AUROC", "ID_Accuracy", "Outlier_Data", "Arch"),
    "Additional_Description",
)
"""Its columns."""


def _openood(found: Comparing) -> str:
    """Rows as in the files behind OpenOOD's leaderboard (v1.5): percentages, `/` for what nobody knows."""
    cells = {
        (cell.column, cell.detector, cell.group): (cell.value, cell.std)
        for cell in found.cells
        if cell.metric == "auroc" and cell.dataset == cell.group
    }
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_OPENOOD)
    for column in found.columns:
        record, accuracy = column.runs[0].record, column.id_accuracy()
        for label, detector in record["detectors"].items():
            near, far = (cells.get((column.name, label, group)) for group in ("near_ood", "far_ood"))
            values = map(_percent, (near, far, accuracy))
            outliers = "Yes" if detector["uses_ood"] else "No"
            writer.writerow(["/", label, *values, outliers, record["model"]["name"], column.name])
    return stream.getvalue()


def _percent(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "/"
    value, std = found
    return f"{100 * value:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


FORMATS: Mapping[str, Callable[[Comparing], str]] = {
    "csv": _csv,
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
    "json": _json,
    "openood": _openood,
}
"""Text by the name of its format. CSV and JSON have one row per cell, OpenOOD's per detector and column."""
