"""(b) A whole evaluation against one plain forward pass, and (d) the same evaluation on a warm cache."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import commands
import fashion
import plain
from pipeline import config, images
from pipeline.datasets import compile_manifest
from results import Check, Section
from session import Session

TARGET = 1.15
STAGES = ("extract", "fit", "score", "evaluate", "report")


def measure(session: Session) -> Section:
    """Seconds of the quickstart, and of the images that a larger evaluation has more."""
    count = session.size(60_000, 4000)
    few, many = _quickstart_pixels(session.scratch), fashion.images(session.images, count)
    setting, _ = session.plain
    rates = [plain.rate(many, setting)]
    small = session.quickstart
    rates.append(plain.rate(many, setting))
    print(f"  quickstart with {count:,} ID images", flush=True)
    large = commands.run("run", _enlarged(session, count), session.scratch / "enlarged")
    rates.append(plain.rate(many, setting))
    more = large.stages["extract"]["forward_images"] - small.stages["extract"]["forward_images"]
    forward = 1 / median(rates)
    ratio = (large.seconds - small.seconds) / (more * forward)
    return Section(
        title="(b) A whole evaluation against one plain forward pass",
        text=_text(count, setting, len(few) / (small.seconds - _fixed(small))),
        header=("seconds", "quickstart", f"with {count:,} ID images", "difference"),
        rows=[
            *_rows(small, large),
            _row("one plain forward pass", len(few) * forward, (len(few) + more) * forward),
        ],
        checks=[
            Check("evaluation per further image, all detectors, against one plain forward pass",
                  f"{ratio:.2f} x", f"<= {TARGET} x", ratio <= TARGET),
            Check("quickstart as a whole", f"{small.seconds:.1f} s", "<= 60 s", small.seconds <= 60),
        ],
    )


def _text(count: int, setting: plain.Setting, steady: float) -> str:
    return ""
