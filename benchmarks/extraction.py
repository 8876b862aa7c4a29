"""(a) Extraction by the pipeline against a plain PyTorch loop over the same images, in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import commands
import fashion
import numpy as np
import plain
import pyarrow as pa
from numpy.typing import NDArray
from processes import fresh
from results import Section, at_least
from session import Session

from pipeline.config import loading
from pipeline.data.manifest import SCHEMA
from pipeline.network.classifier import load
from pipeline.stages import decoding, extract, shards
from pipeline.workspace import tables

TARGET = 0.95
LOADING = 15
"""Seconds in which a process has loaded the network."""


def measure(session: Session) -> Section:
    """Images per second of both sides, and their ratio."""
    count = session.size(60_000, 4000)
    pixels = fashion.images(session.images, count)
    setting, tried = session.plain
    rows, ratios = [], []
    for turn in range(1, session.size(3, 1) + 1):
        loop = plain.rate(pixels, setting)
        ours = _extract(session, count)
        ratios.append(ours / loop)
        rows.append((f"turn {turn}", f"{loop:,.0f}", f"{ours:,.0f}", f"{ratios[-1]:.3f}"))
        print(f"  turn {turn}: plain loop {loop:,.0f}, pipeline {ours:,.0f} images/s", flush=True)
    rows += [(f"tried: {setting}", f"{rate:,.0f}", "", "") for setting, rate in tried]
    some = pixels[: session.size(8192, 1024)]
    profile = fresh(_profile, some, session.scratch)
    rows += [(f"one actor alone: {part}", "", f"{rate:,.0f}", "") for part, rate in profile.items()]
    for part, rate in _at_once(some, session).items():
        rows.append((f"two at once, without Ray: {part}", "", f"{rate:,.0f}", ""))
    return Section(
        title="(a) Extraction against a plain PyTorch loop",
        text=_text(count, setting),
        header=("images per second", "plain loop", "pipeline", "ratio"),
        rows=rows,
        checks=[at_least("extraction, steady state, against a plain loop", median(ratios), TARGET)],
    )


def _profile(pixels: NDArray[np.uint8], scratch: Path) -> dict[str, float]:
    """Images per second of one thread for more and more of what a model actor does, the best of three."""
    parts = _parts(pixels, scratch)
    return {part: len(pixels) / min(_seconds(call) for _ in range(3)) for part, call in parts.items()}


def _at_once(pixels: NDArray[np.uint8], session: Session) -> dict[str, float]:
    """Images per second of two processes that each do the first and the last part, at the same time."""
    begins, lasts = time.time() + LOADING, session.size(8, 1)
    folders = [session.scratch / f"beside-{number}" for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda folder: fresh(_beside, pixels, folder, begins, lasts), folders))
    return {part: sum(each[part] for each in found) for part in found[0]}


def _beside(pixels: NDArray[np.uint8], folder: Path, begins: float, lasts: float) -> dict[str, float]:
    """Images per second of the first and of the last part, each for some seconds from a point in time."""
    folder.mkdir()
    first, *_, last = _parts(pixels, folder).values()
    found = {}
    for number, (part, call) in enumerate({"network": first, "all of it": last}.items()):
        call()
        starts = begins + number * (lasts + LOADING)
        if time.time() > starts:
            raise RuntimeError(f"the network was not loaded after {LOADING} s: the two would not be at once")
        time.sleep(starts - time.time())
        calls = 0
        while time.time() < starts + lasts:
            call()
            calls += 1
        found[part] = calls * len(pixels) / (time.time() - starts)
    return found


def _parts(pixels: NDArray[np.uint8], scratch: Path) -> dict[str, Callable[[], Any]]:
    """More and more of what a model actor does, each as a function that does it for all images."""
    settings = loading.load("quickstart")
    model = load(settings.model, settings.seed)
    plan = shards.Plan(
        settings.model, settings.extract, settings.seed, model.digest, model.transform, model.probe
    )
    classifier, size = extract.load_in_worker(plan, 1), settings.extract.batch_size
    shapes = [list(pixels.shape[1:])] * len(pixels)
    columns = {
        "key": [f"{row}" for row in range(len(pixels))],
        "bytes": [image.tobytes() for image in pixels],
    }
    given = {**columns, "shape": shapes, "label": [0] * len(pixels)}
    table = pa.Table.from_pydict(dict.fromkeys(SCHEMA.names, [None] * len(pixels)) | given, SCHEMA)
    decoded = decoding.decode_rows(table, plan)

    def cut() -> Iterator[decoding.Decoded]:
        return (decoding.decode_rows(table.slice(start, size), plan) for start in range(0, len(table), size))

    return {
        "network": lambda: [
            classifier.forward(batch.pixels, blocks=False) for batch in decoded.batches(size)
        ],
        "network and FeatureNorm": lambda: [
            classifier.forward(batch.pixels) for batch in decoded.batches(size)
        ],
        "and checks and tables": lambda: extract.extract_rows(
            classifier, decoded.batches(size), plan.settings
        ),
        "and decoding": lambda: extract.extract_rows(classifier, cut(), plan.settings),
        "and writing Parquet": lambda: tables.write_table(
            scratch / "profile.parquet", extract.extract_rows(classifier, cut(), plan.settings)[0]
        ),
    }


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _extract(session: Session, count: int) -> float:
    folder = session.scratch / "extraction"
    folder.mkdir()
    done = commands.run("extract", settings(session, count), folder)
    shutil.rmtree(folder)
    return done.stages["extract"]["images_per_second"]


def settings(session: Session, count: int) -> dict[str, Any]:
    """The quickstart's model and batch size on two actors; shards of the default size."""
    found = fashion.quickstart()
    folder = session.scratch / "extraction"
    return {
        "name": "extraction",
        "model": found["model"],
        "datasets": [fashion.dataset(session.images, count, folder, "fashion", "id")],
        "detectors": ["msp"],
        "extract": {"batch_size": found["extract"]["batch_size"], "actors": 2},
        "tracking": {"enabled": False},
    }


def _text(count: int, setting: plain.Setting) -> str:
    return (
        f"{count:,} Fashion-MNIST training images through the quickstart's ResNet-10. Pipeline: "
        "`ood-pipeline extract` in an empty workspace, 2 actors, the quickstart's batch size, default "
        "shards; forwarded images over the time from the start of the first shard to the end of the last, "
        "so reading, decoding, FeatureNorm of four blocks, checks and writing Parquet are in it, starting "
        "Ray and loading the model are not. Plain loop: images in memory, normalise, forward, feature and "
        f"logits kept in memory; warmed up; its best setting ({setting}), found on fewer images. "
        "The two sides took turns; the ratio is the median over the turns. Last rows: the work of a model "
        "actor, added up part by part, in one process of one thread with nothing beside it; and in two such "
        "processes at the same time, with no Ray."
    )
