"""GEN: a generalised entropy of the largest probabilities, steep where a probability is 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import log_probability, logsumexp


class Gen(Detector):
    """Generalised entropy of the M largest probabilities; of all where there are fewer classes.

    Given is its logarithm: the same order, also where the entropy rounds to 0.
    """

    title: ClassVar[str] = "GEN (2023)"
    paper: ClassVar[str] = (
        "Liu, Lochman, Zach: GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection. "
        "CVPR 2023, openreview:Sie7oeTABS"
    )
    formula: ClassVar[str] = (
        "score = log Σ_{c of the M largest p_c} p_c^γ (1 - p_c)^γ, p = softmax(z); all classes if C < M"
    )
    reading: ClassVar[str] = (
        "The logarithm of a generalized entropy of the M largest probabilities, without lower bound and "
        "largest for a uniform prediction: high = several classes share the probability; comparable for the"
        " same γ and M only."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)
    version: ClassVar[int] = 2

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
        """Logarithm of the generalised entropy.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64, at most log min(M, C) - γ log 4.
        """
        found = once(log_probability, batch, 1.0)
        rows, rest = np.arange(len(found.doubt)), np.exp(found.probability)
        rest[rows, found.predicted] = 0
        rest = np.log1p(-rest)
        rest[rows, found.predicted] = found.doubt
        classes = rest.shape[1]
        largest = np.argpartition(found.probability, -min(self.m, classes), axis=1)[:, -self.m :]
        both = np.take_along_axis(found.probability + rest, largest, axis=1)
        return logsumexp(self.gamma * both)
