"""(j) What is waited for whatever the images are: start-up of the command, and evaluating many scores."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import commands
import numpy as np
from processes import fresh
from results import Section, at_most
from scoring import stored
from session import Session

from pipeline.cluster.engine import opened
from pipeline.columns import LABEL, PREDICTION
from pipeline.stages import evaluate, score, shards
from pipeline.workspace import artifacts

TIMES = 7
COMMANDS = ("--help", "--version", "detectors")
COMMAND_SECONDS, METRICS_SECONDS = 0.5, 1.0
SETS = {"id": ("id",), "near_ood": ("near a", "near b"), "far_ood": ("far a", "far b", "far c")}
INSIDE, OUTSIDE = 50_000, 250_000
"""Rows of the ID set, and of each OOD set."""


def measure(session: Session) -> Section:
    """Seconds of whole processes, and of the evaluate stage with one detector."""
    times, inside, outside = (session.size(*pair) for pair in ((TIMES, 1), (INSIDE, 500), (OUTSIDE, 2500)))
    started = {command: _seconds(session, command, times) for command in COMMANDS}
    rows = inside + outside * sum(len(names) for role, names in SETS.items() if role != "id")
    print(f"  metrics of {rows:,} scores", flush=True)
    evaluated = fresh(_evaluated, session.scratch / "evaluated", inside, outside, times)
    print(f"  {median(evaluated):.2f} s", flush=True)
    what = f"all metrics of one detector on {rows:,} scores"
    return Section(
        title="(j) Start-up, and evaluating",
        text=f"Commands: whole processes, median of {times}; Python's compiled files are there. Metrics: the "
        f"evaluate stage in one thread, from the score tables of one detector on {inside:,} ID images and "
        f"{len(SETS['near_ood']) + len(SETS['far_ood'])} OOD sets of {outside:,} to all its metrics with "
        "intervals, means over groups and the threshold. Scores differ from each other and overlap; the "
        "tables are in the system's cache.",
        header=("seconds", "median", "least", "most"),
        rows=[
            (what, *(f"{of(seconds):.2f}" for of in (median, min, max)))
            for what, seconds in {**started, what: evaluated}.items()
        ],
        checks=[
            *(
                at_most(f"ood-pipeline {command}", median(seconds), COMMAND_SECONDS, "{:.2f} s")
                for command, seconds in started.items()
            ),
            at_most(what, median(evaluated), METRICS_SECONDS, "{:.2f} s"),
        ],
    )


def _seconds(session: Session, command: str, times: int) -> list[float]:
    commands.called([command], session.scratch)  # compiles what has not been imported before
    found = [commands.called([command], session.scratch)[0] for _ in range(times)]
    print(f"  {command}: {median(found):.2f} s", flush=True)
    return found


def _evaluated(folder: Path, inside: int, outside: int, times: int) -> list[float]:
    """Seconds of the evaluate stage."""
    jobs = {
        role: [
            _job(folder / name, inside if role == "id" else outside, seed) for seed, name in enumerate(names)
        ]
        for role, names in SETS.items()
    }
    found = []
    with opened("inline", threads=1) as engine:
        for _ in range(times + 1):
            started = time.perf_counter()
            evaluate.run(engine, jobs)
            found.append(time.perf_counter() - started)
    return found[1:]  # the first one imports


def _job(folder: Path, rows: int, seed: int) -> score.ScoreJob:
    """A dataset with the scores of one detector; OOD scores are 0 to 1 standard deviations higher."""
    rng = np.random.default_rng([rows, seed])
    label = rng.integers(0, 1000, rows, np.int32)
    right = rng.random(rows) < 0.8
    features = {LABEL: label, PREDICTION: np.where(right, label, (label + 1) % 1000).astype(np.int32)}
    values = {score.SCORE: rng.standard_normal(rows) + (1 - seed / 2) * (folder.name != "id")}
    known = artifacts.Artifact(folder / "features", shards.FORMAT, {"rows": rows})
    scores = artifacts.Artifact(folder / "scores", score.FORMAT, {"rows": rows})
    stored(scores, [values])
    return score.ScoreJob(folder.name, stored(known, [features]), {"made-up": scores})
