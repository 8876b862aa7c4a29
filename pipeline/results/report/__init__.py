"""The report of a finished run: one HTML page that stands alone, its figures, and the leaderboard.

Reads the run folder, and the images it shows; runs no model, and computes no metric but those by group.
"""

from __future__ import annotations

from pipeline.data.metadata import Metadata
from pipeline.results.report.console import console_table, decisions_table
from pipeline.results.report.tables import Results, leaderboard
from pipeline.results.report.verdict import verdict as _verdict
from pipeline.workspace.files import Place

__all__ = ["console_table", "decisions_table", "leaderboard", "verdict", "write"]


def verdict(run: Place) -> list[str]:
    """Which detector a finished run speaks for, in sentences; see `verdict.verdict`.

    Raises:
        UserError: if the run is not finished.
    """
    return _verdict(Results.read(run))


def write(run: Place, images: int = 0, metadata: Metadata | None = None) -> Place:
    """Write `report/` into the folder of a finished run; returns the page. See `page.write`.

    Raises:
        UserError: if the run is not finished, or the published numbers it names are not there.
    """
    from pipeline.results.report import page  # draws, which takes seconds to import

    return page.write(run, images, metadata)
