"""What a run will cost, before it starts: forward passes, bytes, shards, and time from a few real images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.cluster.engine import Engine
from pipeline.columns import LOGITS, padded
from pipeline.errors import UserError
from pipeline.metrics.numbering import Numbering, suspicious
from pipeline.network.classifier import Classifier
from pipeline.stages import decoding, extract, shards
from pipeline.stages.prepare import Prepared

PROBE_IMAGES = 100

BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""What is tried where a batch size is looked for."""

_SECONDS = 1.0
"""Least time over which the forward pass is measured."""


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


def duration(engine: Engine, ready: Prepared, found: Probe) -> tuple[float, int]:
    """About how many seconds all forward passes take once they are running, and on how many model actors."""
    plan, cost = ready.plan, Cost.of(ready)
    images, actors = cost.images + cost.extra, extract.actor_count(engine, plan)
    forward = found.forward[plan.settings.batch_size]
    if not plan.separate:
        return images / actors * (1 / forward + 1 / found.decode), actors
    cpus = max(engine.cpus() - actors * plan.settings.cpus_per_actor, 1)
    return images / min(actors * forward, cpus * found.decode), actors


def probe(engine: Engine, ready: Prepared, sizes: Sequence[int]) -> Probe:
    """Decode and forward about `PROBE_IMAGES` images in a worker like those of the run.

    Raises:
        UserError: if no image of a dataset can be read, or the cluster has no room for a model actor.
    """
    settings = ready.config.extract
    extract.actor_count(engine, ready.plan)
    each = -(-PROBE_IMAGES // len(ready.jobs))
    tables = {}
    for name, job in ready.jobs.items():
        rows = np.unique(np.linspace(0, job.manifest.rows - 1, each).astype(np.int64))
        tables[name] = job.manifest.take(rows)
    needs = settings.needs
    worker = engine.start(Prober, needs, ready.plan, engine.threads(needs))
    try:
        found: Probe = worker.ask("measure", tables, list(sizes))()
    finally:
        worker.stop()
    return found


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
        return Probe(images, decoded.errors, decode, rates, numbering)

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
