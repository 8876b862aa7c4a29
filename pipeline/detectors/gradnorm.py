"""GradNorm: norm of the last layer's gradient, in closed form; of other layers' by differentiation.

The gradient in the last layer is an outer product, so its norm is a product of two: no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from pipeline.columns import FEATURE, LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, ParameterGradient, Training
from pipeline.learned.logits import probability


class GradNorm(Detector):
    """Norm of the gradient of KL(u ‖ p) in the last layer's weight; u uniform, p = softmax(z / T).

    The defaults are the paper's: L1 norm, T = 1, without the bias. The loss is its mean over classes; the
    authors' code sums, which multiplies every score by C.

    The paper also looks at earlier layers, and finds the last one best. Those have no closed form: `layers`
    takes a forward and a backward pass over every image that is scored.
    """

    title: ClassVar[str] = "GradNorm (2021)"
    paper: ClassVar[str] = (
        "Huang, Geng, Li: On the Importance of Gradients for Detecting Distributional Shifts in the Wild. "
        "NeurIPS 2021, arXiv:2110.00218"
    )
    formula: ClassVar[str] = (
        "score = -‖∂KL(u ‖ p)/∂W‖_q = -(1/T) · ‖h‖_q · ‖p - u‖_q, p = softmax(z / T), u_c = 1/C; "
        "with the bias: -‖∂KL(u ‖ p)/∂(W, b)‖_q, ‖(h, 1)‖_q in place of ‖h‖_q; "
        "with layers: W = all their weights"
    )
    reading: ClassVar[str] = (
        "At most 0, the length of a gradient with its sign changed: near 0 = a short feature, or a "
        "prediction close to uniform; comparable within one network only, as it grows with the feature's "
        "length."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    temperature: FiniteFloat = Field(
        default=1.0, gt=0, description="T, divides the logits z; above 1 softens the probabilities"
    )
    order: float = Field(
        default=1.0, ge=0.1, le=16, description="q, the order of the norm: 1 for L1, 2 for L2"
    )
    bias: bool = Field(default=False, description="whether the gradient in the layer's bias counts, too")

    layers: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="modules whose linear and convolutional layers are taken, or single parameters, instead "
        "of the last layer, e.g. [layer4, fc]",
    )

    @model_validator(mode="after")
    def _fits_a_column(self) -> GradNorm:
        if self.layers is not None and self.order < 0.5:
            raise ValueError(f"order is {self.order}; expected at least 0.5 with layers")
        return self

    def extras(self) -> tuple[ParameterGradient, ...]:
        """Gradient norms, where layers are named."""
        if self.layers is None:
            return ()
        return (
            ParameterGradient(
                layers=self.layers, order=self.order, temperature=self.temperature, bias=self.bias
            ),
        )

    def fit(self, train: Training) -> GradNormScorer | LayersScorer:
        """Nothing is fitted."""
        for spec in self.extras():
            return LayersScorer(spec.column, self.order)
        return GradNormScorer(self.temperature, self.order, self.bias)


@dataclass(frozen=True)
class GradNormScorer:
    """Gradient norm from stored features and logits."""

    temperature: float
    order: float
    bias: bool

    def __call__(self, batch: Batch) -> Float:
        """Negative norm of the last layer's gradient.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64, at most 0.
        """
        difference = once(probability, batch, self.temperature) - 1 / batch[LOGITS].shape[1]
        size = self._powers(batch[FEATURE]) + (1 if self.bias else 0)
        score: Float = -((size * self._powers(difference)) ** (1 / self.order)) / self.temperature
        return score

    def _powers(self, rows: NDArray[Any]) -> Float:
        """(N,) sum of |x|^q over each row."""
        size = np.abs(rows)
        if self.order != 1:
            size = size.astype(np.float64) ** self.order
        total: Float = size.sum(axis=1, dtype=np.float64)
        return total


@dataclass(frozen=True)
class LayersScorer:
    """Gradient norm over several layers from those of each."""

    column: str
    order: float

    def __call__(self, batch: Batch) -> Float:
        """Negative norm of the gradient in all layers together.

        Args:
            batch: the column of the norms, (N, L) float, at least 0.

        Returns:
            (N,) float64, at most 0.
        """
        norms = batch[self.column].astype(np.float64, copy=False)
        score: Float = -np.linalg.norm(norms, self.order, axis=1)
        return score
