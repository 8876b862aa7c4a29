"""Exact percentiles of the entries of features, of all or of each dimension, from mergeable counts."""

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

    def above(self, bound: float) -> int:
        """Entries above a number, but for those within 1 % of it."""
        upper = int(_ordered(np.array([bound]))[0] >> 16)
        return int(self.count[upper + 1 :].sum())


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


_BYTES = 4


@dataclass(frozen=True)
class ByteCounts(Part):
    """Where the order statistics behind some percentiles of each dimension lie, by their first bytes."""

    fraction: Float
    """(K,) how far each percentile lies between its two order statistics."""
    lead: NDArray[np.uint32]
    """(2K, D) the first bytes of the order statistics, two per percentile, as one number."""
    rank: NDArray[np.int64]
    """(2K, D) their ranks among the entries of the dimension with these bytes, from 0."""
    count: NDArray[np.int64]
    """(2K, D, 256) how many of those entries have each value of the next byte."""

    def merge(self, other: ByteCounts) -> ByteCounts:
        """The counts of both sets of rows together."""
        return replace(self, count=self.count + other.count)

    def narrowed(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """`lead` with one byte more, and the `rank` that belongs to it."""
        upto = np.cumsum(self.count, axis=2)
        byte = (upto <= self.rank[:, :, None]).sum(axis=2)
        before = np.take_along_axis(upto - self.count, byte[:, :, None], axis=2)[:, :, 0]
        return (self.lead * 256 + byte).astype(np.uint32), self.rank - before

    @cached_property
    def value(self) -> Float:
        """(K, D) the percentiles, interpolated linearly as NumPy does; once all bytes are found."""
        ordered, _ = self.narrowed()
        sign = np.uint32(1 << 31)
        bits = np.where(ordered & sign, ordered ^ sign, ~ordered)
        pairs = bits.view(np.float32).astype(np.float64).reshape(-1, 2, bits.shape[1])
        value: Float = pairs[:, 0] + self.fraction[:, None] * (pairs[:, 1] - pairs[:, 0])
        return value


@dataclass(frozen=True)
class DimensionPercentiles(Statistic[ByteCounts]):
    """Percentiles of the entries of each dimension by itself, exact for float32 (`ByteCounts.value`).

    A radix select as in `Percentiles`, with a pass for each byte: counts of all dimensions are many.

    Cost:
        4 K · D kB in each pass.
    """

    part: ClassVar[type[Part]] = ByteCounts

    p: tuple[float, ...]
    """Percentages in [0, 100]."""
    known: int = _BYTES - 1
    """Bytes of the order statistics that are known before its pass."""

    def after(self) -> tuple[DimensionPercentiles, ...]:
        """The counts of the byte before; those of the first one are the same for all percentiles."""
        if self.known == 0:
            return ()
        return (DimensionPercentiles(self.p if self.known > 1 else (), self.known - 1),)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], ByteCounts]:
        """Counts of a batch."""
        if self.known == 0:
            zero = np.zeros((1, head.weight.shape[1]), np.int64)
            return partial(_byte_counts, fraction=np.zeros(0), lead=zero.astype(np.uint32), rank=zero, byte=0)
        earlier = known[self.after()[0]]
        if self.known == 1:
            earlier = _started(earlier, self.p)
        lead, rank = earlier.narrowed()
        return partial(_byte_counts, fraction=earlier.fraction, lead=lead, rank=rank, byte=self.known)


def _started(first: ByteCounts, p: tuple[float, ...]) -> ByteCounts:
    """The counts of the first byte, with the ranks of the order statistics behind some percentiles."""
    last = int(first.count[0, 0].sum()) - 1
    position = last * np.array(p) / 100
    below = np.floor(position).astype(np.int64)
    order = np.stack([below, np.minimum(below + 1, last)], axis=1).ravel()
    shape = (len(order), first.count.shape[1])
    return ByteCounts(
        fraction=position - below,
        lead=np.zeros(shape, np.uint32),
        rank=np.broadcast_to(order[:, None], shape),
        count=np.broadcast_to(first.count, (*shape, 256)),
    )


def _byte_counts(
    batch: Batch, fraction: Float, lead: NDArray[np.uint32], rank: NDArray[np.int64], byte: int
) -> ByteCounts:
    ordered = _ordered(batch[FEATURE]).reshape(batch[FEATURE].shape)
    upper = ordered.astype(np.uint64) >> np.uint64(8 * (_BYTES - byte))
    following = (ordered >> np.uint32(8 * (_BYTES - 1 - byte))) & np.uint32(255)
    width = lead.shape[1]
    place = 256 * np.arange(width) + following
    count = [np.bincount(place[upper == each], minlength=256 * width) for each in lead]
    return ByteCounts(fraction, lead, rank, np.reshape(count, (len(lead), width, 256)))
