"""MSP: the probability of the predicted class, the baseline of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, FiniteFloat

from pipeline.columns import LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import log_probability


class Msp(Detector):
    """Maximum softmax probability p, as log(1 - p): the same order, also where p rounds to 1."""

    title: ClassVar[str] = "MSP (2017)"
    paper: ClassVar[str] = (
        "Hendrycks, Gimpel: A Baseline for Detecting Misclassified and Out-of-Distribution Examples "
        "in Neural Networks. ICLR 2017, arXiv:1610.02136"
    )
    formula: ClassVar[str] = "score = log(1 - max_c softmax(z / T)_c)"
    reading: ClassVar[str] = (
        "The logarithm of the softmax probability that the predicted class does not have, at most log(1 - "
        "1/C): -3 = a confidence of 95 %, -0.7 = 50 %, as far as the softmax can be believed."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)
    version: ClassVar[int] = 2

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
        """Logarithm of the probability that all but the predicted class have together.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64, at most log(1 - 1/C); log 0.05 = -3.0 is a confidence of 95 %.
        """
        return once(log_probability, batch, self.temperature).doubt
