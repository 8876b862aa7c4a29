"""ODIN: MSP at a high temperature, after a small step of the image towards its predicted class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import Batch, Float
from pipeline.detectors.base import Detector, Perturbed, Training
from pipeline.learned.logits import log_softmax


class Odin(Detector):
    """Largest softmax probability at temperature T of the perturbed image.

    Takes a forward and a backward pass over every image that is scored, and a second forward pass. The step
    is in pixel values, as in the authors' code, which divides it by each channel's std after normalisation.
    """

    title: ClassVar[str] = "ODIN (2018)"
    paper: ClassVar[str] = (
        "Liang, Li, Srikant: Enhancing The Reliability of Out-of-distribution Image Detection in Neural "
        "Networks. ICLR 2018, arXiv:1706.02690"
    )
    formula: ClassVar[str] = (
        "score = log(1 - max_c softmax(z(x') / T)_c), x' = x - ε sign(-∇_x log softmax(z(x) / T)_ŷ), "
        "ŷ = argmax_c z(x)_c"
    )
    reading: ClassVar[str] = (
        "The logarithm of the probability that the predicted class does not have after the perturbation, at"
        " most log(1 - 1/C): at T = 1000 all scores lie just below that bound, so only their order can be "
        "read."
    )
    columns: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 2

    temperature: float = Field(default=1000.0, ge=0.01, le=1e6, description="T, divides the logits")
    noise: float = Field(
        default=0.0014, ge=0, le=1, description="ε, how far every pixel moves, of its range from 0 to 1"
    )

    def _extra(self) -> Perturbed:
        return Perturbed(objective="log_softmax", temperature=self.temperature, step=self.noise, pixels=True)

    def extras(self) -> tuple[Perturbed]:
        """Features of the perturbed images."""
        return (self._extra(),)

    def fit(self, train: Training) -> OdinScorer:
        """Nothing is fitted."""
        weight, bias = train.weight.astype(np.float64), train.bias.astype(np.float64)
        return OdinScorer(self._extra().column, weight, bias, self.temperature)


@dataclass(frozen=True)
class OdinScorer:
    """MSP of the features of perturbed images."""

    column: str
    weight: Float
    """(C, D)."""
    bias: Float
    """(C,)."""
    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """As `msp`: log(1 - p) for the largest probability p.

        Args:
            batch: the column of the perturbed features, (N, D) float.

        Returns:
            (N,) float64, at most log(1 - 1/C).
        """
        logits = batch[self.column].astype(np.float64, copy=False) @ self.weight.T + self.bias
        return log_softmax(logits, self.temperature).doubt
