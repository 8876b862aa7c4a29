"""GradOrth: norm of the last layer's gradient inside the subspace of the training features.

The gradient is an outer product, so its projected norm is a product of two: no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.columns import FEATURE, LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import probability
from pipeline.learned.statistics import Scatter


class GradOrth(Detector):
    """Norm of the cross-entropy's gradient in the last layer's weight, projected on the features' subspace.

    The equation is recalled, and which label the paper gives an image without one is not known to us. A small
    projection has to mean OOD, as its abstract says. With the predicted class as the label, the gradient
    vanishes for images the classifier is sure about, so that these count as OOD; with the uniform
    distribution, as in GradNorm, it is large for them. Hence the default.
    """

    title: ClassVar[str] = "GradOrth (2023)"
    paper: ClassVar[str] = (
        "Behpour, Doan, Li, He, Gou, Ren: GradOrth: A Simple yet Efficient Out-of-Distribution Detection "
        "with Orthogonal Projection of Gradients. NeurIPS 2023, arXiv:2308.00310"
    )
    formula: ClassVar[str] = (
        "score = -‖∂H(t, p)/∂W S Sᵀ‖_F = -‖p - t‖_2 · ‖Sᵀ h‖_2, p = softmax(z), t_c = 1/C or 1[c = ŷ], "
        "S the eigenvectors of the largest eigenvalues of E_train[h hᵀ] that make up a share of their sum"
    )
    reading: ClassVar[str] = (
        "At most 0, the length of the gradient inside the subspace of the training features with its sign "
        "changed: near 0 = little of the feature lies there, or a prediction close to uniform; comparable "
        "within one network only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    share: float = Field(
        default=0.97, gt=0, le=1, description="share of the eigenvalues' sum that the subspace holds at least"
    )
    target: Literal["uniform", "predicted"] = Field(
        default="uniform",
        description="t, the label of an image: every class alike, or the predicted one, with which images "
        "the classifier is sure about count as OOD",
    )

    def statistics(self) -> tuple[Scatter]:
        """Second moments."""
        return (Scatter(),)

    def fit(self, train: Training) -> GradOrthScorer:
        """Find the subspace; a singular value decomposition of the features would find the same."""
        moments = train.train[Scatter()]
        energy, direction = moments.spectrum(np.outer(moments.mean, moments.mean))
        held = np.cumsum(np.maximum(energy[::-1], 0))
        dim = 1 + int(np.searchsorted(held, self.share * held[-1]))
        return GradOrthScorer(direction[:, -dim:], self.target)


@dataclass(frozen=True)
class GradOrthScorer:
    """Projected gradient norm from stored features and logits."""

    inside: Float
    """(D, d) orthonormal directions."""
    target: Literal["uniform", "predicted"]

    def __call__(self, batch: Batch) -> Float:
        """Negative norm of the projected gradient.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64, at most 0.
        """
        difference = once(probability, batch, 1.0).copy()
        if self.target == "uniform":
            difference -= 1 / difference.shape[1]
        else:
            rows, predicted = np.arange(len(difference)), batch[LOGITS].argmax(axis=1)
            difference[rows, predicted] = 0
            difference[rows, predicted] = -difference.sum(axis=1)  # p - 1 would lose the digits of a sure p
        inside = batch[FEATURE] @ self.inside
        score: Float = -np.linalg.norm(difference, axis=1) * np.linalg.norm(inside, axis=1)
        return score
