"""DICE: energy through a last layer that keeps only its largest mean contributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import FEATURE, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.logits import logsumexp
from pipeline.statistics import Classes


class Dice(Detector):
    """Directed sparsification of the last layer.

    The paper drops 70 % of the weights on ImageNet and 90 % on CIFAR; OpenOOD drops 90 % everywhere.
    """

    title: ClassVar[str] = "DICE (2022)"
    paper: ClassVar[str] = (
        "Sun, Li: DICE: Leveraging Sparsification for Out-of-Distribution Detection. "
        "ECCV 2022, arXiv:2111.09805"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = (W ⊙ M) h + b, "
        "M = 1[V > p-th percentile of V], V_cj = W_cj · E_train[h_j]"
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    p: float = Field(
        default=70.0,
        ge=0,
        lt=100,
        description="percentage of the last layer's weights that is dropped, lowest contributions V first",
    )

    def statistics(self) -> tuple[Classes]:
        """The mean feature."""
        return (Classes(),)

    def fit(self, train: Training) -> DiceScorer:
        """Mask the weight by the mean training feature."""
        weight = train.weight.astype(np.float64)
        contribution = weight * train.train[Classes()].mean
        kept = contribution > np.percentile(contribution, self.p)
        return DiceScorer(weight * kept, train.bias.astype(np.float64))


@dataclass(frozen=True)
class DiceScorer:
    """Energy through the sparse last layer."""

    weight: Float
    """(C, D) weight, 0 where it was dropped."""
    bias: Float
    """(C,)."""

    def __call__(self, batch: Batch) -> Float:
        """Free energy of the sparse layer's logits.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64.
        """
        feature = np.asarray(batch[FEATURE], dtype=np.float64)
        return -logsumexp(feature @ self.weight.T + self.bias)
