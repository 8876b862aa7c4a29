"""NNGuide: the energy, guided by how similar the feature is to confident training rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import FEATURE, LOGITS, Batch, Float, Mask, once
from pipeline.detectors.base import NEIGHBOURS, Bank, Detector, Training
from pipeline.learned.logits import evidence, logsumexp
from pipeline.learned.statistics import Head, Part, Statistic, Statistics, normalize, unit_rows


@dataclass(frozen=True)
class Largest(Part):
    """The largest absolute energy."""

    energy: Float
    """()."""

    def merge(self, other: Largest) -> Largest:
        """The larger one."""
        return Largest(np.maximum(self.energy, other.energy))


@dataclass(frozen=True)
class LargestEnergy(Statistic[Largest]):
    """The largest |logsumexp z| of a row."""

    part: ClassVar[type[Part]] = Largest

    @property
    def columns(self) -> tuple[str, ...]:
        """The classifier's output."""
        return (LOGITS,)

    def numbers(self, width: int, classes: int) -> int:
        """One."""
        return 1

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Largest]:
        """The largest of a batch."""
        return _largest


def _largest(batch: Batch) -> Largest:
    return Largest(np.abs(logsumexp(batch[LOGITS])).max())


class NnGuide(Detector):
    """Energy times the mean similarity to the k most similar training rows, each weighted by its energy.

    The paper takes 1 % of ImageNet's training images; the share here is all of them by default, which
    needs no luck where there are few.
    """

    title: ClassVar[str] = "NNGuide (2023)"
    paper: ClassVar[str] = (
        "Park, Jung, Teoh: Nearest Neighbor Guidance for Out-of-Distribution Detection. "
        "ICCV 2023, arXiv:2309.14888"
    )
    formula: ClassVar[str] = (
        "score = -E(z) · mean of the k largest E(z_i) ⟨n(h), n(h_i)⟩ over training rows i, "
        "E(z) = log Σ_c exp z_c, n(h) = h / ‖h‖_2"
    )
    reading: ClassVar[str] = (
        "The energy times the similarity to confident training images, with its sign changed, unbounded: "
        "high = little evidence, or none like it in training; comparable within one network and bank only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)
    neighbours: ClassVar[bool] = True

    k: int = Field(
        default=10, ge=1, description="how many of the most similar training rows guide the energy"
    )
    share: float = Field(
        default=1.0, gt=0, le=1, description="share of the training rows that are looked at, drawn by seed"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the draw; the same rows on every machine")

    def statistics(self) -> tuple[LargestEnergy]:
        """The largest energy."""
        return (LargestEnergy(),)

    def fit(self, train: Training) -> NnGuideScorer:
        """Take the largest energy as the length of all bank vectors."""
        largest = float(train.train[LargestEnergy()].energy)
        return NnGuideScorer(largest or 1.0, self.k, self.share, self.seed)


@dataclass(frozen=True)
class NnGuideScorer:
    """Guided energy from inner products, which are found as Euclidean distances.

    A bank vector e_i n(h_i), e_i = E(z_i) / R, gets the coordinate that brings its length to 1; a query n(h)
    gets a 0 there. Then ‖query - vector‖² = ‖n(h)‖² + 1 - 2 e_i ⟨n(h), n(h_i)⟩: nearest is most similar.
    """

    largest: float
    """R, no energy of a training row is larger."""
    k: int
    share: float
    seed: int

    @property
    def bank(self) -> Bank:
        """Weighted directions of the drawn training rows."""
        return Bank(embed=self.weighted, keep=self.drawn, k=self.k, query=self.direction)

    def weighted(self, batch: Batch) -> NDArray[np.float32]:
        """(N, D + 1) float32, unit vectors."""
        share = np.clip(logsumexp(batch[LOGITS]) / self.largest, -1, 1)
        vectors = normalize(batch[FEATURE]) * share[:, None]
        rest = np.sqrt(np.maximum(1 - np.einsum("nd,nd->n", vectors, vectors), 0))
        return np.column_stack([vectors, rest]).astype(np.float32)

    def direction(self, batch: Batch) -> NDArray[np.float32]:
        """(N, D + 1) float32, the normalised features and a 0."""
        unit = once(unit_rows, batch)
        return np.column_stack([unit, np.zeros(len(unit))]).astype(np.float32)

    def drawn(self, batch: Batch) -> Mask:
        """(N,) bool, true with the wanted probability; depends on seed and feature alone."""
        rows = np.ascontiguousarray(batch[FEATURE])
        hashed = np.array([zlib.crc32(row.tobytes(), self.seed) for row in rows], dtype=np.float64)
        drawn: Mask = hashed < self.share * 2**32
        return drawn

    def __call__(self, batch: Batch) -> Float:
        """Negative guided energy.

        Args:
            batch: `logits` (N, C) float, `feature` (N, D) float, `neighbours` (N, k) float, nearest first.

        Returns:
            (N,) float64.
        """
        distance = batch[NEIGHBOURS].astype(np.float64, copy=False)
        length = (once(unit_rows, batch) ** 2).sum(axis=1, keepdims=True)
        similarity = self.largest * (length + 1 - distance**2) / 2
        score: Float = -once(evidence, batch, 1.0) * similarity.mean(axis=1)
        return score
