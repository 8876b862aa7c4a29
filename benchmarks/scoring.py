"""(f) Scoring of many cached rows on two cores: rows per second and memory at two sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fashion
import numpy as np
from memory import Watch
from numpy.typing import NDArray
from processes import fresh
from results import Check, Section, at_least, at_most
from session import Session

from pipeline import detectors
from pipeline.cluster.engine import Engine, opened
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.config import schema
from pipeline.detectors.base import Detector, Jigsaw, Mixup, Training
from pipeline.learned import statistics
from pipeline.learned.statistics import Head
from pipeline.stages import fit, index, score, shards
from pipeline.stages.statistics import SLICE
from pipeline.workspace import artifacts, tables

WIDTH, CLASSES, BLOCKS, PART = 512, 10, 4, 2048
BANK_ROWS = 10_000
CORES = 2
COLUMNS = (KEY, LABEL, PREDICTION, FEATURE, LOGITS, BLOCK_NORM)
LINEAR, FLAT = 0.9, 0.10


@dataclass(frozen=True)
class Scored:
    """One scoring."""

    rows: int
    seconds: float
    """From the call to the table of all detectors."""
    steady: float
    """Rows per second once each core has written a slice, until the last, by time stamps of its parts."""
    peaks: dict[str, tuple[int, int]]


def measure(session: Session) -> Section:
    """Rows per second without and with nearest neighbours."""
    alone = [_scored(session, rows, False) for rows in _sizes(session, 100_000, 1_000_000)]
    indexed_sizes = (100_000, 1_000_000) if session.large else (80_000, 240_000)
    indexed = [_scored(session, rows, True) for rows in _sizes(session, *indexed_sizes)]
    return Section(
        title="(f) Scoring of cached rows",
        text=f"Synthetic feature tables (D = {WIDTH}, C = {CLASSES}, parts of {PART:,} rows) through all of "
        "the quickstart's detectors on 2 cores, without and with those that look up neighbours (KNN and "
        f"GROOD, each in an exact index of {BANK_ROWS:,} rows; its cost is the size of the bank times the "
        "rows). Steady: rows of the slices whose scores were written after the first two, which are scored "
        "beside each other, over the time from then to the last. Seconds in all: with the table of all "
        "detectors that is put together in the end. The tables are on the disk and in the system's cache. "
        "Memory is the anonymous one, as in (e).",
        header=("", "rows", "rows/s, steady", "seconds in all", "driver, MiB", "score task", "index"),
        rows=[
            *(_row("without neighbours", found) for found in alone),
            *(_row("with neighbours", found) for found in indexed),
        ],
        checks=[
            *_checks("scoring without neighbours", *alone),
            *_checks("scoring with neighbours", *indexed),
        ],
    )


def _sizes(session: Session, few: int, many: int) -> tuple[int, int]:
    return (5 * PART, 20 * PART) if session.quick else (few, many)


def _scored(session: Session, rows: int, neighbours: bool) -> Scored:
    print(f"  {rows:,} rows {'with' if neighbours else 'without'} neighbours", flush=True)
    with TemporaryDirectory(dir=session.scratch) as folder:
        found = fresh(_score, Path(folder), rows, neighbours)
    print(f"  {found.steady:,.0f} rows/s", flush=True)
    return found


def _score(folder: Path, rows: int, neighbours: bool) -> Scored:
    """Write a table, fit on another, score; the driver of a run is this process."""
    os.environ.pop("RAY_ADDRESS", None)
    chosen = schema.Config.model_validate(fashion.quickstart()).built()
    chosen = {label: found for label, found in chosen.items() if neighbours or not found.neighbours}
    bank_table = _table(folder / "train", BANK_ROWS, seed=0)
    source = _table(folder / "features", rows, seed=1)
    os.sync()  # else the system writes them to the disk while they are scored, the longer the more there are
    with Watch(os.getpid()) as watch, opened("ray") as engine:
        engine.cpus()  # connects; that is not scoring
        ready = fitted(engine, chosen, _training(bank_table), bank_table, folder / "fits")
        banks = {label: bank.folder for label, bank in ready.banks.items()}
        searched = index.start(engine, ready.banks.values(), schema.Index()) if banks else None
        started = time.perf_counter()
        job = score.ScoreJob("synthetic", source, places(folder / "scores", ready, ready.scorers))
        score.run(engine, [job], score.Scoring(ready.scorers, COLUMNS, banks, searched))
        score.assemble(engine, job, folder / "table")
        seconds = time.perf_counter() - started
    return Scored(rows, seconds, _steady(folder / "scores", source), watch.peaks)


def fitted(
    engine: Engine, chosen: Mapping[str, Detector], training: Training, train: tables.Table, folder: Path
) -> fit.Fitted:
    """Detectors that learned from a table, and their banks."""

    def made_of(detector: Detector, without: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
        return {"detector": detectors.identity(detector, without)}, {"train": train.content}

    return fit.fit_detectors(
        engine, chosen, training, artifacts.Store(folder), train, made_of, schema.Index()
    )


def places(folder: Path, ready: fit.Fitted, labels: Iterable[str]) -> dict[str, artifacts.Artifact]:
    """Where the scores of some detectors are written, by label."""
    return {
        label: artifacts.Artifact(folder / label, score.FORMAT, {"label": label}, ready.contents[label])
        for label in labels
    }


def _steady(folder: Path, source: tables.Table) -> float:
    """Rows per second once each core has written the scores of a slice, until the last."""
    sizes = [stop - start for start, stop in source.slices(SLICE)]
    parts = [folder.glob(f"*/{tables.part_name(number)}") for number in range(len(sizes))]
    finished = sorted(max(part.stat().st_mtime for part in found) for found in parts)
    first = min(CORES, len(sizes) - 1)
    return (source.rows - sum(sizes[:first])) / (finished[-1] - finished[first - 1])


def _table(folder: Path, rows: int, seed: int) -> tables.Table:
    """A complete folder of feature parts."""
    rng = np.random.default_rng(seed)
    artifact = artifacts.Artifact(folder, shards.FORMAT, {"rows": rows, "seed": seed})
    return stored(artifact, (_columns(rng, start, min(PART, rows - start)) for start in range(0, rows, PART)))


def stored(artifact: artifacts.Artifact, pieces: Iterable[Mapping[str, NDArray[Any]]]) -> tables.Table:
    """An artifact, complete, with a part of each of some equally named columns."""
    made = {}
    for number, columns in enumerate(pieces):
        table = tables.arrow_columns(columns)
        made[tables.part_name(number)] = artifacts.write(
            artifact.folder / tables.part_name(number), tables.written(table), rows=len(table)
        )
    return tables.Table.of(artifact.folder, artifact.finish(made))


def _columns(rng: np.random.Generator, start: int, count: int) -> dict[str, NDArray[Any]]:
    logits = rng.standard_normal((count, CLASSES), np.float32)
    return {
        KEY: np.array([f"synthetic/{row:08d}" for row in range(start, start + count)]),
        LABEL: rng.integers(0, CLASSES, count, np.int32),
        PREDICTION: logits.argmax(axis=1).astype(np.int32),
        FEATURE: np.maximum(rng.standard_normal((count, WIDTH), np.float32), 0),
        LOGITS: logits,
        BLOCK_NORM: rng.random((count, BLOCKS), np.float32),
    }


def _training(table: tables.Table) -> Training:
    """What the detectors fit to: true statistics of a table, made-up results of the extra passes."""
    rng = np.random.default_rng(2)
    rows = table.read(0, table.rows, (FEATURE, LOGITS, LABEL, PREDICTION))
    chosen = schema.Config.model_validate(fashion.quickstart()).built().values()
    made_up = {Mixup: {"mean": rng.random(WIDTH)}, Jigsaw: {"ratio": rng.random(BLOCKS)}}
    head = Head(rng.standard_normal((CLASSES, WIDTH), np.float32), np.zeros(CLASSES, np.float32))
    wanted = [need for detector in chosen for need in (*detector.statistics(), *detector.calibration())]
    known = statistics.of(rows, wanted, head)
    return Training(
        head.weight,
        head.bias,
        blocks=tuple(f"block{number}" for number in range(BLOCKS)),
        train=known,
        id_val=known,
        passes={spec: made_up[type(spec)] for detector in chosen for spec in detector.passes()},
    )


def _row(what: str, found: Scored) -> tuple[str, ...]:
    memory = [
        f"{found.peaks[kind][0] / 2**20:,.0f}" if kind in found.peaks else ""
        for kind in ("driver", "score task", "index actor")
    ]
    return (what, f"{found.rows:,}", f"{found.steady:,.0f}", f"{found.seconds:.1f}", *memory)


def _checks(what: str, few: Scored, many: Scored) -> list[Check]:
    speed = many.steady / few.steady
    growth = max(many.peaks[kind][0] / few.peaks[kind][0] - 1 for kind in ("driver", "score task"))
    sizes = f"from {few.rows:,} to {many.rows:,} rows"
    return [
        at_least(f"{what}: rows/s {sizes}", speed, LINEAR),
        at_most(f"{what}: growth of peak memory {sizes}", growth, FLAT, "{:.1%}"),
    ]
