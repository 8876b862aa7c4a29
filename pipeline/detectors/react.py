"""ReAct: energy after the feature's entries are clipped from above."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.detectors._steps import Shape, Step
from pipeline.detectors.base import Training
from pipeline.learned.percentiles import Percentiles


class React(Step):
    """Rectified activations.

    The paper clips at the 90th percentile of all activations of ID data; here of the training rows.
    """

    title: ClassVar[str] = "ReAct (2021)"
    paper: ClassVar[str] = (
        "Sun, Guo, Li: ReAct: Out-of-distribution Detection With Rectified Activations. "
        "NeurIPS 2021, arXiv:2111.12797"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W min(h, c) + b, "
        "c = p-th percentile of the entries of all training features"
    )

    p: float = Field(
        default=90.0, ge=0, le=100, description="percentile of the training activations that is the bound c"
    )

    def statistics(self) -> tuple[Percentiles]:
        """The bound."""
        return (Percentiles((self.p,)),)

    def shape(self, train: Training) -> Shape:
        """Clip from above."""
        return partial(np.minimum, train.train[Percentiles((self.p,))].value[0])
