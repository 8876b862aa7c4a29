"""The leaderboard for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from pipeline.results.report.tables import GROUPS, Cell, Results, leaderboard, summary
from pipeline.workspace.files import Place


def console_table(run: Place) -> Table:
    """The leaderboard of a finished run for the terminal; best values in green, AUROC below 0.5 in red.

    `=` marks what the test on the same images cannot tell from the best.

    Raises:
        UserError: if the run is not finished.
    """
    results = Results.read(run)
    board = leaderboard(results.metrics, results.differences)
    table = Table(
        title=Text(results.manifest["name"]),
        caption="Means over the datasets, with 95% intervals. = level with the best. * uses OOD data",
        box=SIMPLE,
    )
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


def _console_cell(cell: Cell) -> Text:
    style = "bold green" if cell.best else "red" if cell.below_chance else "green" if cell.level else ""
    return Text.assemble(
        (f"{'=' * cell.level}{cell.value:.4f}", style), (f" {cell.low:.3f}–{cell.high:.3f}", "dim")
    )
