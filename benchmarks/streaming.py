"""(h) Extraction of many small images: rate and memory while the dataset grows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import commands
import fashion
import numpy as np
from memory import PERIOD
from results import Section, at_least, at_most
from session import Session

STEADY, FLAT = 0.9, 0.10


def measure(session: Session) -> Section:
    """Images per second and peak memory of driver and model actors at three sizes."""
    sizes = [session.size(full, quick) for full, quick in ((20_000, 1000), (60_000, 2000), (200_000, 4000))]
    runs = [_extract(session, count) for count in sizes]
    first, last = runs[0], runs[-1]
    rate = last.stages["extract"]["images_per_second"] / first.stages["extract"]["images_per_second"]
    growth = max(last.peaks[kind][0] / first.peaks[kind][0] - 1 for kind in ("driver", "model actor"))
    span = f"from {sizes[0]:,} to {sizes[-1]:,} images"
    return Section(
        title="(h) Extraction of many images",
        text="`ood-pipeline extract` of synthetic 28 x 28 images (IDX) through the quickstart's ResNet-10 on "
        "2 actors, in an empty workspace. Memory is as in (e); compiling the manifest is part of it.",
        header=("images", "images/s, steady", "seconds in all", "driver, MiB", "model actor"),
        rows=[
            (
                f"{count:,}",
                f"{done.stages['extract']['images_per_second']:,.0f}",
                f"{done.seconds:.1f}",
                *(f"{done.peaks[kind][0] / 2**20:,.0f}" for kind in ("driver", "model actor")),
            )
            for count, done in zip(sizes, runs, strict=True)
        ],
        checks=[
            at_least(f"extraction: images/s {span}", rate, STEADY),
            at_most(f"extraction: growth of peak memory {span}", growth, FLAT, "{:.1%}"),
        ],
    )


def _extract(session: Session, count: int) -> commands.Done:
    print(f"  {count:,} images", flush=True)
    folder = session.scratch / f"streaming-{count}"
    folder.mkdir()
    done = commands.run("extract", _settings(folder, count), folder, watch=PERIOD)
    print(f"  {done.stages['extract']['images_per_second']:,.0f} images/s", flush=True)
    shutil.rmtree(folder)
    return done


def _settings(folder: Path, count: int) -> dict[str, Any]:
    found = fashion.quickstart()
    rng = np.random.default_rng(0)
    path = folder / "images.idx"
    with path.open("wb") as stream:
        stream.write(b"\0\0\x08\3" + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2)
        for start in range(0, count, 10_000):
            stream.write(rng.integers(0, 256, (min(10_000, count - start), 28, 28), np.uint8).tobytes())
    labels = folder / "labels.idx"
    labels.write_bytes(
        b"\0\0\x08\1" + count.to_bytes(4, "big") + rng.integers(0, 10, count, np.uint8).tobytes()
    )
    dataset = {"name": "synthetic", "role": "id", "format": "idx", "path": str(path), "labels": str(labels)}
    return {
        "name": "streaming",
        "model": found["model"],
        "datasets": [dataset],
        "detectors": ["msp"],
        "extract": {"batch_size": found["extract"]["batch_size"], "actors": 2},
        "tracking": {"enabled": False},
    }
