"""KL matching: how far the softmax is from the mean softmax of the closest class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import probability
from pipeline.learned.statistics import Softmax


class KlMatching(Detector):
    """Smallest KL divergence to the mean softmax of a predicted class; no parameters.

    As in the paper the means are over held-out ID images, those of role id_val. Without any they are over the
    training images, on which a classifier is surer. A class that is predicted for none of them has its
    one-hot vector.
    """

    title: ClassVar[str] = "KL matching (2022)"
    paper: ClassVar[str] = (
        "Hendrycks et al.: Scaling Out-of-Distribution Detection for Real-World Settings. "
        "ICML 2022, arXiv:1911.11132"
    )
    formula: ClassVar[str] = (
        "score = min_k KL(p ‖ q_k), KL(p ‖ q) = Σ_c p_c log(p_c / q_c), p = softmax(z), "
        "q_k = E_val[p | argmax_c p_c = k]"
    )
    reading: ClassVar[str] = (
        "At least 0, the divergence in nats of the softmax from the most similar mean softmax of a class: 0"
        " = a prediction that is typical for one class, high = typical for none."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

    def table(self, classes: int, width: int, stages: Mapping[str, int]) -> int:
        """The mean softmax of every class."""
        return classes * classes

    def calibration(self) -> tuple[Softmax]:
        """Mean softmax of each predicted class."""
        return (Softmax(),)

    def fit(self, train: Training) -> KlMatchingScorer:
        """Logarithms of the mean probabilities."""
        sums = train.id_val[Softmax()]
        count = sums.count[:, None]
        mean = np.where(count > 0, sums.sum / np.maximum(count, 1), np.eye(len(sums.count)))
        return KlMatchingScorer(np.log(np.maximum(mean, np.finfo(np.float64).tiny)))


@dataclass(frozen=True)
class KlMatchingScorer:
    """Smallest KL divergence of stored logits to a class."""

    log_mean: Float
    """(C, C) log q_k; a probability of 0 counts as the smallest normal number."""

    def __call__(self, batch: Batch) -> Float:
        """Smallest KL divergence.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64, at least 0, in nats.
        """
        from scipy.special import entr  # takes a third of a second to import

        found = once(probability, batch, 1.0)
        cross = (found @ -self.log_mean.T).min(axis=1)
        score: Float = np.maximum(cross - entr(found).sum(axis=1), 0)
        return score
