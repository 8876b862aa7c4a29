"""NCI: how far the feature lies in the direction of its class' weight, and how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.learned.statistics import Classes, normalize


class Nci(Detector):
    """Neural collapse inspired detector.

    OpenOOD chooses α per dataset from 1e-4 to 1e-1 with OOD data; the default is one value from that range.
    A feature at the mean μ has no direction: the first term is 0.
    """

    title: ClassVar[str] = "NCI (2025)"
    paper: ClassVar[str] = (
        "Liu, Qin: Detecting Out-of-Distribution Through the Lens of Neural Collapse. "
        "CVPR 2025, arXiv:2311.01479"
    )
    formula: ClassVar[str] = "score = -⟨W_ŷ, h - μ⟩ / ‖h - μ‖_2 - α ‖h‖_1, ŷ = argmax_c z_c, μ = E_train[h]"
    reading: ClassVar[str] = (
        "The alignment of the feature with the weight of its class, and α times its length, with their sign"
        " changed, unbounded: high = far from the direction of the predicted class, or short; comparable "
        "within one network and α only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    alpha: FiniteFloat = Field(default=0.001, ge=0, description="α, weight of the feature's L1 norm")

    def statistics(self) -> tuple[Classes]:
        """The mean feature."""
        return (Classes(),)

    def fit(self, train: Training) -> NciScorer:
        """Take the mean training feature."""
        return NciScorer(train.weight.astype(np.float64), train.train[Classes()].mean, self.alpha)


@dataclass(frozen=True)
class NciScorer:
    """Proximity to the weight of the predicted class, from stored features and logits."""

    weight: Float
    """(C, D) weight of the last layer."""
    mean: Float
    """(D,) mean training feature."""
    alpha: float

    def __call__(self, batch: Batch) -> Float:
        """Negative proximity and norm.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        feature = batch[FEATURE].astype(np.float64, copy=False)
        predicted = batch[LOGITS].argmax(axis=1)
        proximity = np.einsum("nd,nd->n", normalize(feature - self.mean), self.weight[predicted])
        score: Float = -proximity - self.alpha * np.abs(feature).sum(axis=1)
        return score
