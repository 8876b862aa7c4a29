"""The leaderboard for the terminal, and what thresholds flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from pipeline.results.calibrated import percent, sentence
from pipeline.results.report.tables import GROUPS, Cell, Results, leaderboard, summary
from pipeline.workspace.files import Place

_ABREAST = 3
"""Datasets beside each other, so that a terminal of 80 columns holds them."""

_INTERVAL = len("87.5–92.7")
"""Width of an interval, which goes below its share where the terminal is too narrow for both."""


def console_table(run: Place) -> Table:
    """The leaderboard of a finished run for the terminal; best values in green, AUROC below 0.5 in red.

    `=` marks what the test on the same images cannot tell from the best.

    Raises:
        UserError: if the run is not finished.
    """
    results = Results.read(run)
    board = leaderboard(results.metrics, results.differences)
    caption = "Means over datasets, 95% intervals. = level with the best. * uses OOD data"
    table = _table(results.manifest["name"], caption)
    table.add_column("Detector", overflow="fold")
    for metric in summary(results.metrics).values():
        table.add_column(f"{metric.label} {metric.arrow}", justify="right")
    for group in dict.fromkeys(column.group for column in board.columns):
        table.add_section()
        table.add_row(Text(GROUPS[group], "bold"))
        for row in board.rows:
            mark = " *" if results.manifest["detectors"][row.detector]["uses_ood"] else ""
            cells = [c for column, c in zip(board.columns, row.cells, strict=True) if column.group == group]
            table.add_row(Text(row.detector + mark), *map(_console_cell, cells))
    return table


def decisions_table(run: Place) -> Table | None:
    """What the thresholds of a finished run flag at the first false-alarm rate; None if it has none.

    Raises:
        UserError: if the run is not finished.
    """
    results = Results.read(run)
    if not results.decisions:
        return None
    rate = results.manifest["thresholds"]["false_alarm"][0]
    rows = results.decided()[rate]
    title = f"Flagged as OOD at a false-alarm rate of {percent(rate)}"
    table = _table(title, sentence(results.manifest, results.decisions))
    table.show_header = False  # each section has its own
    first = next(iter(rows.values()))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for _ in first[:_ABREAST]:
        table.add_column(justify="right", overflow="fold", min_width=_INTERVAL)
    for start in range(0, len(first), _ABREAST):
        shown = slice(start, start + _ABREAST)
        table.add_section()
        titles = (Text(f"{cell['dataset']} ({cell['role']})", "bold") for cell in first[shown])
        table.add_row(Text("Detector", "bold"), Text("Threshold", "bold"), *titles)
        for detector, cells in rows.items():
            threshold = cells[0]["threshold"]
            told = "by class" if threshold is None else f"{threshold:.5g}"
            table.add_row(Text(detector), told, *map(_share, cells[shown]))
    return table


def _table(title: str, caption: str) -> Table:
    """One without margins, so that a line of 80 columns holds its rows."""
    return Table(
        title=Text(title),
        caption=Text(caption),
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _share(cell: Mapping[str, Any]) -> Text:
    if cell["share"] is None:
        return Text("no images")
    low, high = (f"{100 * cell[name]:.1f}" for name in ("ci_low", "ci_high"))
    return Text.assemble(f"{100 * cell['share']:.2f}%", (f" {low}–{high}", "dim"))


def _console_cell(cell: Cell) -> Text:
    style = "bold green" if cell.best else "red" if cell.below_chance else "green" if cell.level else ""
    return Text.assemble(
        (f"{'=' * cell.level}{cell.value:.4f}", style), (f" {cell.low:.3f}–{cell.high:.3f}", "dim")
    )
