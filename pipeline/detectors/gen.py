"""GEN: a generalised entropy of the largest probabilities, steep where a probability is 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import softmax


class Gen(Detector):
    """Generalised entropy of the M largest probabilities; of all where there are fewer classes."""

    title: ClassVar[str] = "GEN (2023)"
    paper: ClassVar[str] = (
        "Liu, Lochman, Zach: GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection. "
        "CVPR 2023, openreview:Sie7oeTABS"
    )
    formula: ClassVar[str] = (
        "score = Σ_{c of the M largest p_c} p_c^γ (1 - p_c)^γ, p = softmax(z); all classes if C < M"
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

    gamma: float = Field(
        default=0.1, gt=0, le=1, description="γ, the exponent; the smaller, the steeper near 0 and 1"
    )
    m: int = Field(default=100, ge=1, description="M, how many of the largest probabilities enter the sum")

    def fit(self, train: Training) -> GenScorer:
        """Nothing is fitted."""
        return GenScorer(self.gamma, self.m)


@dataclass(frozen=True)
class GenScorer:
    """Generalised entropy of stored logits."""

    gamma: float
    m: int

    def __call__(self, batch: Batch) -> Float:
        """Generalised entropy.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64 in [0, min(M, C) · 4^-γ].
        """
        probability = softmax(batch[LOGITS])
        classes = probability.shape[1]
        first = classes - min(self.m, classes)
        ordered = np.partition(probability, (first, classes - 1), axis=1)
        rest = 1 - ordered
        # 1 - p of the predicted class as a sum: the difference has no digits where the small γ needs them.
        rest[:, -1] = ordered[:, :-1].sum(axis=1)
        score: Float = ((ordered * rest)[:, first:] ** self.gamma).sum(axis=1)
        return score
