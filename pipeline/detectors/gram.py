"""Gram matrices: how far products of activations leave the range they have for the predicted class."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import PREDICTION, Batch, Float, Mask
from pipeline.detectors.base import Detector, Pooled, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Head, Part, Statistic, Statistics

_COLUMN = Pooled().column
_TINY = 1e-6
"""Added to a bound before a deviation is divided by it, as in the authors' code."""


class Gram(Detector):
    """Deviations of Gram matrices of pooled maps, summed over rows, orders and stages.

    The paper takes every layer's maps with all their positions; here it is the mean over positions at the
    end of every stage, which is f fᵀ for its vector f: of every row of the matrix of order q remains its sum,
    to the power 1 / q. The deviations of a stage are divided by their mean over a tenth of the training
    images, which are left out of the ranges, as the paper does with a tenth of its test images.
    """

    title: ClassVar[str] = "Gram, pooled (2020)"
    paper: ClassVar[str] = (
        "Sastry, Oore: Detecting Out-of-Distribution Examples with Gram Matrices. ICML 2020, arXiv:1912.12510"
    )
    formula: ClassVar[str] = (
        "score = Σ_l Δ_l / E[Δ_l], Δ_l = Σ_q Σ_i δ(g_i), g_i = (f_i^q Σ_j f_j^q)^(1/q) with the sign of the "
        "base, δ(g) = (min - g) / |min| below and (g - max) / |max| above the range of g over training "
        "images of the predicted class"
    )
    reading: ClassVar[str] = (
        "At least 0, a sum over stages in which each counts 1 for a typical held-out training image: 0 = "
        "nothing leaves the range of the predicted class, far above the number of stages = OOD."
    )
    columns: ClassVar[tuple[str, ...]] = (PREDICTION,)
    version: ClassVar[int] = 2

    orders: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        default=(1, 2, 3, 4, 5), min_length=1, description="orders q"
    )

    def extras(self) -> tuple[Pooled]:
        """Pooled maps."""
        return (Pooled(),)

    def table(self, classes: int, width: int, stages: Mapping[str, int]) -> int:
        """The ranges of every class."""
        return 2 * classes * sum(stages.values()) * len(self.orders)

    def statistics(self) -> tuple[Deviations]:
        """Mean deviation of every stage; it builds on the ranges."""
        return (Deviations(self.orders),)

    def fit(self, train: Training) -> GramScorer:
        """Join ranges and mean deviations.

        Raises:
            UserError: if all training rows are held out.
        """
        ranges, deviations = train.train[Ranges(self.orders)], train.train[Deviations(self.orders)]
        if not len(ranges.classes):
            raise UserError("too few training images; one in ten is held out. Add more.")
        return GramScorer(self.orders, tuple(train.stages.values()), ranges.with_all(), deviations.mean)


def products(pooled: Float, stages: tuple[int, ...], orders: tuple[int, ...]) -> Iterator[tuple[int, Float]]:
    """Number of the stage and (N, M) g of Gram matrices, for every stage and order in turn.

    As the matrix is an outer product, g_i is f_i, without its sign if q is even, times a root of Σ_j f_j^q.
    """
    for stage, own in enumerate(np.split(pooled, np.cumsum(stages)[:-1], axis=1)):
        size = np.abs(own)
        for order in orders:
            total = _power(own, order).sum(axis=1, keepdims=True)
            root = np.sign(total) * np.abs(total) ** (1 / order)
            yield stage, (own if order % 2 else size) * root


def _power(values: Float, order: int) -> Float:
    """Powers by squaring: several times as fast as NumPy's, whose exponents are any numbers."""
    if order == 1:
        return values
    half = _power(values, order // 2)
    square = half * half
    return square * values if order % 2 else square


def held_out(pooled: NDArray[np.float32]) -> Mask:
    """(N,) bool, true for a tenth of the rows; depends on the row alone."""
    rows = np.ascontiguousarray(pooled, dtype=np.float32)
    drawn: Mask = np.array([zlib.crc32(row.tobytes()) % 10 == 0 for row in rows], dtype=bool)
    return drawn


@dataclass(frozen=True)
class Extremes(Part):
    """Ranges of all g, by predicted class; only of classes that have rows."""

    classes: NDArray[np.int64]
    """(K,) ascending."""
    low: Float
    """(K, G) smallest."""
    high: Float
    """(K, G) largest."""

    def merge(self, other: Extremes) -> Extremes:
        """Ranges over both sets of rows."""
        classes = np.union1d(self.classes, other.classes)
        low = np.full((len(classes), self.low.shape[1]), np.inf)
        high = -low
        for part in (self, other):
            for row, place in enumerate(np.searchsorted(classes, part.classes).tolist()):
                np.minimum(low[place], part.low[row], out=low[place])
                np.maximum(high[place], part.high[row], out=high[place])
        return Extremes(classes, low, high)

    def with_all(self) -> Extremes:
        """The same with a last row for classes that have none: the range over all classes."""
        if not len(self.classes):
            return Extremes(np.array([-1]), *np.zeros((2, 1, self.low.shape[1])))
        low = np.vstack([self.low, self.low.min(axis=0)])
        high = np.vstack([self.high, self.high.max(axis=0)])
        return Extremes(np.append(self.classes, -1), low, high)


@dataclass(frozen=True)
class Ranges(Statistic[Extremes]):
    """Range of every g for every predicted class, over the rows that are not held out."""

    part: ClassVar[type[Part]] = Extremes
    version: ClassVar[int] = 2

    orders: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Pooled maps and predicted class."""
        return (_COLUMN, PREDICTION)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Extremes]:
        """Ranges of a batch."""
        return partial(_extremes, stages=head.stages, orders=self.orders)


def _extremes(batch: Batch, stages: tuple[int, ...], orders: tuple[int, ...]) -> Extremes:
    """Ranges of a batch, class by class: the rows of one stay in the cache."""
    kept = ~held_out(batch[_COLUMN])
    pooled, prediction = batch[_COLUMN][kept], batch[PREDICTION][kept].astype(np.int64)
    order = np.argsort(prediction, kind="stable")
    classes, starts = np.unique(prediction[order], return_index=True)
    low, high = np.empty((2, len(classes), sum(stages) * len(orders)))
    for row, rows in enumerate(np.split(order, starts[1:]) if len(classes) else ()):
        start = 0
        for _, found in products(pooled[rows].astype(np.float64), stages, orders):
            part = slice(start, start := start + found.shape[1])
            found.min(axis=0, out=low[row, part])
            found.max(axis=0, out=high[row, part])
    return Extremes(classes, low, high)


@dataclass(frozen=True)
class DeviationSums(Part):
    """Sums of the deviations of held-out rows."""

    count: NDArray[np.int64]
    """()."""
    total: Float
    """(L,) by stage."""

    @property
    def mean(self) -> Float:
        """(L,) mean deviation of a stage; 1 where no row deviates."""
        mean = self.total / max(int(self.count), 1)
        return np.where(mean > 0, mean, 1.0)


@dataclass(frozen=True)
class Deviations(Statistic[DeviationSums]):
    """Mean deviation of every stage over held-out rows."""

    part: ClassVar[type[Part]] = DeviationSums
    version: ClassVar[int] = 2

    orders: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Pooled maps and predicted class."""
        return (_COLUMN, PREDICTION)

    def after(self) -> tuple[Ranges]:
        """The ranges."""
        return (Ranges(self.orders),)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], DeviationSums]:
        """Deviations over a batch."""
        ranges = known[Ranges(self.orders)].with_all()
        scorer = GramScorer(self.orders, head.stages, ranges, np.ones(len(head.stages)))
        return partial(_deviation_sums, scorer=scorer)


def _deviation_sums(batch: Batch, scorer: GramScorer) -> DeviationSums:
    drawn = held_out(batch[_COLUMN])
    found = scorer.deviations({name: batch[name][drawn] for name in (_COLUMN, PREDICTION)})
    return DeviationSums(np.asarray(drawn.sum()), found.sum(axis=0))


@dataclass(frozen=True)
class GramScorer:
    """Deviations of stored pooled maps from ranges."""

    orders: tuple[int, ...]
    stages: tuple[int, ...]
    """Channels of every stage."""
    ranges: Extremes
    """The last row is for classes that have none."""
    expected: Float
    """(L,) what the deviation of a stage is divided by."""

    def __call__(self, batch: Batch) -> Float:
        """Sum of the deviations of all stages.

        Args:
            batch: `prediction` (N,) int and the column of the pooled maps, (N, ΣM) float.

        Returns:
            (N,) float64, at least 0.
        """
        score: Float = (self.deviations(batch) / self.expected).sum(axis=1)
        return score

    def deviations(self, batch: Batch) -> Float:
        """(N, L) float64 Δ_l."""
        classes = self.ranges.classes
        row = np.searchsorted(classes[:-1], batch[PREDICTION])
        row = np.where(classes[row] == batch[PREDICTION], row, len(classes) - 1)
        totals, start = dict[int, Float](), 0
        for stage, found in products(batch[_COLUMN].astype(np.float64), self.stages, self.orders):
            part = slice(start, start := start + found.shape[1])
            low, high = self.ranges.low[row, part], self.ranges.high[row, part]
            below = np.maximum(low - found, 0) / np.abs(low + _TINY)
            above = np.maximum(found - high, 0) / np.abs(high + _TINY)
            totals[stage] = totals.get(stage, 0) + (below + above).sum(axis=1)
        return np.stack(list(totals.values()), axis=1)
