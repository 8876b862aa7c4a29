"""VRA: energy after low entries of the feature are zeroed and high ones clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from pipeline.columns import Float
from pipeline.detectors._steps import Shape, Step
from pipeline.detectors.base import Training
from pipeline.learned.percentiles import Percentiles


class Vra(Step):
    """Variational rectified activation.

    Implemented is the paper's piecewise form that needs no OOD data and amplifies nothing, with both bounds
    taken over the training rows.
    """

    title: ClassVar[str] = "VRA (2023)"
    paper: ClassVar[str] = (
        "Xu, Lian, Liu, Tao: VRA: Variational Rectified Activation for Out-of-distribution Detection. "
        "NeurIPS 2023, arXiv:2302.11716"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W f(h) + b, f(h) = 0 where h < a, h where a ≤ h ≤ c, c where h > c; "
        "a, c = percentiles of the entries of all training features"
    )

    low: float = Field(
        default=10.0,
        ge=0,
        le=100,
        description="percentile of the training activations below which h is zeroed",
    )
    high: float = Field(
        default=90.0,
        ge=0,
        le=100,
        description="percentile of the training activations above which h is clipped",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Vra:
        if self.low > self.high:
            raise ValueError(f"low is {self.low} but high is {self.high}; expected low to be at most high")
        return self

    def statistics(self) -> tuple[Percentiles]:
        """Both bounds."""
        return (Percentiles((self.low, self.high)),)

    def shape(self, train: Training) -> Shape:
        """Zero and clip."""
        low, high = train.train[Percentiles((self.low, self.high))].value
        return Rectify(float(low), float(high))


@dataclass(frozen=True)
class Rectify:
    """Zero below `low`, clip above `high`."""

    low: float
    high: float

    def __call__(self, feature: Float) -> Float:
        """The rectified feature, (N, D) float64."""
        clipped = np.minimum(feature, self.high)
        return np.where(feature < self.low, 0.0, clipped)
