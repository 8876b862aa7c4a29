"""Entropy: how evenly the softmax spreads over the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat

from pipeline.columns import LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import log_probability, logsumexp

_SURE = -37.0
"""From this log(1 - p) downwards -log p and 1 - p are the same number in float64."""


class Entropy(Detector):
    """Entropy of the softmax, without the training for high entropy that the paper adds.

    Given is its logarithm: the same order, also where the entropy rounds to 0.
    """

    title: ClassVar[str] = "Entropy (2021)"
    paper: ClassVar[str] = (
        "Chan, Rottmann, Gottschalk: Entropy Maximization and Meta Classification for Out-of-Distribution "
        "Detection in Semantic Segmentation. ICCV 2021, arXiv:2012.06575"
    )
    formula: ClassVar[str] = "score = log(-Σ_c p_c log p_c), p = softmax(z / T)"
    reading: ClassVar[str] = (
        "The logarithm of the entropy of the softmax in nats, at most log log C, which is a uniform "
        "prediction: high = the prediction is spread over many classes."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)
    version: ClassVar[int] = 2

    temperature: FiniteFloat = Field(
        default=1.0, gt=0, description="T, divides the logits z; above 1 softens the probabilities"
    )

    def fit(self, train: Training) -> EntropyScorer:
        """Nothing is fitted."""
        return EntropyScorer(self.temperature)


@dataclass(frozen=True)
class EntropyScorer:
    """Entropy of stored logits."""

    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """Logarithm of the entropy of the softmax, summed in logarithms.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64, at most log log C: of nats.
        """
        found = once(log_probability, batch, self.temperature)
        surprise, rows = -found.probability, np.arange(len(found.doubt))
        # -log p = (1 - p) + ..., of which nothing is left in float64 once p rounds to 1.
        surprise[rows, found.predicted] = 1
        logs = np.log(surprise)
        logs[rows, found.predicted] = _log_surprise(found.doubt)
        return logsumexp(found.probability + logs)


def _log_surprise(doubt: Float) -> Float:
    """Log(-log p) of log(1 - p), for p of 1/2 or less as for p near 1."""
    with np.errstate(divide="ignore"):
        return np.where(doubt < _SURE, doubt, np.log(-np.log1p(-np.exp(doubt))))
