"""(i) A bundle applied to images against the extraction of their features alone, in turns."""

from __future__ import annotations

import shutil
from statistics import median

import commands
import extraction
from results import Section, at_most
from session import Session

TARGET = 1.0
"""Times the seconds of extraction: applying is to take no longer."""


def measure(session: Session) -> Section:
    """Seconds of both commands for few and for many images, and what each further image costs."""
    counts = session.size(10_000, 1000), session.size(60_000, 4000)
    run = session.quickstart.record
    name = f"workspace/runs/{run['name']}/{run['id']}"
    commands.called(["bundle", name, "--weights", "--out", "detector.ood"], session.first)
    rows, ratios = [], []
    for turn in range(1, session.size(3, 1) + 1):
        extracted, applied = ([side(session, count) for count in counts] for side in (_extracted, _applied))
        ratios.append((applied[1] - applied[0]) / (extracted[1] - extracted[0]))
        for side, seconds in (("extract", extracted), ("apply", applied)):
            rate = (counts[1] - counts[0]) / (seconds[1] - seconds[0])
            rows.append((f"turn {turn}: {side}", *(f"{each:.1f}" for each in seconds), f"{rate:,.0f}"))
        print(f"  turn {turn}: {ratios[-1]:.2f} x", flush=True)
    return Section(
        title="(i) A bundle applied to images against extraction alone",
        text=f"`ood-pipeline apply` with all {len(run['detectors'])} detectors of the quickstart, from the "
        "listing to the table in Parquet, and `ood-pipeline extract`, each in an empty workspace, with two "
        "actors and the same batch size. What is paid once, as starting Ray, falls out of the difference.",
        header=("seconds", *(f"{count:,} images" for count in counts), "images/s between"),
        rows=rows,
        checks=[at_most("apply, all detectors, each further image, against extract", median(ratios), TARGET)],
    )


def _extracted(session: Session, count: int) -> float:
    """Seconds of `extract`."""
    folder = session.scratch / "extraction"
    folder.mkdir()
    seconds = commands.run("extract", extraction.settings(session, count), folder).seconds
    shutil.rmtree(folder)
    return seconds


def _applied(session: Session, count: int) -> float:
    """Seconds of `apply`."""
    folder = session.scratch / "extraction"
    folder.mkdir()
    (dataset,) = extraction.settings(session, count)["datasets"]
    given = [
        str(session.first / "detector.ood"),
        dataset["path"],
        "--format",
        "idx",
        "--out",
        "table.parquet",
    ]
    seconds, _, _ = commands.called(["apply", *given, "--set", "extract.actors=2"], folder)
    shutil.rmtree(folder)
    return seconds
