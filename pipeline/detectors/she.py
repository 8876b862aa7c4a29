"""SHE: inner product with the stored pattern of the predicted class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Classes


class She(Detector):
    """Simplified Hopfield energy; no parameters.

    A class of which the classifier got no training row right has no pattern: rows predicted as it score 0.
    """

    title: ClassVar[str] = "SHE (2023)"
    paper: ClassVar[str] = (
        "Zhang et al.: Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization "
        "with Modern Hopfield Energy. ICLR 2023, openreview:KkazG4lgKL"
    )
    formula: ClassVar[str] = (
        "score = -⟨h, m_ŷ⟩, ŷ = argmax_c z_c, m_c = mean of h over the training rows of class c "
        "that are classified correctly"
    )
    reading: ClassVar[str] = (
        "The inner product with the mean feature of the predicted class, with its sign changed, unbounded: "
        "high = unlike that class, or short; 0 for a class without a correct training image; comparable "
        "within one network only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    def statistics(self) -> tuple[Classes]:
        """Class means of the rows that are classified correctly."""
        return (Classes(correct=True),)

    def fit(self, train: Training) -> SheScorer:
        """Compute the patterns.

        Raises:
            UserError: if the classifier got no training row right.
        """
        sums = train.train[Classes(correct=True)]
        count = sums.class_count
        if not count.any():
            raise UserError(
                "she: patterns need training rows that the classifier gets right, got none; expected at "
                "least one. Check that labels of the dataset with role train and model belong together."
            )
        return SheScorer(sums.class_sum / np.maximum(count, 1)[:, None])


@dataclass(frozen=True)
class SheScorer:
    """Inner product with the pattern of the predicted class."""

    patterns: Float
    """(C, D) mean feature of the correctly classified rows; 0 where there are none."""

    def __call__(self, batch: Batch) -> Float:
        """Negative inner product.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        predicted = batch[LOGITS].argmax(axis=1)
        feature = batch[FEATURE].astype(np.float64, copy=False)
        score: Float = -np.einsum("nd,nd->n", feature, self.patterns[predicted])
        return score
