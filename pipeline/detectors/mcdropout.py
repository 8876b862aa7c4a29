"""MC dropout: MSP of the mean softmax over forward passes with dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import Batch, Float
from pipeline.detectors.base import Detector, Dropped, Training


class McDropout(Detector):
    """Largest mean probability over samples of the network's own dropout layers.

    Every sample is a forward pass over every image that is scored. Of the paper's predictive distribution
    only its mean is used. Does not apply to a network without dropout layers, such as a ResNet.
    """

    title: ClassVar[str] = "MC dropout (2016)"
    paper: ClassVar[str] = (
        "Gal, Ghahramani: Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep "
        "Learning. ICML 2016, arXiv:1506.02142"
    )
    formula: ClassVar[str] = "score = 1 - max_c (1/S) Σ_s softmax(z(x; mask_s))_c"
    reading: ClassVar[str] = (
        "From 0 to 1 - 1/C, the mean probability over passes that the predicted class does not have: 0 = "
        "sure in every pass, 0.05 = a mean confidence of 95 %."
    )
    columns: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 2

    samples: int = Field(default=10, ge=1, le=1000, description="S, forward passes per image")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the masks; the same ones on every machine")

    def _extra(self) -> Dropped:
        return Dropped(samples=self.samples, seed=self.seed)

    def extras(self) -> tuple[Dropped]:
        """Mean probabilities."""
        return (self._extra(),)

    def fit(self, train: Training) -> McDropoutScorer:
        """Nothing is fitted."""
        return McDropoutScorer(self._extra().column)


@dataclass(frozen=True)
class McDropoutScorer:
    """MSP of stored mean probabilities."""

    column: str

    def __call__(self, batch: Batch) -> Float:
        """The probability that all but the largest have together: 1 - p would lose the order of sure images.

        Args:
            batch: the column of the mean probabilities, (N, C) float.

        Returns:
            (N,) float64 in [0, 1 - 1/C].
        """
        others = batch[self.column].astype(np.float64)
        others[np.arange(len(others)), others.argmax(axis=1)] = 0
        score: Float = others.sum(axis=1)
        return score
