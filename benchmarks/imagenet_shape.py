"""Fit and score at the width of ImageNet networks (D = 2048, C = 1000): what stages cost, beside plain calls.

    python benchmarks/imagenet_shape.py --rows 50000 200000 --output benchmarks/imagenet_shape.md
    python benchmarks/imagenet_shape.py --rows 32768 --scored 256 --classes 21843    # ImageNet-21K

Made-up feature tables, with the columns that extraction writes, go through the stages of a run with every
detector: nothing is forwarded. Linux only. CPU seconds are those of all processes of the stage.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from results import Section, at_most, page
from scoring import fitted, places, stored

from pipeline import detectors
from pipeline.cluster import usage
from pipeline.cluster.engine import Engine, opened
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.config import schema
from pipeline.detectors.base import Detector, Pass, Pooled, Samples, Training
from pipeline.detectors.knn import Knn
from pipeline.learned.statistics import Head, Statistic, Statistics
from pipeline.stages import index, memory, score, shards
from pipeline.stages.statistics import SLICE, Rows, fit_statistics
from pipeline.workspace import artifacts, tables

WIDTH, CLASSES, PART = 2048, 1000, 2048
STAGES = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
"""Those of ResNet-50."""
NEIGHBOURS = 1000
"""Of KNN, as in the configs of ImageNet."""
SEARCHING = {"grood": 1, "knn": NEIGHBOURS, "nnguide": 10}
STATISTICS, FITS, SEARCH = "statistics", "detectors and banks", "score, neighbours"
NEAR, LEARNED, DRIVEN, FLAT = 1.3, 2.0, 0.10, 0.10
"""Targets with `CLASSES`: of neighbours and the fit over plain calls, of the driver's share and growth."""
ASKED = 4096
"""Queries of `faiss.knn`, at most."""

Columns = dict[str, NDArray[Any]]


@dataclass
class Stage:
    """What one stage has cost."""

    wall: float = 0.0
    cpu: float = 0.0
    """Seconds of all processes."""
    driver: float = 0.0
    """Seconds of the driver alone."""
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes: peak anonymous memory and RSS of a process, by kind."""


@dataclass
class Found:
    """What a job has cost, by stage, and plain calls of the same sizes."""

    stages: dict[str, Stage] = field(default_factory=dict)
    plain: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Wall and CPU seconds."""

    def against(self, *names: str) -> float:
        """Wall seconds of stages over those of the plain calls."""
        return sum(self.stages[name].wall for name in names) / sum(self.plain[name][0] for name in names)

    @property
    def driver(self) -> int:
        """Bytes: peak anonymous memory of the driver."""
        return max(stage.peaks[DRIVER][0] for stage in self.stages.values())

    @property
    def driven(self) -> float:
        """Share of the CPU seconds that are the driver's own."""
        every = self.stages.values()
        return sum(stage.driver for stage in every) / sum(stage.cpu for stage in every)


def chosen(classes: int) -> dict[str, Detector]:
    """Every detector that a run takes with so many classes, with the neighbours of ImageNet's configs."""
    every = {name: detectors.get(name)() for name in detectors.names()} | {"knn": Knn(k=NEIGHBOURS)}
    return {
        name: each for name, each in every.items() if 8 * each.table(classes, WIDTH, STAGES) <= memory.MOST
    }


class Network:
    """Head and class means that rows are made of."""

    def __init__(self, classes: int) -> None:
        rng = np.random.default_rng(0)
        self.means = np.maximum(rng.standard_normal((classes, WIDTH), np.float32), 0)
        centred = self.means - self.means.mean(axis=0)
        self.head = Head(0.02 * centred, np.zeros(classes, np.float32), tuple(STAGES.values()))

    def rows(self, rng: np.random.Generator, start: int, count: int, extras: Mapping[str, int]) -> Columns:
        """Columns as extraction makes them; classes in turn, so that all occur in the fewest rows."""
        label = np.arange(start, start + count, dtype=np.int32) % np.int32(len(self.means))
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
        rng = np.random.default_rng(seed)
        artifact = artifacts.Artifact(folder, shards.FORMAT, {"rows": rows, "seed": seed})
        starts = range(0, rows, PART)
        return stored(artifact, (self.rows(rng, start, min(PART, rows - start), extras) for start in starts))


def passes(wanted: Mapping[str, Detector], classes: int) -> dict[Pass, dict[str, NDArray[Any]]]:
    """Made-up results of the extra passes."""
    rng, found = np.random.default_rng(2), dict[Pass, dict[str, NDArray[Any]]]()
    for spec in dict.fromkeys(spec for detector in wanted.values() for spec in detector.passes()):
        found[spec] = {"mean": rng.random(WIDTH), "ratio": 1 + rng.random(len(STAGES))}
        if isinstance(spec, Samples):
            width = spec.extra.width(classes, WIDTH, tuple(STAGES.values()))
            found[spec] |= {"feature": rng.random((1000, WIDTH)), "extra": rng.random((1000, width))}
    return found


def measure(folder: Path, rows: int, scored: int, classes: int) -> Found:
    """Every stage of a job; the driver of a run is this process."""
    os.environ.pop("RAY_ADDRESS", None)
    network, wanted, found = Network(classes), chosen(classes), Found()
    specs = {extra.column: extra for detector in wanted.values() for extra in detector.extras()}
    widths = {name: extra.width(classes, WIDTH, tuple(STAGES.values())) for name, extra in specs.items()}
    train = network.table(folder / "train", rows, 0, {Pooled().column: widths[Pooled().column]})
    source = network.table(folder / "features", scored, 1, widths)
    columns = (KEY, LABEL, PREDICTION, FEATURE, LOGITS, BLOCK_NORM, *widths)
    with opened("ray") as engine:
        engine.cpus()  # connects; that is no stage
        needs = _needs(wanted)
        with _stage(found, STATISTICS):
            known = _statistics(engine, needs, train, network.head, folder)
        with _stage(found, FITS):
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
    found.plain = plain(train, network, needs, ready.banks, scored)
    return found


def _needs(wanted: Mapping[str, Detector]) -> list[Statistic[Any]]:
    """Statistics that the detectors learn from, each once."""
    return list(
        dict.fromkeys(
            need
            for detector in wanted.values()
            for need in (*detector.statistics(), *detector.calibration(), *detector.ood_statistics())
        )
    )


def _statistics(
    engine: Engine, needs: Iterable[Statistic[Any]], train: tables.Table, head: Head, folder: Path
) -> Statistics:
    store = artifacts.Store(folder / "fits")
    return Statistics(fit_statistics(engine, store, Rows([train], ["features/made-up"]), needs, head))


@contextmanager
def _stage(found: Found, name: str) -> Iterator[None]:
    print(f"  {name}", flush=True)
    wall, cpu, stage = time.perf_counter(), time.process_time(), Stage()
    with Watch(os.getpid(), period=1.0) as watch, usage.collect() as spent:
        yield
        stage.wall = time.perf_counter() - wall
    stage.driver = time.process_time() - cpu - watch.cpu
    stage.cpu, stage.peaks = spent.cpu_seconds - watch.cpu, watch.peaks
    found.stages[name] = stage
    print(f"    {stage.wall:.0f} s, CPU {stage.cpu:.0f} s, of it driver {stage.driver:.1f} s", flush=True)


def plain(
    train: tables.Table,
    network: Network,
    needs: Iterable[Statistic[Any]],
    banks: Mapping[str, index.BankFiles],
    scored: int,
) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of reading the rows and NumPy's products, and of FAISS, on the same cores."""
    import faiss

    rest, asked = min(train.rows, SLICE), min(train.rows, scored, ASKED)
    columns = sorted({column for need in needs for column in need.columns})

    def scatters() -> None:
        """What fit cannot do without: each column once, and products of features, unit features, maps."""
        rows = train.read(0, rest, columns)
        for values in (rows[FEATURE], rows[FEATURE], rows[Pooled().column]):
            centred = values - values.mean(axis=0, dtype=np.float64)
            centred.T @ centred

    def products() -> None:
        """What the banks cannot do without: the rows once more, and GROOD's product with the prototypes."""
        train.read(0, rest, [FEATURE, LOGITS])[FEATURE].astype(np.float64) @ network.means.T

    def spectra() -> None:
        """What the detectors cannot do without: the eigenvectors of these scatters."""
        values = network.means.astype(np.float64)
        for _ in range(3):
            np.linalg.eigh(values.T @ values)

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    searches = 0.0, 0.0
    for label, files in banks.items():
        bank = np.concatenate(list(files.ranges(0, files.rows)))
        wall, cpu = _timed(partial(faiss.knn, bank[:asked], bank, SEARCHING[label]), scored / asked)
        searches = searches[0] + wall, searches[1] + cpu
    banked, decomposed = _timed(products, train.rows / rest), _timed(spectra, 1)
    return {
        STATISTICS: _timed(scatters, train.rows / rest),
        FITS: (banked[0] + decomposed[0], banked[1] + decomposed[1]),
        SEARCH: searches,
    }


def _timed(work: Callable[[], object], times: float) -> tuple[float, float]:
    """Wall and CPU seconds of some work that is to be done so many times."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return times * (time.perf_counter() - wall), times * (time.process_time() - cpu)


def sections(found: Found, rows: int, scored: int, classes: int) -> Iterator[Section]:
    """What the stages cost and what they hold, without targets."""
    wanted = chosen(classes)
    without = sorted(set(detectors.names()) - wanted.keys())
    yield Section(
        title=f"{rows:,} training and {scored:,} scored rows",
        text=f"D = {WIDTH}, C = {classes:,}, {len(wanted)} detectors"
        + (f" (all but {', '.join(without)}: too large for so many classes)" if without else "")
        + f", KNN with k = {NEIGHBOURS}. Seconds of a search grow with the scored rows times those of the "
        f"banks. Plain: reading each column once, checksums compared, and NumPy's products for the scatters, "
        f"of {SLICE:,} rows; reading features and logits once more, the product with GROOD's prototypes, "
        "and the eigenvectors of three scatters; `faiss.knn` with the same banks in memory, of "
        f"{ASKED:,} queries; with threads on all cores, times the number of these.",
        header=("", "wall, s", "CPU, s", "driver CPU, s", "plain wall, s", "plain CPU, s"),
        rows=[
            (
                label,
                f"{stage.wall:.0f}",
                f"{stage.cpu:.0f}",
                f"{stage.driver:.1f}",
                *((f"{seconds:.0f}" for seconds in found.plain[label]) if label in found.plain else ("", "")),
            )
            for label, stage in found.stages.items()
        ],
        checks=[],
    )
    yield Section(
        title=f"Peak memory with {rows:,} rows",
        text="The largest process of each kind in a stage. Anonymous is what it has asked the system for; "
        "RSS also counts pages of files and of Ray's object store, which is shared, that it has touched. "
        "A process between two tasks counts as the kind of the last.",
        header=("MiB", "anonymous", "RSS"),
        rows=[
            (f"{label}: {kind}", *(f"{size / 2**20:,.0f}" for size in peak))
            for label, stage in found.stages.items()
            for kind, peak in sorted(stage.peaks.items())
        ],
        checks=[],
    )


def judged(runs: Sequence[tuple[int, Found]]) -> Section:
    """The targets: at the most rows, and from the fewest to these."""
    (few, first), (many, last) = runs[0], runs[-1]
    checks = [
        at_most(
            "fit (statistics, detectors, banks) against reading the rows and NumPy's products",
            last.against(STATISTICS, FITS),
            LEARNED,
        ),
        at_most(f"{', '.join(SEARCHING)} against plain `faiss.knn`", last.against(SEARCH), NEAR),
        at_most("driver's own CPU of statistics, detectors, banks and score", last.driven, DRIVEN, "{:.1%}"),
    ]
    if few != many:
        growth = last.driver / first.driver - 1
        checks.append(at_most("growth of the driver's peak memory", growth, FLAT, "{:.1%}"))
    return Section(
        title="Stages of a job at the width of ImageNet networks",
        text="Made-up rows of features, logits and all columns that detectors read, as extraction writes "
        "them, through the stages of a run on Ray. Targets are those of wall seconds and "
        f"{many:,} training rows" + (f"; growth is that from {few:,}." if few != many else "."),
        header=(),
        rows=[],
        checks=checks,
    )


def main() -> None:
    """Make the tables, run the stages, write a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[20_000], help="training rows, each apart (default: 20000)"
    )
    parser.add_argument("--scored", type=int, default=10_000, help="scored rows (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=CLASSES, help="C (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the page")
    options = parser.parse_args()
    facts, runs = machine.describe(), []
    for rows in sorted(options.rows):
        print(f"{rows:,} rows", flush=True)
        with TemporaryDirectory(prefix="ood-benchmark-") as scratch:
            runs.append((rows, fresh(measure, Path(scratch), rows, options.scored, options.classes)))
    told = [each for rows, found in runs for each in sections(found, rows, options.scored, options.classes)]
    command = (
        f"python benchmarks/imagenet_shape.py --rows {' '.join(str(rows) for rows, _ in runs)} "
        f"--scored {options.scored} --classes {options.classes}"
    )
    targets = [judged(runs)] if options.classes == CLASSES else []
    written = page(command, facts, [*targets, *told])
    print(f"\n{written}")
    if options.output:
        options.output.write_text(written)


if __name__ == "__main__":
    main()
