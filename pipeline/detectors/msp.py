"""MSP: the probability of the predicted class, the baseline of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, FiniteFloat

from pipeline.columns import LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import softmax


class Msp(Detector):
    """Maximum softmax probability."""

    title: ClassVar[str] = "MSP (2017)"
    paper: ClassVar[str] = (
        "Hendrycks, Gimpel: A Baseline for Detecting Misclassified and Out-of-Distribution Examples "
        "in Neural Networks. ICLR 2017, arXiv:1610.02136"
    )
    formula: ClassVar[str] = "score = -max_c softmax(z / T)_c"
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

    temperature: FiniteFloat = Field(
        default=1.0, gt=0, description="T, divides the logits z; above 1 softens the probabilities"
    )

    def fit(self, train: Training) -> MspScorer:
        """Nothing is fitted."""
        return MspScorer(self.temperature)


@dataclass(frozen=True)
class MspScorer:
    """Maximum softmax probability of stored logits."""

    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """Negative probability of the predicted class.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64 in [-1, -1/C].
        """
        score: Float = -softmax(batch[LOGITS], self.temperature).max(axis=1)
        return score
