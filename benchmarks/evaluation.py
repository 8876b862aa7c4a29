"""(b) A whole evaluation against one plain forward pass, and (d) the same evaluation on a warm cache."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import commands
import fashion
import numpy as np
import plain
from numpy.typing import NDArray
from results import Check, Section, at_most
from session import Session

from pipeline.config import loading, schema
from pipeline.data import decode
from pipeline.data.manifest import compile_manifest

TARGET = 1.3
QUICKSTART_SECONDS, REPEATED_SECONDS = 18, 3
AFTER_EXTRACT = ("fit", "score", "evaluate", "report")
GROWING = ("prepare", "steady extraction", "score", "evaluate", "report")
"""What further ID images cost; a fit sees training images only."""


def measure(session: Session) -> Section:
    """Seconds of the quickstart, and of the images that a larger evaluation has more."""
    count = session.size(60_000, 4000)
    setting, _ = session.plain
    pixels = fashion.images(session.images, session.size(20_000, 4000))
    rates = [plain.rate(pixels, setting)]
    small = session.quickstart
    rates.append(plain.rate(pixels, setting))
    print(f"  quickstart with {count:,} ID images", flush=True)
    enlarged = _enlarged(session, count)
    estimates = [
        commands.estimated(config, session.scratch / f"estimated-{number}")
        for number, config in enumerate((fashion.quickstart(), enlarged))
    ]
    large = commands.run("run", enlarged, session.scratch / "enlarged")
    rates.append(plain.rate(pixels, setting))
    few, many = (int(done.stages["extract"]["forward_images"]) for done in (small, large))
    forward = (many - few) / median(rates)
    before, after = _seconds(small), _seconds(large)
    ratio = sum(after[name] - before[name] for name in GROWING) / forward
    print(f"  {small.seconds:.1f} s and {large.seconds:.1f} s, {ratio:.2f} x", flush=True)
    own = _plain_seconds(session, setting)
    return Section(
        title="(b) A whole evaluation against one plain forward pass",
        text=_text(count, setting),
        header=("seconds", "quickstart", f"with {count:,} ID images", "difference"),
        rows=[
            ("images", f"{few:,}", f"{many:,}", f"{many - few:,}"),
            *(_row(name, before[name], after[name]) for name in before),
            _row("the same, as `validate` estimates it before", *estimates),
            _row("one plain forward pass", own, own + forward),
        ],
        checks=[
            Check(
                "evaluation, all detectors, each further image, against a plain forward pass",
                f"{ratio:.2f} x",
                f"<= {TARGET} x",
                0 < ratio <= TARGET,
            ),
        ],
    )


def _enlarged(session: Session, count: int) -> dict[str, Any]:
    """The quickstart with another ID set in the place of its own."""
    found = fashion.quickstart()
    folder = session.scratch / "enlarged"
    folder.mkdir()
    found["datasets"] = [entry for entry in found["datasets"] if entry["role"] != "id"]
    found["datasets"].append(fashion.dataset(session.images, count, folder, "fashion-id", "id"))
    return found


def _seconds(done: commands.Done) -> dict[str, float]:
    """Where the seconds of a command go."""
    steady = done.stages["extract"]["steady_seconds"]
    later = {name: done.stages[name]["seconds"] for name in AFTER_EXTRACT}
    rest = done.seconds - done.prepare - steady - sum(later.values())
    return {
        "start-up: program, Ray, model actors, MLflow": rest,
        "prepare": done.prepare,
        "steady extraction": steady,
        **later,
        "whole command": done.seconds,
    }


def _plain_seconds(session: Session, setting: plain.Setting) -> float:
    """Seconds of one plain forward pass over the quickstart's own images, the median of three."""
    pixels = _quickstart_pixels(session.scratch / "pixels")
    return len(pixels) / median(plain.rate(pixels, setting) for _ in range(3))


def _quickstart_pixels(folder: Path) -> NDArray[np.uint8]:
    """All its images as the network sees them, (N, 28, 28)."""
    settings = loading.load("quickstart")
    transform = settings.model.transform
    assert isinstance(transform, schema.Transform)
    found = []
    for dataset in settings.datasets:
        manifest = compile_manifest(dataset, folder)
        rows = manifest.read(0, manifest.rows).to_pylist()
        found += [decode.decode(row["bytes"], tuple(row["shape"]), transform)[:, :, 0] for row in rows]
    return np.stack(found)


def _row(name: str, small: float, large: float) -> tuple[str, ...]:
    return name, f"{small:.1f}", f"{large:.1f}", f"{large - small:+.1f}"


def _text(count: int, setting: plain.Setting) -> str:
    return (
        "`ood-pipeline run --engine ray` in an empty workspace: the quickstart, and again with "
        f"{count:,} Fashion-MNIST training images in the place of its ID test set; tracking and report "
        "included. What is paid once however many images are evaluated falls out of the difference. The "
        f"ratio adds up the differences of {', '.join(GROWING)} (start-up does not depend on the images, "
        "the fit on the training set alone) and compares them with a plain forward pass over as many "
        f"images ({setting}; median of three: before, between and after)."
    )


def measure_warm(session: Session) -> Section:
    """A second and a third run where the features are there."""
    folder = session.scratch / "as-it-comes"
    print("  the quickstart as it comes", flush=True)
    cold = commands.run("run", fashion.quickstart(), folder, options=())
    before = _artefacts(folder)
    print("  the same again", flush=True)
    same = commands.run("run", fashion.quickstart(), folder, options=())
    untouched = _artefacts(folder) == before
    print("  with another k and another p", flush=True)
    other = commands.run("run", _changed(), folder, options=())
    forwarded = [int(done.stages["extract"]["forward_images"]) for done in (cold, same, other)]
    names = ("first run", "the same again", "two detectors changed")
    return Section(
        title="(d) A second run on the warm cache",
        text="`ood-pipeline run quickstart` as it comes, which stays in its process; again in the same "
        "workspace; then with k of KNN and p of DICE changed, which "
        "fits and scores again. Features and fitted artefacts, among them the extra passes', were also "
        f"compared on disk: the repeated run {'wrote none' if untouched else 'wrote some'} of them again.",
        header=("", "forward passes", "seconds"),
        rows=[
            (name, f"{count:,}", f"{done.seconds:.1f}")
            for name, count, done in zip(names, forwarded, (cold, same, other), strict=True)
        ],
        checks=[
            Check(
                "forward passes of a second run",
                f"{forwarded[1]}; {forwarded[2]} with changed detectors",
                "0",
                forwarded[1:] == [0, 0] and untouched,
            ),
            at_most("quickstart as a whole", cold.seconds, QUICKSTART_SECONDS, "{:.1f} s"),
            at_most("the same again", same.seconds, REPEATED_SECONDS, "{:.1f} s"),
        ],
    )


def _changed() -> dict[str, Any]:
    found = fashion.quickstart()
    found["detectors"] = [
        {"knn": {"k": 10}} if "knn" in entry else {"dice": {"p": 90}} if "dice" in entry else entry
        for entry in found["detectors"]
    ]
    return found


def _artefacts(folder: Path) -> dict[Path, int]:
    """Time stamps of features and fits."""
    return {
        path: path.stat().st_mtime_ns
        for kind in ("features", "fits")
        for path in (folder / "workspace" / kind).rglob("*")
        if path.is_file()
    }
