"""The report of a finished run: one HTML page that stands alone, its figures, and the leaderboard.

Reads the run folder only; runs no model and computes no metric.
"""

from __future__ import annotations

from pipeline.results.report.console import console_table, decisions_table
from pipeline.results.report.tables import leaderboard
from pipeline.workspace.files import Place

__all__ = ["console_table", "decisions_table", "leaderboard", "write"]


def write(run: Place) -> Place:
    """Write `report/index.html` and `report/*.png` into the folder of a finished run; returns the page.

    Raises:
        UserError: if the run is not finished, or the published numbers it names are not there.
    """
    from pipeline.results.report import page  # draws, which takes seconds to import

    return page.write(run)
