"""(a) Extraction by the pipeline against a plain PyTorch loop over the same images, in turns."""

from __future__ import annotations

import shutil
from statistics import median
from typing import Any

import commands
import fashion
import plain
from results import Section, at_least
from session import Session

TARGET = 0.9


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
    return Section(
        title="(a) Extraction against a plain PyTorch loop",
        text=_text(count, setting),
        header=("images per second", "plain loop", "pipeline", "ratio"),
        rows=rows,
        checks=[at_least("extraction, steady state, against a plain loop", median(ratios), TARGET)],
    )


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
        "The two sides took turns; the ratio is the median over the turns."
    )
