"""GradNorm: L1 norm of the last layer's gradient, in closed form.

The gradient is an outer product, so its L1 norm is a product of two: no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.logits import softmax


class GradNorm(Detector):
    """L1 norm of the gradient of KL(u ‖ p) in the last layer's weight; u uniform, p = softmax(z / T).

    The loss is the paper's mean over classes; the authors' code sums, which multiplies every score by C.
    """

    title: ClassVar[str] = "GradNorm (2021)"
    paper: ClassVar[str] = (
        "Huang, Geng, Li: On the Importance of Gradients for Detecting Distributional Shifts in the Wild. "
        "NeurIPS 2021, arXiv:2110.00218"
    )
    formula: ClassVar[str] = (
        "score = -‖∂KL(u ‖ p)/∂W‖_1 = -(1/T) · ‖h‖_1 · ‖p - u‖_1, p = softmax(z / T), u_c = 1/C"
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    temperature: FiniteFloat = Field(
        default=1.0, gt=0, description="T, divides the logits z; above 1 softens the probabilities"
    )

    def fit(self, train: Training) -> GradNormScorer:
        """Nothing is fitted."""
        return GradNormScorer(self.temperature)


@dataclass(frozen=True)
class GradNormScorer:
    """Gradient norm from stored features and logits."""

    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """Negative L1 norm of the last layer's gradient.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64, at most 0.
        """
        difference = softmax(batch[LOGITS], self.temperature)
        difference -= 1 / difference.shape[1]
        from_uniform = np.abs(difference, out=difference).sum(axis=1)
        length = np.abs(batch[FEATURE]).sum(axis=1, dtype=np.float64)
        score: Float = -length * from_uniform / self.temperature
        return score
