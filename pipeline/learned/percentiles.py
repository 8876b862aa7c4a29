"""Exact percentiles of all entries of all features, from two passes of mergeable counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import FEATURE, Batch, Float
from pipeline.learned.statistics import Head, Part, Statistic, Statistics

_HALF = 1 << 16


def _ordered(feature: NDArray[Any]) -> NDArray[np.uint32]:
    """Bits of every entry as float32, changed so that they are ordered as the numbers are."""
    bits = (feature.astype(np.float32).ravel() + np.float32(0)).view(np.uint32)  # + 0 makes -0 a 0
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign)


def _number(ordered: int) -> float:
    """The float32 of which `_ordered` made this."""
    bits = ordered ^ (1 << 31) if ordered >> 31 else ordered ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


@dataclass(frozen=True)
class Counts(Part):
    """How many entries have each value of the upper 16 bits."""

    count: NDArray[np.int64]
    """(65536,)."""

    @property
    def negative(self) -> int:
        """Entries below 0."""
        return int(self.count[: _HALF // 2].sum())


@dataclass(frozen=True)
class Histogram(Statistic[Counts]):
    """All entries of all features, counted by sign, exponent and 7 bits of the mantissa."""

    part: ClassVar[type[Part]] = Counts

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Counts]:
        """Counts of a batch."""
        return _upper_counts


def _upper_counts(batch: Batch) -> Counts:
    return Counts(np.bincount(_ordered(batch[FEATURE]) >> 16, minlength=_HALF))


@dataclass(frozen=True)
class OrderCounts(Part):
    """Where the order statistics behind some percentiles lie."""

    fraction: Float
    """(K,) how far each percentile lies between its two order statistics."""
    upper: NDArray[np.int64]
    """(2K,) upper 16 bits of the order statistics, two per percentile."""
    rank: NDArray[np.int64]
    """(2K,) their ranks among the entries with these upper bits, from 0."""
    count: NDArray[np.int64]
    """(2K, 65536) how many of those entries have each value of the lower 16 bits."""

    def merge(self, other: OrderCounts) -> OrderCounts:
        """The counts of both sets of rows together."""
        return replace(self, count=self.count + other.count)

    @cached_property
    def value(self) -> Float:
        """(K,) the percentiles, interpolated linearly as NumPy does."""
        lower = (np.cumsum(self.count, axis=1) <= self.rank[:, None]).sum(axis=1)
        pairs = np.reshape([_number(int(found)) for found in self.upper * _HALF + lower], (-1, 2))
        value: Float = pairs[:, 0] + self.fraction * (pairs[:, 1] - pairs[:, 0])
        return value


@dataclass(frozen=True)
class Percentiles(Statistic[OrderCounts]):
    """Percentiles of all entries of all features, exact for float32 (`OrderCounts.value`).

    A radix select: the first pass counts entries by their upper 16 bits, the second one counts by the
    lower 16 bits those entries that share the upper ones with a wanted order statistic.
    """

    part: ClassVar[type[Part]] = OrderCounts

    p: tuple[float, ...]
    """Percentages in [0, 100]."""

    def after(self) -> tuple[Histogram]:
        """The counts by upper bits."""
        return (Histogram(),)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], OrderCounts]:
        """Counts of a batch."""
        upto = np.cumsum(known[Histogram()].count)
        position = (upto[-1] - 1) * np.array(self.p) / 100
        below = np.floor(position).astype(np.int64)
        order = np.stack([below, np.minimum(below + 1, upto[-1] - 1)], axis=1).ravel()
        upper = np.searchsorted(upto, order, side="right")
        rank = order - np.where(upper > 0, upto[upper - 1], 0)
        return partial(_lower_counts, fraction=position - below, upper=upper, rank=rank)


def _lower_counts(
    batch: Batch, fraction: Float, upper: NDArray[np.int64], rank: NDArray[np.int64]
) -> OrderCounts:
    ordered = _ordered(batch[FEATURE])
    halves, lower = ordered >> 16, ordered & np.uint32(_HALF - 1)
    count = [np.bincount(lower[halves == each], minlength=_HALF) for each in upper]
    return OrderCounts(fraction, upper, rank, np.stack(count))
