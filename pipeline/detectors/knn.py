"""KNN: distance to the k-th nearest training feature on the unit sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import FEATURE, Batch, Float, Mask, once
from pipeline.detectors.base import NEIGHBOURS, Bank, Detector, Training
from pipeline.learned.statistics import unit_rows


class Knn(Detector):
    """Deep nearest neighbours over all training rows."""

    title: ClassVar[str] = "KNN (2022)"
    paper: ClassVar[str] = (
        "Sun, Ming, Zhu, Li: Out-of-Distribution Detection with Deep Nearest Neighbors. "
        "ICML 2022, arXiv:2204.06507"
    )
    formula: ClassVar[str] = (
        "score = ‖n(h) - n(h_(k))‖_2, n(h) = h / ‖h‖_2, n(h_(k)) the k-th nearest to n(h) among training rows"
    )
    reading: ClassVar[str] = (
        "From 0 to 2, the distance to the k-th nearest training image on the unit sphere: 0 = k training "
        "images point the same way, 1.41 = orthogonal; grows with k and with fewer training images."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)
    neighbours: ClassVar[bool] = True

    k: int = Field(default=50, ge=1, description="the distance to the k-th nearest training row is the score")

    def fit(self, train: Training) -> KnnScorer:
        """Nothing is fitted but the bank."""
        return KnnScorer(self.k)


@dataclass(frozen=True)
class KnnScorer:
    """Distance to the k-th neighbour in the bank."""

    k: int

    @property
    def bank(self) -> Bank:
        """All training rows, as unit vectors."""
        return Bank(embed=unit_feature, keep=every_row, k=self.k, kth=True)

    def __call__(self, batch: Batch) -> Float:
        """Distance to the k-th nearest unit vector.

        Args:
            batch: `neighbours` (N, 1) float, the distance to the k-th.

        Returns:
            (N,) float64 in [0, 2].
        """
        return batch[NEIGHBOURS].astype(np.float64, copy=False)[:, 0]


def unit_feature(batch: Batch) -> NDArray[np.float32]:
    """(N, D) float32, the normalised features."""
    return once(unit_rows, batch).astype(np.float32)


def every_row(batch: Batch) -> Mask:
    """(N,) bool, all true."""
    return np.ones(len(batch[FEATURE]), dtype=np.bool_)
