"""GROOD without its index: the norm of the gradient, which is the softmax probability of OOD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.columns import FEATURE, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.detectors.grood import Grood, OodPrototype, Prototypes


class GroodNorm(OodPrototype, Detector):
    """L2 norm of GROOD's gradient; no nearest-neighbour search.

    Not in the paper; the authors' code can switch to the L1 norm of the same gradient.
    """

    title: ClassVar[str] = "GROOD gradient norm (2025)"
    paper: ClassVar[str] = Grood.paper
    formula: ClassVar[str] = (
        "score = ‖∂L/∂p_o‖_2 = π_o = exp(-d_o) / (exp(-d_o) + Σ_c exp(-d_c)), d_j = ‖h - p_j‖_2, "
        "p_c the mean feature of class c"
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    def fit(self, train: Training) -> GroodNormScorer:
        """Compute the prototypes."""
        return GroodNormScorer(self.prototypes(train))


@dataclass(frozen=True)
class GroodNormScorer:
    """Norm of the gradient from stored features."""

    prototypes: Prototypes

    def __call__(self, batch: Batch) -> Float:
        """Softmax probability of OOD.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64 in [0, 1].
        """
        return self.prototypes.gradient(batch[FEATURE])[0]
