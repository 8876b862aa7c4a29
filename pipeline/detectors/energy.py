"""Energy: the free energy of the logits, a smooth MaxLogit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, FiniteFloat

from pipeline.columns import LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import evidence


class Energy(Detector):
    """Free energy of the logits."""

    title: ClassVar[str] = "Energy (2020)"
    paper: ClassVar[str] = (
        "Liu, Wang, Owens, Li: Energy-based Out-of-distribution Detection. NeurIPS 2020, arXiv:2010.03759"
    )
    formula: ClassVar[str] = "score = -T · log Σ_c exp(z_c / T)"
    reading: ClassVar[str] = (
        "The log-sum-exp of the logits with its sign changed, in units of logits, unbounded: high = no "
        "class gets much evidence; comparable within one network only, since logits have no fixed scale."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)

    temperature: FiniteFloat = Field(
        default=1.0, gt=0, description="T, divides the logits z; towards 0 the score becomes MaxLogit"
    )

    def fit(self, train: Training) -> EnergyScorer:
        """Nothing is fitted."""
        return EnergyScorer(self.temperature)


@dataclass(frozen=True)
class EnergyScorer:
    """Free energy of stored logits."""

    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """Free energy.

        Args:
            batch: `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        return -self.temperature * once(evidence, batch, self.temperature)
