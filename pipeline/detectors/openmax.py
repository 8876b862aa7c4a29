"""OpenMax: probability of an unknown class, from how extreme the logits are among those of their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import LABEL, LOGITS, PREDICTION, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.logits import logsumexp
from pipeline.learned.statistics import Classes, Head, Part, Statistic, Statistics

_MEANS = Classes(column=LOGITS, correct=True)
_SHAPES = 1e-2, 1e4
"""Bounds of the Weibull shape; the upper one makes a step of tails that are all the same."""
_TAIL, _SHARE = 20, 20
"""A tail that is not given: so many rows, and at most one in so many of its class."""


class OpenMax(Detector):
    """Weibull-corrected logits with an unknown class.

    Implemented are the paper's algorithms 1 and 2 on the last layer: per class a two-parameter Weibull
    distribution, fitted by maximum likelihood to the largest Euclidean distances of correct training rows
    to their mean logits, shifted so that the smallest of them is 1 as libMR does. The score is the
    log-odds of the unknown class, which orders rows as its probability does and never saturates. A class
    without a correct training row leaves its logit as it is. Unless a tail is given it is 20 distances, as in
    the paper, and where a class has few rows no more than a 20th of them: otherwise half of what is typical
    would count as extreme. One that is given is followed, or refused where a class has fewer rows.
    """

    title: ClassVar[str] = "OpenMax (2016)"
    paper: ClassVar[str] = "Bendale, Boult: Towards Open Set Deep Networks. CVPR 2016, arXiv:1511.06233"
    formula: ClassVar[str] = (
        "score = log P_0 - log(1 - P_0) = z_0 - log Σ_c exp(ω_c z_c), z_0 = Σ_c (1 - ω_c) z_c, "
        "ω_c = 1 - ((α - i) / α) F_c(‖z - μ_c‖_2) for the class c of the i-th largest logit, i = 0 .. α - 1, "
        "1 for the others"
    )
    reading: ClassVar[str] = (
        "The log-odds of an unknown class against all known ones, unbounded: 0 = a probability of 50 %, "
        "positive = unknown is more likely than all classes together."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)
    version: ClassVar[int] = 2

    tail: int | None = Field(
        default=None,
        ge=2,
        le=10_000,
        description="largest distances per class that F_c is fitted to; null = 20, but at most a 20th of the "
        "correct rows of the class",
    )
    alpha: int = Field(
        default=10,
        ge=1,
        le=10_000,
        description="classes α whose logits are corrected, the largest; at most C",
    )

    def table(self, classes: int, width: int, stages: Mapping[str, int]) -> int:
        """The mean logits of every class."""
        return classes * classes

    def statistics(self) -> tuple[Classes, Farthest]:
        """Mean logits of each class, and the largest distances from them."""
        return _MEANS, Farthest(self.tail or _TAIL)

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether every class that has rows has as many as the tail that is given.

        Raises:
            UserError: if one has fewer, none of which can be enough.
        """
        labels = range(max(count, default=-1) + 1)
        self._longest(np.array([count.get(label, 0) for label in labels], np.int64))

    def fit(self, train: Training) -> OpenMaxScorer:
        """Fit a Weibull distribution to the tail of every class.

        Raises:
            UserError: if a class has fewer correct training rows than the tail that is given.
        """
        tail = train.train[Farthest(self.tail or _TAIL)]
        return OpenMaxScorer(
            means(train.train),
            *tail.weibull(self._longest(train.train[_MEANS].class_count)),
            min(self.alpha, len(train.bias)),
        )

    def _longest(self, count: NDArray[np.int64]) -> NDArray[np.int64]:
        """(C,) how many distances count at most, for so many correct rows of each class (C,)."""
        if self.tail is None:
            return np.maximum(count // _SHARE, 2)
        short = (count > 0) & (count < self.tail)
        if short.any():
            label = int(np.argmin(np.where(short, count, self.tail)))
            raise UserError(
                f"tail is {self.tail}, but {short.sum()} of {len(count)} classes have fewer correct training "
                f"rows: class {label} has {count[label]}. Lower tail, or leave it out."
            )
        return np.full_like(count, self.tail)


def means(known: Statistics) -> Float:
    """(C, C) mean logits of the correct rows of each class; 0 for a class that has none."""
    sums = known[_MEANS]
    mean: Float = sums.class_sum / np.maximum(sums.class_count, 1)[:, None]
    return mean


@dataclass(frozen=True)
class Tails(Part):
    """Largest distances of correct rows to the mean logits of their class."""

    distance: Float
    """(C, tail) largest first; -inf where a class has fewer rows."""

    def merge(self, other: Tails) -> Tails:
        """The largest distances of both sets of rows."""
        both = np.concatenate([self.distance, other.distance], axis=1)
        return Tails(-np.sort(-both, axis=1)[:, : self.distance.shape[1]])

    def weibull(self, longest: NDArray[np.int64]) -> tuple[Float, Float, Float]:
        """Shift, shape and scale (C,) of F_c(d) = 1 - exp(-((d - shift) / scale)^shape).

        Args:
            longest: (C,) how many distances of each class are read at most.

        Returns:
            Three arrays (C,) float64; the shift is inf, and so F_c = 0, where a class has no rows.
        """
        there = np.isfinite(self.distance) & (np.arange(self.distance.shape[1]) < longest[:, None])
        empty = ~there.any(axis=1)
        smallest = np.where(there, self.distance, np.inf).min(axis=1)
        shift = smallest - 1
        count = np.maximum(there.sum(axis=1), 1)
        value = np.log(np.where(there, self.distance - np.where(empty, 0, shift)[:, None], 1.0))
        largest = value.max(axis=1, keepdims=True)

        def powers(shape: Float) -> Float:
            return np.where(there, np.exp(shape[:, None] * (value - largest)), 0.0)

        low, high = (np.full(len(value), np.log(bound)) for bound in _SHAPES)
        for _ in range(60):  # the likelihood's derivative falls with the shape
            middle = (low + high) / 2
            power = powers(np.exp(middle))
            mean = (power * value).sum(axis=1) / np.maximum(power.sum(axis=1), np.finfo(float).tiny)
            falls = mean - np.exp(-middle) > np.where(there, value, 0).sum(axis=1) / count
            low, high = np.where(falls, low, middle), np.where(falls, middle, high)
        shape = np.exp(low)
        total = np.maximum(powers(shape).sum(axis=1), np.finfo(float).tiny)
        scale = np.exp(largest[:, 0] + np.log(total / count) / shape)
        return shift, shape, np.where(empty, 1.0, scale)


@dataclass(frozen=True)
class Farthest(Statistic[Tails]):
    """The rows of each class that lie farthest from its mean logits, correct ones only."""

    part: ClassVar[type[Part]] = Tails

    tail: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Logits, true and predicted class."""
        return (LOGITS, LABEL, PREDICTION)

    def numbers(self, width: int, classes: int) -> int:
        """The tails."""
        return self.tail * classes

    def after(self) -> tuple[Classes]:
        """The mean logits."""
        return (_MEANS,)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Tails]:
        """Largest distances in a batch."""
        return partial(_farthest, mean=means(known), tail=self.tail)


def _farthest(batch: Batch, mean: Float, tail: int) -> Tails:
    right = batch[LABEL] == batch[PREDICTION]
    label = batch[LABEL][right]
    distance = np.linalg.norm(batch[LOGITS][right] - mean[label], axis=1)
    order = np.lexsort((-distance, label))
    label, distance = label[order], distance[order]
    place = np.arange(len(label)) - np.searchsorted(label, label)
    kept = place < tail
    found = np.full((len(mean), tail), -np.inf)
    found[label[kept], place[kept]] = distance[kept]
    return Tails(found)


@dataclass(frozen=True)
class OpenMaxScorer:
    """Log-odds of the unknown class."""

    mean: Float
    """(C, C) mean logits of each class."""
    shift: Float
    """(C,)."""
    shape: Float
    """(C,)."""
    scale: Float
    """(C,)."""
    alpha: int

    def __call__(self, batch: Batch) -> Float:
        """Correct the largest logits and compare what they lost with what is left.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        logits = batch[LOGITS].astype(np.float64, copy=False)
        rows = np.arange(len(logits))
        corrected, unknown = logits.copy(), np.zeros(len(logits))
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, : self.alpha]
        for rank, label in enumerate(ranked.T):
            extreme = self._extreme(np.linalg.norm(logits - self.mean[label], axis=1), label)
            lost = (self.alpha - rank) / self.alpha * extreme * logits[rows, label]
            corrected[rows, label] -= lost
            unknown += lost
        return unknown - logsumexp(corrected)

    def _extreme(self, distance: Float, label: NDArray[np.int64]) -> Float:
        """F_c of (N,) distances from classes (N,)."""
        excess = np.maximum(distance - self.shift[label], 0) / self.scale[label]
        with np.errstate(divide="ignore"):
            power = np.exp(np.minimum(self.shape[label] * np.log(excess), 700))
        extreme: Float = -np.expm1(-power)
        return extreme
