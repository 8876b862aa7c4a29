"""What a run will cost, before it starts: forward passes, bytes, shards, and time from a few real images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.cluster.engine import Engine
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION, padded
from pipeline.errors import UserError
from pipeline.learned.statistics import Head
from pipeline.metrics.numbering import Numbering, suspicious
from pipeline.network.classifier import Classifier
from pipeline.stages import decoding, extract, index, shards
from pipeline.stages.computing import Computing, Products
from pipeline.stages.prepare import Prepared
from pipeline.stages.progress import SILENT, Stage

PROBE_IMAGES = 100

BESIDE = 2
"""Most workers that measure at once: two on one core take turns, whatever the system calls a CPU."""

BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""What is tried where a batch size is looked for."""

_SECONDS = 1.0
"""Least time over which the forward pass is measured."""

_STARTS = 2.4, 1.8, 0.3
"""What the start of extraction, of extra passes and of an index takes over that of one actor."""

_PROGRAM = 4.0
"""Seconds of the program's own imports, of opening data and model, and of MLflow."""

_REST, _DRAWN, _SORTED = 3.0, 0.03, 2e-6
"""Seconds of evaluation and report, more of them for each detector on each dataset, and for each score."""

_SEARCHED, _LOADED = 4.6e13, 6e8
"""Operations a second of a search on a GPU, and bytes a second of vectors that are brought to it.

benchmarks/gpu.md (c): FAISS alone, 1,024 queries at a time, k = 50; and the index as it is built.
"""

_GPU, _CPUS = "an NVIDIA H100 80GB HBM3 (benchmarks/gpu.md)", "a machine with 2 CPUs"
"""Where these were measured."""


@dataclass(frozen=True)
class Cost:
    """What a run still has to do, and what it leaves on disk and in memory."""

    images: int
    """Images to forward that are not in the cache."""
    extra: int
    """Most images that the extra passes forward, and passes of images for extra columns."""
    shards: int
    """Files of features that are still to be written, at most."""
    cache_bytes: int
    """Features of all datasets, before compression."""
    index_bytes: int
    """Vectors of an exact nearest-neighbour index, in memory over all shards."""

    @classmethod
    def of(cls, ready: Prepared) -> Cost:
        """Count without starting anything."""
        classes, width = ready.network.head[0].shape
        feature_bytes = np.dtype(ready.config.extract.feature_dtype).itemsize
        row_bytes = width * feature_bytes + 4 * (classes + len(ready.network.taps.blocks))
        todo = [job.manifest.rows for job in ready.jobs.values() if not job.featured]
        columns = [(job.manifest.rows, extra) for job in ready.jobs.values() for extra in job.extras]
        lacking = [
            (job.manifest.rows, extra)
            for job in ready.jobs.values()
            for extra in job.lacking()
            if job.featured or not extra.tapped or ready.plan.settings.compile
        ]
        train = sum(job.manifest.rows for job in ready.of_role("train"))
        passes = {spec for detector in ready.detectors.values() for spec in detector.passes()}
        banks = sum(detector.neighbours for detector in ready.detectors.values())
        return cls(
            images=sum(todo),
            extra=sum(spec.forwards(classes, train) for spec in passes)
            + sum(rows * extra.forwards for rows, extra in lacking),
            shards=sum(-(-rows // ready.plan.shard_rows) for rows in todo),
            cache_bytes=row_bytes * sum(job.manifest.rows for job in ready.jobs.values())
            + sum(4 * rows * ready.network.width(extra) for rows, extra in columns),
            index_bytes=banks * train * width * 4,
        )


@dataclass(frozen=True)
class Probe:
    """Rates measured on some images of every dataset, by an actor like those of the run."""

    images: int
    errors: list[list[str]]
    """[key, reason] of those that cannot be read."""
    decode: float
    """Images per second and CPU, from stored bytes to pixels."""
    forward: dict[int, float]
    """Images per second of one model actor, by batch size."""
    numbering: Numbering | None = None
    """What is suspicious about the order of labels."""
    products: Products | None = None
    """What detectors do to rows."""
    seconds: float = 0.0
    """What measuring took."""
    opening: float = 0.0
    """Seconds until the engine was there, and was seen to have room."""
    start: float = 0.0
    """Seconds from there until the actor began to measure: a process, its imports, the model."""


@dataclass(frozen=True)
class Times:
    """About how many seconds a run takes, by what it does."""

    start: float
    """Of the program, of Ray, of workers, and of what they import."""
    forward: float
    """All passes through the network, once they are running."""
    fit: float
    score: float
    rest: float
    """Evaluation and report."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.start + self.forward + self.fit + self.score + self.rest


def borrowed(ready: Prepared) -> list[str]:
    """What `times` does not take from the probe but from another machine, in words."""
    found = [
        "start of the program, evaluation and report; what starts take over that of a worker, and a spectrum "
        f"over a product: as on {_CPUS}"
    ]
    if ready.banks and index.device(ready.config.index) == "cuda":
        found.append(f"search for neighbours: at the rate of {_GPU}")
    return found


def times(engine: Engine, ready: Prepared, found: Probe) -> Times:
    """About how long a run takes, features that are cached left out.

    Of extra passes, fits and scores it is all of them.
    """
    assert found.products is not None
    chosen, cpus = ready.detectors.values(), max(int(engine.cpus()), 1)
    work = _computing(ready, found.products, cpus)
    forward, _ = forwarding(engine, ready, found)
    rows = {dataset.name: ready.jobs[dataset.name].manifest.rows for dataset in ready.config.datasets}
    train, held_out, ood = (
        sum(rows[dataset.name] for dataset in ready.config.of_role(role))
        for role in ("train", "id_val", "ood_val")
    )
    scored = [rows[dataset.name] for dataset in ready.config.datasets if dataset.role != "train"]
    learned = [each for detector in chosen for each in detector.statistics()]
    calibrating = [each for detector in chosen for each in detector.calibration()]
    begun = [
        Cost.of(ready).images > 0,
        any(detector.passes() for detector in chosen),
        any(detector.neighbours for detector in chosen),
    ]
    return Times(
        start=_PROGRAM
        + found.opening * any(begun)
        + found.start * sum(share for share, there in zip(_STARTS, begun, strict=True) if there),
        forward=forward,
        fit=work.sums(learned + ([] if held_out else calibrating), train)
        + work.sums(calibrating, held_out)
        + work.sums((each for detector in chosen for each in detector.ood_statistics()), ood)
        + work.fits()
        + work.banks(train),
        score=work.scores(scored) + _searching(engine, ready, work, train, sum(scored)),
        rest=_REST
        + _DRAWN * len(chosen) * len(ready.jobs)
        + _SORTED * sum(scored) * max(len(chosen) / cpus, 1),
    )


def _computing(ready: Prepared, products: Products, cpus: int) -> Computing:
    """What the detectors of a run do to rows."""
    network = ready.network
    weight, bias = network.head
    narrow = {KEY: 1, LABEL: 1, PREDICTION: 1, BLOCK_NORM: len(network.taps.blocks)}
    extras = {extra.column: extra for detector in ready.detectors.values() for extra in detector.extras()}
    wide = {FEATURE: weight.shape[1], LOGITS: weight.shape[0]}
    wide |= {name: network.width(extra) for name, extra in extras.items()}
    head = Head(weight, bias, tuple(network.taps.stages.values()))
    return Computing(ready.detectors.values(), head, narrow | wide, products, cpus)


def _searching(engine: Engine, ready: Prepared, work: Computing, train: int, scored: int) -> float:
    """About how many seconds all exact searches take, among so many training rows for so many scored ones."""
    width, settings = int(ready.network.head[0].shape[1]), ready.config.index
    pairs = len(ready.banks) * train * scored
    if not pairs or index.device(settings) == "cpu":
        count = index.AUTO_SHARDS if settings.shards == "auto" else settings.shards
        return work.search(pairs, min(count * engine.threads(settings.needs), engine.cpus()))
    gpus = min(index.shards_of(engine, ready.banks, settings), max(engine.gpus(), 1))
    return (2 * width * pairs / _SEARCHED + 4 * width * len(ready.banks) * train / _LOADED) / gpus


def forwarding(engine: Engine, ready: Prepared, found: Probe) -> tuple[float, int]:
    """About how many seconds all forward passes take once they are running, and on how many model actors."""
    plan, cost = ready.plan, Cost.of(ready)
    images, actors = cost.images + cost.extra, extract.actor_count(engine, plan)
    forward = found.forward[plan.settings.batch_size]
    beside = engine.cpus() - actors * plan.settings.cpus_per_actor
    if not plan.separate or beside < 1:
        return images / actors * (1 / forward + 1 / found.decode), actors
    return images / min(actors * forward, beside * found.decode), actors


def probe(engine: Engine, ready: Prepared, sizes: Sequence[int], stage: Stage = SILENT) -> Probe:
    """Decode and forward about `PROBE_IMAGES` images in workers like those of the run, beside each other.

    Raises:
        UserError: if no image of a dataset can be read, or the cluster has no room for a model actor or the
            index.
    """
    settings, started = ready.config.extract, time.perf_counter()
    count = min(extract.actor_count(engine, ready.plan), BESIDE)
    index.require(engine, ready.banks, ready.config.index)
    opening = time.perf_counter() - started
    each = -(-PROBE_IMAGES // len(ready.jobs))
    tables = {}
    for name, job in ready.jobs.items():
        rows = np.unique(np.linspace(0, job.manifest.rows - 1, each).astype(np.int64))
        tables[name] = job.manifest.take(rows)
    needs = settings.needs
    stage.doing("starts workers, which load the network and measure")
    workers = engine.pool(Prober, needs, count, ready.plan, engine.threads(needs))
    try:
        probes: list[Probe] = list(workers.each("measure", [(tables, list(sizes))] * count))
    finally:
        workers.stop()
    took = time.perf_counter() - started
    forward = {
        size: float(np.mean([probe.forward[size] for probe in probes]))
        for size in probes[0].forward
        if all(size in probe.forward for probe in probes)
    }
    slowest = max(probe.seconds for probe in probes)
    start = max(took - opening - slowest, 0)
    return replace(probes[0], forward=forward, seconds=slowest, opening=opening, start=start)


@dataclass(frozen=True)
class Prober:
    """Model worker that measures."""

    plan: shards.Plan
    threads: int

    def measure(self, tables: Mapping[str, pa.Table], sizes: Sequence[int]) -> Probe:
        """Rates of decoding, and of the forward pass at batch sizes up to the first that does not fit.

        Raises:
            UserError: if no image of a dataset can be read, or the first batch does not fit.
        """
        classifier = extract.load_in_worker(self.plan, self.threads, compiled=self.plan.settings.compile)
        begun = time.perf_counter()
        decoding.decode_rows(next(iter(tables.values())).slice(0, 8), self.plan)  # warms up
        started = time.perf_counter()
        decoded = self._decoded(tables)
        images = len(decoded.rows) + len(decoded.errors)
        decode = images / (time.perf_counter() - started)
        if not decoded.rows:
            key, reason = decoded.errors[0]
            raise UserError(f"none of {images} sampled images can be read; the first is {key}: {reason}.")
        rates: dict[int, float] = {}
        for size in sizes:
            pixels = padded(decoded.pixels, size)
            try:
                classifier.forward(pixels)  # warms up
                count, started = 0, time.perf_counter()
                while count == 0 or time.perf_counter() - started < _SECONDS:
                    classifier.forward(pixels)
                    count += 1
            except (
                RuntimeError,
                UserError,
            ) as error:  # memory of the CPU or, by `fitting`, of a GPU is short
                if rates:
                    break
                if isinstance(error, UserError):
                    raise
                raise UserError(f"extract.batch_size: {size} images do not fit: {error}. Lower it.") from None
            rates[size] = count * size / (time.perf_counter() - started)
        numbering = self._numbering(classifier, decoded, min(rates))
        weight, _ = classifier.head
        products = Products.measured(weight.shape[1], weight.shape[0])
        seconds = time.perf_counter() - begun
        return Probe(images, decoded.errors, decode, rates, numbering, products, seconds)

    def _decoded(self, tables: Mapping[str, pa.Table]) -> decoding.Decoded:
        """The images of all datasets.

        Raises:
            UserError: if none of a dataset can be read, and that would end a run.
        """
        found = {name: decoding.decode_rows(table, self.plan) for name, table in tables.items()}
        settings = self.plan.settings
        for name, each in found.items():
            if each.errors and not each.rows and settings.max_bad_fraction < 1:
                key, reason = each.errors[0]
                raise UserError(
                    f"datasets.{name}: none of {len(each.errors)} sampled images can be read; the first is "
                    f"{key}: {reason}. A run would end there: extract.max_bad_fraction is "
                    f"{settings.max_bad_fraction:g}."
                )
        return decoding.Decoded(
            np.concatenate([each.pixels for each in found.values()]),
            [row for each in found.values() for row in each.rows],
            [error for each in found.values() for error in each.errors],
        )

    def _numbering(self, classifier: Classifier, decoded: decoding.Decoded, size: int) -> Numbering | None:
        """What the network makes of the images that have a label."""
        predictions = [
            classifier.forward(padded(batch.pixels, size))[LOGITS][: len(batch.rows)].argmax(axis=1)
            for batch in decoded.batches(size)
        ]
        predicted = np.concatenate(predictions).astype(np.int64)
        given = [extract.label_of(row, int(one)) for row, one in zip(decoded.rows, predicted, strict=True)]
        labels = np.array([-1 if label is None else label for label in given], np.int64)
        return suspicious(labels, predicted, len(classifier.head[1]))
