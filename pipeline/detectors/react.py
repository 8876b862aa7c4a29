"""ReAct: energy after the feature's entries are clipped from above."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.detectors._steps import Shape, Step
from pipeline.detectors.base import Training
from pipeline.learned.percentiles import Histogram, Percentiles
from pipeline.learned.statistics import Statistic


class React(Step):
    """Rectified activations.

    The paper clips at the 90th percentile of all activations of ID data; here of the training rows. Its code
    has the bound itself for some networks: 1.0 for ResNet-50 on ImageNet.
    """

    title: ClassVar[str] = "ReAct (2021)"
    paper: ClassVar[str] = (
        "Sun, Guo, Li: ReAct: Out-of-distribution Detection With Rectified Activations. "
        "NeurIPS 2021, arXiv:2111.12797"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W min(h, c) + b, "
        "c = p-th percentile of the entries of all training features, or given"
    )
    reading: ClassVar[str] = (
        "The energy after clipping the feature, with its sign changed, in nats, unbounded: high = no class "
        "gets much evidence once no activation may stand out; comparable within one network and bound only."
    )

    p: float = Field(
        default=90.0, ge=0, le=100, description="percentile of the training activations that is the bound c"
    )
    c: float | None = Field(
        default=None, ge=-1e6, le=1e6, description="the bound itself, in place of the percentile"
    )

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """The bound, unless it is given, and how much lies above it."""
        return () if self.c is not None else (Percentiles((self.p,)), Histogram())

    def bound(self, train: Training) -> float:
        """The bound c."""
        return float(train.train[Percentiles((self.p,))].value[0]) if self.c is None else self.c

    def shape(self, train: Training) -> Shape:
        """Clip from above."""
        return partial(np.minimum, self.bound(train))

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether a percentile clips most of what is above 0."""
        if self.c is not None:
            return ()
        counts, bound = train.train[Histogram()], self.bound(train)
        positive = counts.above(0)
        clipped = counts.above(max(bound, 0)) / max(positive, 1)
        if clipped <= _MOST:
            return ()
        return (
            f"p = {self.p:g} clips {clipped:.0%} of the training activations above 0, since most are 0: to "
            f"{bound:.3g}. Try a higher p, or give the bound itself as c.",
        )


_MOST = 0.5
"""Share of the activations above 0 that a bound may clip unsaid."""
