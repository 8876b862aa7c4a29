"""(e) Peak memory of the driver and of each kind of Ray worker at two numbers of images."""

from __future__ import annotations

import shutil
from typing import Any

import commands
import fashion
from results import Check, Section
from session import Session

TARGET = 0.10
PERIOD = 0.05
"""Seconds between two samples of memory: the shortest tasks live a few tenths."""
INDEX = "index actor"
"""Holds the bank, which is as large as the training set by design."""


def measure(session: Session) -> Section:
    """Anonymous memory and RSS of every kind of process."""
    counts = (session.size(10_000, 1000), session.size(60_000, 4000))
    peaks = []
    for count in counts:
        print(f"  {count:,} training and {count:,} ID images", flush=True)
        folder = session.scratch / f"footprint-{count}"
        folder.mkdir()
        peaks.append(commands.run("run", _settings(session, count), folder, watch=PERIOD).peaks)
        shutil.rmtree(folder)
    few, many = peaks
    kinds = [kind for kind in many if kind in few]
    growth = {kind: many[kind][0] / few[kind][0] - 1 for kind in kinds if kind != INDEX}
    worst = max(growth, key=growth.__getitem__)
    return Section(
        title="(e) Peak memory",
        text="`ood-pipeline run` with all of the quickstart's detectors, N images as training set and the "
        f"same N as ID set, without tracking; every process sampled each {PERIOD} s. Numbers "
        "are anonymous memory, which a process has asked the system for, of the largest of its kind; RSS "
        "also counts pages of files and of Ray's object store, which is shared, that it has touched. An "
        "index actor (`index.shards: 1`; without, each score task would) holds the training rows of KNN and "
        "GROOD (2 x N x 128 x 4 bytes), grows with them by design, and is not judged.",
        header=("MiB", *(f"N = {count:,}" for count in counts), "growth", f"RSS, N = {counts[1]:,}"),
        rows=[_row(kind, few[kind], many[kind]) for kind in kinds],
        checks=[
            Check(
                f"growth of peak memory from {counts[0]:,} to {counts[1]:,} images",
                f"{growth[worst]:+.1%} ({worst})",
                f"< {TARGET:.0%}",
                growth[worst] < TARGET,
            )
        ],
    )


def _settings(session: Session, count: int) -> dict[str, Any]:
    found = fashion.quickstart()
    folder = session.scratch / f"footprint-{count}"
    others = [entry for entry in found["datasets"] if entry["role"] not in ("train", "id")]
    same = [
        fashion.dataset(session.images, count, folder, f"fashion-{role}", role) for role in ("train", "id")
    ]
    index = {**found.get("index", {}), "shards": 1}
    return {**found, "datasets": [*same, *others], "index": index, "tracking": {"enabled": False}}


def _row(kind: str, few: tuple[int, int], many: tuple[int, int]) -> tuple[str, ...]:
    (small, _), (large, resident) = few, many
    mib = [f"{size / 2**20:,.0f}" for size in (small, large, resident)]
    return kind, mib[0], mib[1], f"{large / small - 1:+.1%}", mib[2]
