"""Fit and score at the width of ImageNet networks (D = 2048, C = 1000): what stages cost, beside plain calls.

    python benchmarks/imagenet_shape.py --rows 20000        # or 50000, 200000; --scored is a fifth of it

Made-up feature tables, with the columns that extraction writes, go through the stages of a run with every
detector: nothing is forwarded. Linux only. CPU seconds are those of all processes of the stage; of wall
seconds other work on the machine takes its share.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import numpy as np
from memory import DRIVER, Watch
from numpy.typing import NDArray
from processes import fresh
from results import Check, Section, at_most, page
from scoring import fitted, places

from pipeline import detectors
from pipeline.cluster import usage
from pipeline.cluster.engine import Engine, opened
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.config import schema
from pipeline.detectors.base import Detector, Pass, Pooled, Samples, Training
from pipeline.detectors.knn import Knn
from pipeline.learned.statistics import Head, Statistics
from pipeline.stages import index, score, shards
from pipeline.stages.statistics import Rows, fit_statistics
from pipeline.workspace import artifacts, tables

WIDTH, PART = 2048, 2048
STAGES = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
"""Those of ResNet-50."""
NEIGHBOURS = 1000
"""Of KNN, as in the configs of ImageNet."""
SEARCHING = {"grood": 1, "knn": NEIGHBOURS, "nnguide": 10}
SEARCH = "score, neighbours"
NEAR = 1.3

Columns = dict[str, NDArray[Any]]


@dataclass
class Stage:
    """What one stage has cost."""

    wall: float = 0.0
    cpu: float = 0.0
    """Seconds of all processes."""
    driver: float = 0.0
    """Seconds of the driver alone."""
    memory: int = 0
    """Bytes: peak USS of the driver."""
    task: int = 0
    """Bytes: peak RSS of a task."""


@dataclass
class Found:
    """What a job has cost, by stage, and plain calls of the same sizes."""

    stages: dict[str, Stage] = field(default_factory=dict)
    plain: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Wall and CPU seconds."""


def chosen() -> dict[str, Detector]:
    """Every detector, with the neighbours of ImageNet's configs."""
    found = {name: detectors.get(name)() for name in detectors.names()}
    return found | {"knn": Knn(k=NEIGHBOURS)}


class Network:
    """Head and class means that rows are made of."""

    def __init__(self, classes: int) -> None:
        rng = np.random.default_rng(0)
        self.means = np.maximum(rng.standard_normal((classes, WIDTH), np.float32), 0)
        centred = self.means - self.means.mean(axis=0)
        self.head = Head(0.02 * centred, np.zeros(classes, np.float32), tuple(STAGES.values()))

    def rows(self, rng: np.random.Generator, start: int, count: int, extras: Mapping[str, int]) -> Columns:
        """Columns as extraction makes them."""
        label = rng.integers(0, len(self.means), count, np.int32)
        feature = np.maximum(self.means[label] + 1.5 * rng.standard_normal((count, WIDTH), np.float32), 0)
        logits = feature @ self.head.weight.T
        return {
            KEY: np.array([f"made-up/{row:08d}" for row in range(start, start + count)]),
            LABEL: label,
            PREDICTION: logits.argmax(axis=1).astype(np.int32),
            FEATURE: feature,
            LOGITS: logits,
            BLOCK_NORM: rng.random((count, len(STAGES)), np.float32),
            **{name: rng.random((count, width), np.float32) for name, width in extras.items()},
        }

    def table(self, folder: Path, rows: int, seed: int, extras: Mapping[str, int]) -> tables.Table:
        """A complete folder of feature parts."""
        rng, made = np.random.default_rng(seed), {}
        for number, start in enumerate(range(0, rows, PART)):
            name, count = tables.part_name(number), min(PART, rows - start)
            columns = tables.arrow_columns(self.rows(rng, start, count, extras))
            made[name] = artifacts.write(folder / name, tables.written(columns), rows=count)
        artifact = artifacts.Artifact(folder, shards.FORMAT, {"rows": rows, "seed": seed})
        return tables.Table.of(folder, artifact.finish(made))


def passes(wanted: Mapping[str, Detector], classes: int) -> dict[Pass, dict[str, NDArray[Any]]]:
    """Made-up results of the extra passes."""
    rng, found = np.random.default_rng(2), dict[Pass, dict[str, NDArray[Any]]]()
    for spec in {spec for detector in wanted.values() for spec in detector.passes()}:
        found[spec] = {"mean": rng.random(WIDTH), "ratio": 1 + rng.random(len(STAGES))}
        if isinstance(spec, Samples):
            width = spec.extra.width(classes, WIDTH, tuple(STAGES.values()))
            found[spec] |= {"feature": rng.random((1000, WIDTH)), "extra": rng.random((1000, width))}
    return found


def measure(folder: Path, rows: int, scored: int, classes: int) -> Found:
    """Every stage of a job; the driver of a run is this process."""
    os.environ.pop("RAY_ADDRESS", None)
    network, wanted, found = Network(classes), chosen(), Found()
    specs = {extra.column: extra for detector in wanted.values() for extra in detector.extras()}
    widths = {name: extra.width(classes, WIDTH, tuple(STAGES.values())) for name, extra in specs.items()}
    train = network.table(folder / "train", rows, 0, {Pooled().column: widths[Pooled().column]})
    source = network.table(folder / "features", scored, 1, widths)
    columns = (KEY, LABEL, PREDICTION, FEATURE, LOGITS, BLOCK_NORM, *widths)
    with opened("ray") as engine:
        engine.cpus()  # connects; that is no stage
        with _stage(found, "statistics"):
            known = _statistics(engine, wanted, train, network.head, folder)
        with _stage(found, "detectors and banks"):
            training = Training(
                network.head.weight,
                network.head.bias,
                tuple(STAGES),
                STAGES,
                train=known,
                id_val=known,
                passes=passes(wanted, classes),
            )
            ready = fitted(engine, wanted, training, train, folder / "fits")
        for name, labels in {
            "score, no neighbours": [label for label in ready.scorers if label not in ready.banks],
            SEARCH: list(ready.banks),
        }.items():
            with _stage(found, name):
                banks = {label: ready.banks[label] for label in labels if label in ready.banks}
                searched = index.start(engine, banks.values(), schema.Index()) if banks else None
                scoring = score.Scoring(
                    {label: ready.scorers[label] for label in labels},
                    columns,
                    {label: bank.folder for label, bank in banks.items()},
                    searched,
                )
                job = score.ScoreJob("made-up", source, places(folder / "scores", ready, labels))
                score.run(engine, [job], scoring)
                if searched is not None:
                    searched.stop()
    found.plain = plain(train, ready.banks, scored)
    return found


def _statistics(
    engine: Engine, wanted: Mapping[str, Detector], train: tables.Table, head: Head, folder: Path
) -> Statistics:
    needs = [
        need
        for detector in wanted.values()
        for need in (*detector.statistics(), *detector.calibration(), *detector.ood_statistics())
    ]
    store = artifacts.Store(folder / "fits")
    return Statistics(fit_statistics(engine, store, Rows([train], ["features/made-up"]), needs, head))


@contextmanager
def _stage(found: Found, name: str) -> Iterator[None]:
    print(f"  {name}", flush=True)
    wall, cpu, stage = time.perf_counter(), time.process_time(), Stage()
    with Watch(os.getpid(), period=1.0) as watch, usage.collect() as spent:
        yield
    stage.wall, stage.driver = time.perf_counter() - wall, time.process_time() - cpu - watch.cpu
    stage.cpu, stage.memory = spent.cpu_seconds - watch.cpu, watch.peaks.get(DRIVER, (0, 0))[0]
    stage.task = max((peak for kind, (peak, _) in watch.peaks.items() if kind != DRIVER), default=0)
    found.stages[name] = stage
    print(f"    {stage.wall:.0f} s, CPU {stage.cpu:.0f} s, of it driver {stage.driver:.1f} s", flush=True)


def plain(
    train: tables.Table, banks: Mapping[str, index.BankFiles], scored: int
) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of NumPy and FAISS on the same cores, with the rows in memory."""
    import faiss

    rest, asked = min(train.rows, 8192), min(train.rows, scored, 4096)
    rows = train.read(0, rest, (FEATURE, Pooled().column))

    def scatters() -> (
        None
    ):  # the products that fit cannot do without: of features, unit features, pooled maps
        for values in (rows[FEATURE], rows[FEATURE], rows[Pooled().column]):
            centred = values - values.mean(axis=0, dtype=np.float64)
            centred.T @ centred

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    searches = 0.0, 0.0
    for label, files in banks.items():
        bank = np.concatenate(list(files.ranges(0, files.rows)))
        wall, cpu = _timed(partial(faiss.knn, bank[:asked], bank, SEARCHING[label]), scored / asked)
        searches = searches[0] + wall, searches[1] + cpu
    return {"statistics": _timed(scatters, train.rows / rest), SEARCH: searches}


def _timed(work: Callable[[], object], times: float) -> tuple[float, float]:
    """Wall and CPU seconds of some work that is to be done so many times."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return times * (time.perf_counter() - wall), times * (time.process_time() - cpu)


def section(found: Found, rows: int, scored: int, classes: int) -> Section:
    """The table, and the target of the neighbours."""
    return Section(
        title=f"{rows:,} training and {scored:,} scored rows",
        text=f"D = {WIDTH}, C = {classes:,}, {len(chosen())} detectors, KNN with k = {NEIGHBOURS}. Plain: "
        "NumPy's products for the scatters, `faiss.knn` with the same banks, threads on all cores, rows in "
        "memory; of 8,192 rows and 4,096 queries, times the number of these.",
        header=("", "wall, s", "CPU, s", "driver CPU, s", "driver, MiB USS", "task, MiB USS", "plain CPU, s"),
        rows=[
            (
                label,
                f"{stage.wall:.0f}",
                f"{stage.cpu:.0f}",
                f"{stage.driver:.1f}",
                f"{stage.memory / 2**20:,.0f}",
                f"{stage.task / 2**20:,.0f}",
                f"{found.plain[label][1]:.0f}" if label in found.plain else "",
            )
            for label, stage in found.stages.items()
        ],
        checks=[_near(found)],
    )


def _near(found: Found) -> Check:
    ratio = found.stages[SEARCH].cpu / found.plain[SEARCH][1]
    return at_most(f"{', '.join(SEARCHING)}: CPU against plain `faiss.knn`", ratio, NEAR)


def main() -> None:
    """Make the tables, run the stages, print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="training rows (default: %(default)s)")
    parser.add_argument("--scored", type=int, help="scored rows (default: a fifth of the training rows)")
    parser.add_argument("--classes", type=int, default=1000, help="C (default: %(default)s)")
    options = parser.parse_args()
    sizes = options.rows, options.scored or options.rows // 5, options.classes
    with TemporaryDirectory(prefix="ood-benchmark-") as scratch:
        found = fresh(measure, Path(scratch), *sizes)
    command = (
        f"python benchmarks/imagenet_shape.py --rows {sizes[0]} --scored {sizes[1]} --classes {sizes[2]}"
    )
    print(f"\n{page(command, machine.describe(), [section(found, *sizes)])}")


if __name__ == "__main__":
    main()
