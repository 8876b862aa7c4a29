"""One evaluation as a whole command, side by side with pytorch-ood: the same images, network and detectors.

    pip install --no-deps --target PEER pytorch-ood==0.4.0
    python benchmarks/side_by_side.py --peer PEER --output benchmarks/side_by_side.md

`peer_evaluation.py` is what its user would write: one forward pass, features shared by all detectors, a
table. Ours is `ood-pipeline run` with the engine in this process and with Ray: intervals, comparisons, report
and MLflow included, in an empty workspace. The sides take turns; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import commands
import fashion
import machine
import numpy as np
import pyarrow.parquet as pq
from results import Section, at_most, page

from pipeline import quickstart
from pipeline.workspace.runs import located

DETECTORS: list[Any] = [
    *("msp", "maxlogit", "energy", "entropy", "gen", "tempscale", "klmatching"),
    {"knn": {"k": 50}},
    {"dice": {"p": 70}},
    *("she", "fdbd", "mds", "rmds"),
    {"vim": {"dim": 64}},
    {"react": {"p": 90}},
    {"ash": {"variant": "s", "p": 90}},
    {"scale": {"p": 85}},
]
"""What `peer_evaluation.detectors` has."""
SEEN = 15_676
"""Fashion-MNIST images that are the ID set: 18,662 images in all."""
SAME = 0.02
"""Largest difference of two AUROC that the known differences of definitions explain."""
TARGET = 10.0
"""Seconds of our whole command without Ray."""


def prepare(folder: Path, source: Path, count: int) -> tuple[Path, dict[str, Any]]:
    """The images for the other side, and our config of the same."""
    shipped = np.load(Path(quickstart.__file__).parent / "images.npz")
    settings = fashion.quickstart()
    seen = fashion.dataset(source, count, folder, "fashion", "id")
    kept = [entry for entry in settings["datasets"] if entry["role"] == "train" or entry["format"] == "npz"]
    settings["datasets"] = [seen, *(entry for entry in kept if entry["role"] != "id")]
    settings["detectors"] = DETECTORS
    del settings["extract"]["shard_rows"]  # of the quickstart, small for show
    arrays = {"train_x": shipped["id_train_x"], "train_y": shipped["id_train_y"]}
    arrays["id_x"] = fashion.images(source, count)
    arrays |= {name: shipped[f"ood_{name}_x"] for name in ("animals", "textures")}
    path = folder / "images.npz"
    np.savez(path, **arrays)
    return path, settings


def theirs(peer: Path, images: Path, out: Path) -> float:
    """Seconds of the other side's command."""
    script = Path(__file__).with_name("peer_evaluation.py")
    paths = [str(peer), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), str(images), str(out)], env=environment, check=True)
    return time.perf_counter() - started


def furthest(out: Path, folder: Path, name: str) -> tuple[float, str]:
    """The largest difference of AUROC, and where."""
    other = json.loads(out.read_text())
    rows = pq.read_table(
        str(located(str(folder / "workspace" / "runs" / name)) / "metrics.parquet")
    ).to_pylist()
    found = []
    for row in rows:
        if row["metric"] == "auroc" and row["dataset"] in other.get(row["detector"], {}):
            difference = abs(row["value"] - other[row["detector"]][row["dataset"]])
            found.append((difference, f"{row['detector']} on {row['dataset']}"))
    assert len(found) == 2 * len(DETECTORS), len(found)
    return max(found)


def _stages(ours: Sequence[tuple[commands.Done, ...]]) -> dict[str, list[list[float]]]:
    """Seconds of each stage, by name: of each turn for both engines."""
    found: dict[str, list[list[float]]] = {}
    for turn in ours:
        for name in ("prepare", *turn[0].stages, "rest"):
            found.setdefault(name, []).append([_stage(done, name) for done in turn])
    return found


def _stage(done: commands.Done, name: str) -> float:
    if name == "prepare":
        return done.prepare
    if name == "rest":
        return done.seconds - done.prepare - sum(each["seconds"] for each in done.stages.values())
    return done.stages[name]["seconds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder that pytorch-ood was installed to")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one turn of few images, to try the script")
    parser.add_argument("--output", type=Path, help="also write the page there")
    options = parser.parse_args()
    about, lines, ours = machine.describe(), [], []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images, settings = prepare(folder, options.fashion_mnist, 500 if options.quick else SEEN)
        out = folder / "theirs.json"
        for turn in range(1 if options.quick else options.turns):
            other = theirs(options.peer, images, out)
            inline = commands.run("run", settings, folder / f"inline-{turn}", options=("--engine", "inline"))
            again = commands.run("run", settings, folder / f"inline-{turn}", options=("--engine", "inline"))
            on_ray = commands.run("run", settings, folder / f"ray-{turn}")
            lines.append([other, inline.seconds, again.seconds, on_ray.seconds])
            ours.append((inline, on_ray))
        apart, where = furthest(out, folder / "inline-0", settings["name"])
    medians = [statistics.median(column) for column in zip(*lines, strict=True)]
    rows = [(f"turn {turn + 1}", *(f"{each:.1f}" for each in line)) for turn, line in enumerate(lines)]
    total = 500 if options.quick else SEEN
    section = Section(
        "Whole commands",
        f"{len(DETECTORS)} detectors, {total:,} ID images, both OOD datasets and the training images of the "
        "quickstart. Seconds from start to end of the process. Both sides find the same: AUROC differ by at "
        f"most {apart:.4f} ({where}; docs/fidelity.md says why some do).",
        ("", "pytorch-ood", "ours, inline", "ours, again", "ours, on Ray"),
        [*rows, ("median", *(f"{each:.1f}" for each in medians))],
        [
            at_most("whole command, inline", medians[1], TARGET, "{:.1f} s"),
            at_most("whole command, inline, against pytorch-ood", medians[1] / medians[0], 1.0),
            at_most("AUROC, largest difference", apart, SAME, "{:.4f}"),
        ],
    )
    stages = Section(
        "Where our seconds go",
        "Medians over the turns. The rest is Python's start, what the program imports, MLflow's last words, "
        "the table on the screen and the end.",
        ("", "inline", "on Ray"),
        [
            (name, *(f"{statistics.median(each):.1f}" for each in zip(*taken, strict=True)))
            for name, taken in _stages(ours).items()
        ],
        [],
    )
    found = page("python benchmarks/side_by_side.py --peer PEER", about, [section, stages])
    print(found)
    if options.output:
        options.output.write_text(found)


if __name__ == "__main__":
    main()
