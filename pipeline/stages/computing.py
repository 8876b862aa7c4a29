"""How long fit and score compute: a few products that are measured, times what statistics and detectors do.

Work is put on CPUs in the pieces and in the order that the stages give it to tasks: however many CPUs there
are, it takes as long as the longest of them. The factors were found with all detectors, D = 2,048 and
C = 1,000 (benchmarks/imagenet_shape.md): one detector alone may take a few times what they say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.base import Detector
from pipeline.learned import statistics
from pipeline.learned.logits import softmax
from pipeline.learned.statistics import Head, Scatter, Statistic
from pipeline.stages.banks import BATCH
from pipeline.stages.statistics import EVERY, SLICE, slice_of, together

_PASSES = 10
"""Softmaxes of as many values that a statistic, a bank, or reading rows to score takes for its columns."""

_SCATTER = 0.7
"""A scatter of rows over a product of as many rows: it is symmetrical, and is merged."""

_SPECTRUM = 0.007
"""A spectrum of D dimensions over D times a product of `Products.ROWS` rows with a (D, D) matrix."""

_BY_CLASS = 4
"""Products of class means with a (D, D) matrix that a detector takes for each scatter it learns from."""

_FOUND = 1.2
"""A search over the product of queries with a bank, which has half the bytes a number."""


@dataclass(frozen=True)
class Products:
    """Seconds of one CPU for `ROWS` rows of features (D) and logits (C)."""

    ROWS: ClassVar[int] = 1024

    classes: float
    """A product with a matrix (D, C) in float64."""
    features: float
    """A product with a matrix (D, D) in float64."""
    softmax: float
    """Of the logits."""

    @classmethod
    def measured(cls, width: int, classes: int) -> Products:
        """Of made-up rows."""
        rng = np.random.default_rng(0)
        feature, logits = (rng.normal(size=(cls.ROWS, each)) for each in (width, classes))
        weight, square = (rng.normal(size=(width, each)) for each in (classes, width))
        work = (lambda: feature @ weight, lambda: feature @ square, lambda: softmax(logits))
        with threadpool_limits(limits=1):
            return cls(*(min(_seconds(each) for _ in range(3)) for each in work))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Computing:
    """Seconds of wall time that detectors take on some CPUs."""

    detectors: Collection[Detector]
    head: Head
    widths: Mapping[str, int]
    """Values that a row has of each column."""
    products: Products
    cpus: int

    def sums(self, wanted: Iterable[Statistic[Any]], rows: int) -> float:
        """Statistics of so many rows: pass after pass, in tasks of pieces of the rows."""
        if not rows:
            return 0.0
        return sum(
            self._elapsed(self._pieces(some, rows)) + self._elapsed([self._held] * len(some))
            for some in statistics.in_passes(wanted)
        )

    def _pieces(self, wanted: Iterable[Statistic[Any]], rows: int) -> Iterator[float]:
        """Tasks of one pass, in order."""
        for some in together(wanted, self.head, self._width):
            row, most = sum(map(self._summed, some)), EVERY * slice_of(some[0], self.head)
            yield from (row * count for count in _cut(rows, most))

    def fits(self) -> float:
        """Detectors, a task each, without the statistics that they learn from."""
        spectrum = _SPECTRUM * self._dimensions * self.products.features + _BY_CLASS * self._held
        return self._elapsed(self._held + spectrum * len(_scatters(detector)) for detector in self.detectors)

    def banks(self, rows: int) -> float:
        """Banks of so many rows at most, one after the other."""
        searching = [each for each in self.detectors if each.neighbours]
        per = [self._passes((FEATURE, LOGITS, *_extras(each))) for each in searching]
        return sum(self._elapsed(row * count for count in _cut(rows, SLICE)) for row in per)

    def scores(self, datasets: Iterable[int]) -> float:
        """Datasets of so many rows, neighbours aside: in tasks, of whole batches."""
        row = self._passes(self.widths) + sum(map(self._scored, self.detectors))
        batches = (-(-count // BATCH) * BATCH for rows in datasets for count in _cut(rows, SLICE))
        return self._elapsed(row * count for count in batches)

    def search(self, pairs: int, threads: float) -> float:
        """Exact searches: so many pairs of a query and a vector."""
        product = self.products.features / (2 * self._dimensions)  # in float32
        return _FOUND * product * pairs / Products.ROWS / max(threads, 1)

    @property
    def _dimensions(self) -> int:
        """D."""
        return int(self.head.weight.shape[1])

    @property
    def _held(self) -> float:
        """What is kept by class, of a statistic or a detector, written and read: as a product with (D, D)."""
        return self.products.features * len(self.head.bias) / Products.ROWS

    def _width(self, columns: Iterable[str]) -> int:
        """Values that a row has of some columns."""
        return sum(self.widths[name] for name in columns)

    def _passes(self, columns: Iterable[str]) -> float:
        """A row of these columns, looked at."""
        value = self.products.softmax / Products.ROWS / len(self.head.bias)
        return _PASSES * value * self._width(columns)

    def _summed(self, statistic: Statistic[Any]) -> float:
        """A row, for a statistic."""
        if not isinstance(statistic, Scatter):
            return self._passes(statistic.columns)
        wide = self._width(statistic.columns) / self._dimensions
        return _SCATTER * wide**2 * self.products.features / Products.ROWS

    def _scored(self, detector: Detector) -> float:
        """A row, for a detector: a product with the head for each vector it reads, whitened if it learns to.

        Logits cost a softmax, and what is narrower than features costs less.
        """
        columns = [*detector.columns, *_extras(detector)]
        vectors = sum(min(self.widths[name] / self._dimensions, 1) for name in columns if name != LOGITS)
        whitened = sum((self._width(each.columns) / self._dimensions) ** 2 for each in _scatters(detector))
        products = self.products
        seconds = vectors * products.classes + whitened * products.features
        return (seconds + columns.count(LOGITS) * products.softmax) / Products.ROWS

    def _elapsed(self, tasks: Iterable[float]) -> float:
        """Seconds until all tasks are done: each begins, in their order, on the first CPU that is free."""
        free = [0.0] * self.cpus
        heapify(free)
        for seconds in tasks:
            heapreplace(free, free[0] + seconds)
        return max(free)


def _cut(rows: int, most: int) -> Iterator[int]:
    """Rows of each task, at most so many."""
    return (min(most, rows - start) for start in range(0, rows, most))


def _extras(detector: Detector) -> Sequence[str]:
    """Columns beyond those of the feature table."""
    return [extra.column for extra in detector.extras()]


def _scatters(detector: Detector) -> Sequence[Scatter]:
    """What it learns a spectrum of."""
    return [each for each in detector.statistics() if isinstance(each, Scatter)]
