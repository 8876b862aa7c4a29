"""(i) A bundle applied to images against the extraction of their features alone, in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import commands
import extraction
from processes import fresh
from results import Check, Section
from session import Session

from pipeline.workflows import apply
from pipeline.workflows.progress import Quiet, Stage

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
        taken = [(_extracted(session, count), _applied(session, count)) for count in counts]
        extracted, applied = zip(*taken, strict=True)
        ratios.append((applied[1] - applied[0]) / (extracted[1] - extracted[0]))
        for side, seconds in (("extract", extracted), ("apply", applied)):
            rows.append(
                (f"turn {turn}: {side}", *(f"{each:.1f}" for each in seconds), _each(counts, seconds))
            )
        print(f"  turn {turn}: {ratios[-1]:.2f} x", flush=True)
    return Section(
        title="(i) A bundle applied to images against extraction alone",
        text=f"`ood-pipeline apply` with all {len(run['detectors'])} detectors of the quickstart, from the "
        "listing to the table in Parquet, and `ood-pipeline extract` of the same images, each in an empty "
        "workspace, with the same network, batch size, default shards and two actors, in turns. What is paid "
        "once, as starting Ray, falls out of the difference. Last rows: CPU seconds of the stages of `apply` "
        "in one process of one thread; listing and extraction are what `extract` does, too.",
        header=("seconds", *(f"{count:,} images" for count in counts), "ms of each further image"),
        rows=rows + _profile(session, counts),
        checks=[
            Check(
                "apply, all detectors, each further image, against extract",
                f"{median(ratios):.2f} x",
                f"<= {TARGET:.2f} x",
                0 < median(ratios) <= TARGET,  # too few images to measure give less than none
            )
        ],
    )


def _each(counts: Sequence[int], seconds: Sequence[float]) -> str:
    """Milliseconds of each further image."""
    return f"{1000 * (seconds[1] - seconds[0]) / (counts[1] - counts[0]):.3f}"


def _extracted(session: Session, count: int) -> float:
    """Seconds of `extract`."""
    with _folder(session) as folder:
        return commands.run("extract", extraction.settings(session, count), folder).seconds


def _applied(session: Session, count: int) -> float:
    """Seconds of `apply`."""
    with _folder(session) as folder:
        bundle, images = str(session.first / "detector.ood"), _images(session, count)
        given = ["apply", bundle, images, "--format", "idx", "--out", "table.parquet"]
        more = ["--set", "extract.actors=2", "--set", "extract.shard_rows=auto"]
        return commands.called([*given, *more, *commands.ON_RAY], folder)[0]


def _images(session: Session, count: int) -> str:
    """Path of the images that `extract` is given."""
    path: str = extraction.settings(session, count)["datasets"][0]["path"]
    return path


@contextmanager
def _folder(session: Session) -> Iterator[Path]:
    """The folder that `extraction.settings` writes images to, empty."""
    folder = session.scratch / "extraction"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def _profile(session: Session, counts: Sequence[int]) -> list[tuple[str, ...]]:
    """CPU seconds of the stages, and of scoring without the detectors that search neighbours."""
    run = session.quickstart.record
    alone = [label for label in run["detectors"] if label not in run["index"]]
    rows = []
    for detectors, what, stages in (
        ((), "", ("prepare", "extract", "score", "decide")),
        (alone, " without neighbours", ("score",)),
    ):
        found = []
        for count in counts:
            with _folder(session) as folder:
                bundle, images = str(session.first / "detector.ood"), _images(session, count)
                found.append(fresh(_stages, bundle, images, str(folder), detectors))
        for stage in stages:
            seconds = [each[stage] for each in found]
            named = f"CPU of one thread: {stage}{what}"
            rows.append((named, *(f"{each:.2f}" for each in seconds), _each(counts, seconds)))
    return rows


class _Clock(Quiet):
    """Measures what the stages take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Stage]:
        """A stage whose CPU seconds are kept."""
        begun = time.process_time()
        yield self
        self.seconds[name] = time.process_time() - begun


def _stages(bundle: str, images: str, folder: str, detectors: Sequence[str]) -> dict[str, float]:
    """CPU seconds of each stage of `apply` in this process."""
    clock = _Clock()
    options = apply.Options(
        format="idx",
        detectors=detectors,
        workspace=f"{folder}/workspace",
        overrides=["extract.shard_rows=auto"],
        engine="inline",
        threads=1,
    )
    apply.execute(bundle, images, f"{folder}/table.parquet", options, clock)
    return clock.seconds
