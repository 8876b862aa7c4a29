"""Entropy: how evenly the softmax spreads over the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat

from pipeline.columns import LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training


class Entropy(Detector):
    """Entropy of the softmax, without the training for high entropy that the paper adds."""

    title: ClassVar[str] = "Entropy (2021)"
    paper: ClassVar[str] = (
        "Chan, Rottmann, Gottschalk: Entropy Maximization and Meta Classification for Out-of-Distribution "
        "Detection in Semantic Segmentation. ICCV 2021, arXiv:2012.06575"
    )
    formula: ClassVar[str] = "score = -Σ_c p_c log p_c, p = softmax(z / T)"
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

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
        """Entropy of the softmax: log Σ_c exp(-g_c) + Σ_c p_c g_c for the gaps g to the largest logit.

        No term is negative, so that certain predictions keep their digits.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64 in [0, log C], in nats.
        """
        logits = np.asarray(batch[LOGITS], dtype=np.float64)
        gap = (logits.max(axis=1, keepdims=True) - logits) / self.temperature
        others = np.exp(-gap)
        others[np.arange(len(others)), logits.argmax(axis=1)] = 0
        rest = others.sum(axis=1)
        score: Float = np.log1p(rest) + np.einsum("nc,nc->n", others, gap) / (1 + rest)
        return score
