"""(g) What another decoder than Pillow gains, and what it changes."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import commands
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from results import Check, Section
from session import Session
from sklearn.datasets import load_sample_images

from pipeline.columns import FEATURE
from pipeline.config import loading, schema
from pipeline.data import decode
from pipeline.workspace.runs import located

DECODERS = ("pillow", "simplejpeg")


def measure(session: Session) -> Section:
    """Rates, features and AUROC with each decoder, on the same JPEG files."""
    count = session.size(200, 20)
    folder = session.scratch / "photos"
    files = _write_photos(folder, count)
    rates: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
    for _ in range(3):
        for decoder in DECODERS:
            rates[decoder].append(_rate(files, decoder))
    runs = {decoder: _evaluate(session, folder, decoder) for decoder in DECODERS}
    features = [run[0] for run in runs.values()]
    differs = float(np.abs(features[0] - features[1]).max())
    print(f"  features differ by at most {differs}", flush=True)
    return Section(
        title="(g) Decoders",
        text=f"{count} JPEG files of 480 x 360 pixels, cut out of scikit-learn's two sample photos (one ID, "
        "the other OOD; qualities 60 to 95, three kinds of chroma subsampling, a fifth progressive), through "
        "the bundled config `photos` (EfficientNet-Lite0, ImageNet weights). Decoding: stored bytes to 224 "
        "x 224 pixels, resize included, one thread, decoders in turns, median of 3.",
        header=("", "decoding, images/s", *_metric_names(runs["pillow"][1]), "largest change of a feature"),
        rows=[
            (
                decoder,
                f"{median(rates[decoder]):,.0f}",
                *(f"{value:.6f}" for value in runs[decoder][1].values()),
                f"{differs:g}" if decoder != "pillow" else "",
            )
            for decoder in DECODERS
        ],
        checks=[
            Check(
                "simplejpeg instead of Pillow: change of features and AUROC",
                f"{differs:g}; {'none' if runs['pillow'][1] == runs['simplejpeg'][1] else 'some'}",
                "0; none",
                differs == 0 and runs["pillow"][1] == runs["simplejpeg"][1],
            )
        ],
    )


def _metric_names(aurocs: dict[str, float]) -> Iterator[str]:
    return (f"AUROC of {detector}" for detector in aurocs)


def _write_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files and the lists that the config wants; returns the files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    files = []
    for name, photo, label in zip(("id", "ood"), photos, ("698", ""), strict=True):
        rows = []
        for number in range(count // 2):
            left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - 480, photo.height - 360))
            cut = photo.crop((left, top, left + 480, top + 360))
            path = folder / f"{name}-{number:03d}.jpg"
            quality, subsampling = int(rng.integers(60, 96)), int(rng.integers(3))
            cut.save(path, quality=quality, subsampling=subsampling, progressive=number % 5 == 0)
            rows.append((path.name, label))
            files.append(path)
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("path", "label"), *rows])
    return files


def _rate(files: list[Path], decoder: str) -> float:
    transform = loading.load("photos").model.transform
    assert isinstance(transform, schema.Transform)
    contents = [path.read_bytes() for path in files]
    started = time.perf_counter()
    for content in contents:
        decode.decode(content, None, transform, decoder)
    return len(files) / (time.perf_counter() - started)


def _evaluate(session: Session, photos: Path, decoder: str) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Features of all photos, and AUROC by detector."""
    print(f"  photos through {decoder}", flush=True)
    settings: dict[str, Any] = {
        "extends": "photos",
        "name": decoder,
        "data": str(photos),
        "extract": {"decoder": decoder},
        "tracking": {"enabled": False},
    }
    folder = session.scratch / f"decoder-{decoder}"
    commands.run("run", settings, folder)
    workspace = folder / "workspace"
    parts = sorted((workspace / "features").glob("*/part-*.parquet"), key=lambda part: part.parts[-2:])
    found = [row for part in parts for row in pq.read_table(part, columns=[FEATURE])[FEATURE].to_pylist()]
    rows = pq.read_table(located(str(workspace / "runs" / decoder)) / "metrics.parquet").to_pylist()
    aurocs = {
        row["detector"]: row["value"]
        for row in rows
        if row["metric"] == "auroc" and row["dataset"] == "far_ood"
    }
    return np.array(found, np.float32), aurocs
