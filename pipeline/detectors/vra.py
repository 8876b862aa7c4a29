"""VRA: energy after low entries of the feature are zeroed and high ones clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from pipeline.columns import Float
from pipeline.detectors._steps import Shape, Step
from pipeline.detectors.base import Training
from pipeline.learned.percentiles import DimensionPercentiles


class Vra(Step):
    """Variational rectified activation.

    Implemented is the form that needs no OOD data and amplifies nothing, as in the authors' code: on CIFAR
    both bounds are percentiles of each dimension over the training rows, 60 and 95 for CIFAR-100 and 60 and
    90 for CIFAR-10; on ImageNet they are numbers, a 0.5 and c 1 for ResNets and RegNet.
    """

    title: ClassVar[str] = "VRA (2023)"
    paper: ClassVar[str] = (
        "Xu, Lian, Liu, Tao: VRA: Variational Rectified Activation for Out-of-distribution Detection. "
        "NeurIPS 2023, arXiv:2302.11716"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W f(h) + b, f(h)_j = 0 where h_j < a_j, c_j where h_j > c_j, "
        "else h_j; a_j, c_j = percentiles of h_j over training features, or given for all j"
    )
    reading: ClassVar[str] = (
        "The energy after zeroing low and clipping high entries of the feature, with its sign changed, in "
        "nats, unbounded: high = what is left speaks for no class; comparable within one network and bounds"
        " only."
    )
    version: ClassVar[int] = 2

    low: float = Field(
        default=60.0, ge=0, le=100, description="percentile of a dimension below which its entry is zeroed"
    )
    high: float = Field(
        default=95.0, ge=0, le=100, description="percentile of a dimension above which its entry is clipped"
    )
    a: float | None = Field(
        default=None, ge=-1e6, le=1e6, description="the lower bound itself, in place of the percentile"
    )
    c: float | None = Field(
        default=None, ge=-1e6, le=1e6, description="the upper bound itself, in place of the percentile"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Vra:
        if self.low > self.high:
            raise ValueError(f"low is {self.low} but high is {self.high}; expected low to be at most high")
        if self.a is not None and self.c is not None and self.a > self.c:
            raise ValueError(f"a is {self.a} but c is {self.c}; expected a to be at most c")
        return self

    def statistics(self) -> tuple[DimensionPercentiles, ...]:
        """The bounds that are not given."""
        return (self._percentiles(),) if self._percentiles().p else ()

    def _percentiles(self) -> DimensionPercentiles:
        pairs = ((self.a, self.low), (self.c, self.high))
        return DimensionPercentiles(tuple(percentile for given, percentile in pairs if given is None))

    def _bounds(self, train: Training) -> Rectify:
        width = train.weight.shape[1]
        found = iter(train.train[self._percentiles()].value if self.statistics() else ())
        low, high = (next(found) if given is None else np.full(width, given) for given in (self.a, self.c))
        return Rectify(low, high)

    def shape(self, train: Training) -> Shape:
        """Zero and clip."""
        return self._bounds(train)

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether the upper percentile leaves nothing of most dimensions."""
        high = self._bounds(train).high
        nothing = int((high <= 0).sum())
        if self.c is not None or nothing <= len(high) / 2:
            return ()
        return (
            f"high = {self.high:g} is 0 or less in {nothing} of {len(high)} dimensions, of which nothing "
            "above 0 is left. Try a higher percentile, or give the bounds themselves as a and c.",
        )


@dataclass(frozen=True)
class Rectify:
    """Zero below `low`, clip above `high`."""

    low: Float
    """(D,)."""
    high: Float
    """(D,)."""

    def __call__(self, feature: Float) -> Float:
        """The rectified feature, (N, D) float64."""
        return np.where(feature < self.low, 0.0, np.minimum(feature, self.high))
