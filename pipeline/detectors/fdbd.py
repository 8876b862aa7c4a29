"""fDBD: mean distance to the decision boundaries, relative to the distance from the training mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.learned.statistics import Classes


class Fdbd(Detector):
    """Regularised distance to the decision boundaries; no parameters.

    The distance to the boundary between ŷ and c is the paper's closed-form lower bound; its mean is over the
    classes that have a boundary with ŷ, i.e. another weight. Divided by ‖h - μ‖_2 as in the paper; OpenOOD
    may choose ‖h‖_2 with OOD data. A feature at μ has no such ratio and scores 0, the highest there is.
    """

    title: ClassVar[str] = "fDBD (2024)"
    paper: ClassVar[str] = (
        "Liu, Qin: Fast Decision Boundary based Out-of-Distribution Detector. ICML 2024, arXiv:2312.11536"
    )
    formula: ClassVar[str] = (
        "score = -mean_{c ≠ ŷ} (|z_ŷ - z_c| / ‖W_ŷ - W_c‖_2) / ‖h - μ‖_2, ŷ = argmax_c z_c, μ = E_train[h]"
    )
    reading: ClassVar[str] = (
        "At most 0, the mean distance to the boundaries between the predicted class and the others, per "
        "distance from the training mean, with its sign changed: 0 = on all boundaries; comparable within "
        "one network only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    def table(self, classes: int, width: int, stages: Mapping[str, int]) -> int:
        """The distances between the classes' weights."""
        return classes * classes

    def statistics(self) -> tuple[Classes]:
        """The mean feature."""
        return (Classes(),)

    def fit(self, train: Training) -> FdbdScorer:
        """Distances between the classes' weights."""
        from scipy.spatial.distance import cdist  # takes half a second to import

        weight = train.weight.astype(np.float64)
        between = cdist(weight, weight)
        bounded = between > 0
        share = np.divide(1, between, out=np.zeros_like(between), where=bounded)
        share /= np.maximum(bounded.sum(axis=1, keepdims=True), 1)
        return FdbdScorer(share, train.train[Classes()].mean)


@dataclass(frozen=True)
class FdbdScorer:
    """Regularised distance from stored features and logits."""

    share: Float
    """(C, C) 1 / ‖W_i - W_c‖_2 over the number of classes with a boundary to i; 0 where there is none."""
    mean: Float
    """(D,) mean training feature."""

    def __call__(self, batch: Batch) -> Float:
        """Negative regularised mean distance.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64, at most 0.
        """
        logits = batch[LOGITS].astype(np.float64, copy=False)
        predicted = logits.argmax(axis=1)
        distance = logits.max(axis=1, keepdims=True) - logits
        distance *= self.share[predicted]
        deviation = np.linalg.norm(batch[FEATURE] - self.mean, axis=1)
        total = distance.sum(axis=1)
        ratio: Float = np.divide(-total, deviation, out=np.zeros_like(total), where=deviation > 0)
        return ratio
