"""MaxLogit: the largest logit, which unlike MSP keeps the scale of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training


class MaxLogit(Detector):
    """Maximum logit; no parameters."""

    title: ClassVar[str] = "MaxLogit (2022)"
    paper: ClassVar[str] = (
        "Hendrycks et al.: Scaling Out-of-Distribution Detection for Real-World Settings. "
        "ICML 2022, arXiv:1911.11132"
    )
    formula: ClassVar[str] = "score = -max_c z_c"
    reading: ClassVar[str] = (
        "The largest logit with its sign changed, unbounded: high = no class gets much evidence; comparable"
        " within one network only, since logits have no fixed scale."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

    def fit(self, train: Training) -> MaxLogitScorer:
        """Nothing is fitted."""
        return MaxLogitScorer()


@dataclass(frozen=True)
class MaxLogitScorer:
    """Maximum of stored logits."""

    def __call__(self, batch: Batch) -> Float:
        """Negative largest logit.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        logits = batch[LOGITS].astype(np.float64, copy=False)
        score: Float = -logits.max(axis=1)
        return score
