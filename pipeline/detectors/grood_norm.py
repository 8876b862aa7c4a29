"""GROOD without its index: the norm of the gradient, the softmax probability of OOD, as log-odds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.columns import FEATURE, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.detectors.grood import Grood, OodPrototype, Prototypes


class GroodNorm(OodPrototype, Detector):
    """L2 norm of GROOD's gradient; no nearest-neighbour search.

    The norm is a probability; its log-odds have the same order, and keep it where the norm rounds to 0 or 1.
    Not in the paper; the authors' code can switch to the L1 norm of the same gradient.
    """

    title: ClassVar[str] = "GROOD gradient norm (2025)"
    paper: ClassVar[str] = Grood.paper
    formula: ClassVar[str] = (
        "score = log(π_o / (1 - π_o)), π_o = ‖∂L/∂p_o‖_2 = exp(-d_o) / (exp(-d_o) + Σ_c exp(-d_c)), "
        "d_j = ‖h - p_j‖_2, p_c the mean feature of class c"
    )
    reading: ClassVar[str] = (
        "The log-odds of the OOD prototype against all class prototypes, unbounded: 0 = a probability of 50"
        " %, positive = closer to the OOD prototype than to the classes together."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)
    version: ClassVar[int] = 2

    def fit(self, train: Training) -> GroodNormScorer:
        """Compute the prototypes."""
        return GroodNormScorer(self.prototypes(train))


@dataclass(frozen=True)
class GroodNormScorer:
    """Norm of the gradient from stored features, as log-odds."""

    prototypes: Prototypes

    def __call__(self, batch: Batch) -> Float:
        """Log-odds of OOD.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64; 0 where OOD is as probable as all classes.
        """
        return self.prototypes.log_odds(batch)
