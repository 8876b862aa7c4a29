"""(i) A bundle applied to images against the extraction of their features alone, in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commands
import extraction
import fashion
from PIL import Image
from processes import fresh
from results import Check, Section
from session import Session

from pipeline.config import loading
from pipeline.workflows import apply
from pipeline.workflows.progress import Quiet, Stage

TARGET = 1.0
"""Times the seconds of extraction: applying is to take no longer."""
SIDE = 256
"""Pixels of the pictures that are made for the larger network."""


@dataclass(frozen=True)
class Case:
    """A bundle, and the images that it is applied to."""

    network: str
    bundle: Path
    settings: Callable[[int, Path], dict[str, Any]]
    """The config of `extract` for so many images, which are laid into a folder."""
    form: str
    counts: tuple[int, int]
    turns: int


def measure(session: Session) -> Section:
    """Seconds of both commands for few and for many images, and what each further image costs."""
    rows, checks = [], []
    for case in (_small(session), _large(session)):
        ratios = []
        for turn in range(1, case.turns + 1):
            taken = [
                (_extracted(session, case, count), _applied(session, case, count)) for count in case.counts
            ]
            extracted, applied = zip(*taken, strict=True)
            ratios.append((applied[1] - applied[0]) / (extracted[1] - extracted[0]))
            for side, seconds in (("extract", extracted), ("apply", applied)):
                rows.append(_row(f"{case.network}, turn {turn}: {side}", case, seconds))
            print(f"  {case.network}, turn {turn}: {ratios[-1]:.2f} x", flush=True)
        checks.append(
            Check(
                f"apply, each further image, against extract ({case.network})",
                f"{median(ratios):.2f} x",
                f"<= {TARGET:.2f} x",
                0 < round(median(ratios), 2) <= TARGET,  # too few images to measure give less than none
            )
        )
    return Section(
        title="(i) A bundle applied to images against extraction alone",
        text="`ood-pipeline apply`, from the listing to the table in Parquet, and `ood-pipeline extract` of "
        "the same images, each in an empty workspace, with the same network, batch size, shards and two "
        "actors, in turns: the quickstart's ResNet-10 and its detectors on Fashion-MNIST, and EfficientNet-"
        f"Lite0 with the detectors of `photos` on made-up JPEG pictures of {SIDE} x {SIDE} pixels. What is "
        "paid once, as starting Ray, falls out of the difference. Last rows: CPU seconds of the stages of "
        "`apply` in one process of one thread, with the ResNet-10; listing and extraction are what `extract` "
        "does, too.",
        header=("seconds", "few images", "many images", "ms of each further image"),
        rows=rows + _profile(session, _small(session)),
        checks=checks,
    )


def _small(session: Session) -> Case:
    """The quickstart's network, and all of its detectors."""
    bundle = session.first / "detector.ood"
    if not bundle.exists():
        _bundled(session.quickstart.record, session.first, "--weights")
    counts = session.size(10_000, 1000), session.size(60_000, 4000)
    settings = lambda count, _: extraction.settings(session, count)  # noqa: E731
    return Case("ResNet-10", bundle, settings, "idx", counts, session.size(2, 1))


def _large(session: Session) -> Case:
    """A network that takes a hundred times as long, with the detectors that learn nothing."""
    folder, first = session.scratch / "photos", session.size(200, 16)
    settings = loading.load("photos", ["data=."]).model_dump(mode="json")

    def of(count: int, place: Path) -> dict[str, Any]:
        listed = _draw_pictures(session, count, place / "pictures")
        dataset = {"name": "pictures", "role": "id", "format": "imagelist", "path": str(listed)}
        return {
            "name": "extraction",
            "model": settings["model"],
            "datasets": [dataset],
            "detectors": settings["detectors"],
            "extract": {"batch_size": 32, "actors": 2, "shard_rows": 64},
            "tracking": {"enabled": False},
        }

    if not folder.exists():
        record = commands.run("run", of(first, folder), folder).record
        _bundled(record, folder)
    counts = first, session.size(800, 48)
    return Case("EfficientNet-Lite0", folder / "detector.ood", of, "imagelist", counts, session.size(2, 1))


def _draw_pictures(session: Session, count: int, folder: Path) -> Path:
    """Fashion-MNIST images as large JPEG files; gives a list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label"]
    for number, pixels in enumerate(fashion.images(session.images, count)):
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        picture.save(folder / f"{number:06d}.jpg")
        lines.append(f"{number:06d}.jpg,0")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def _bundled(record: dict[str, Any], folder: Path, *options: str) -> None:
    """Make a bundle of a run."""
    name = f"workspace/runs/{record['name']}/{record['id']}"
    commands.called(["bundle", name, *options, "--out", "detector.ood"], folder)


def _row(what: str, case: Case, seconds: Sequence[float]) -> tuple[str, ...]:
    """Seconds for few and many images, and of each further one."""
    each = 1000 * (seconds[1] - seconds[0]) / (case.counts[1] - case.counts[0])
    shown = [f"{one:.1f} ({count:,})" for one, count in zip(seconds, case.counts, strict=True)]
    return what, *shown, f"{each:.3f}"


def _extracted(session: Session, case: Case, count: int) -> float:
    """Seconds of `extract`."""
    with _folder(session) as folder:
        return commands.run("extract", case.settings(count, folder), folder).seconds


def _applied(session: Session, case: Case, count: int) -> float:
    """Seconds of `apply`."""
    with _folder(session) as folder:
        settings = case.settings(count, folder)
        images, rows = settings["datasets"][0]["path"], settings["extract"].get("shard_rows", "auto")
        given = ["apply", str(case.bundle), images, "--format", case.form, "--out", "table.parquet"]
        more = ["--set", "extract.actors=2", "--set", f"extract.shard_rows={rows}"]
        return commands.called([*given, *more, *commands.ON_RAY], folder)[0]


@contextmanager
def _folder(session: Session) -> Iterator[Path]:
    """The folder that `extraction.settings` writes images to, empty."""
    folder = session.scratch / "extraction"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def _profile(session: Session, case: Case) -> list[tuple[str, ...]]:
    """CPU seconds of the stages, and of scoring without the detectors that search neighbours."""
    run = session.quickstart.record
    alone = [label for label in run["detectors"] if label not in run["index"]]
    rows = []
    for detectors, what, stages in (
        ((), "", ("prepare", "extract", "score", "decide")),
        (alone, " without neighbours", ("score",)),
    ):
        found = []
        for count in case.counts:
            with _folder(session) as folder:
                images = case.settings(count, folder)["datasets"][0]["path"]
                found.append(fresh(_stages, str(case.bundle), images, str(folder), detectors))
        rows += [
            _row(f"CPU of one thread: {stage}{what}", case, [each[stage] for each in found])
            for stage in stages
        ]
    return rows


class _Clock(Quiet):
    """Measures what the stages take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Stage]:
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
