"""RMDS on unit features."""

from __future__ import annotations

from typing import ClassVar

from pipeline.detectors._gaussian import Mahalanobis
from pipeline.detectors.mds_l2 import MdsL2


class RmdsL2(Mahalanobis):
    """Relative Mahalanobis distance of features divided by their L2 norm; a zero feature stays zero."""

    title: ClassVar[str] = "RMDS++ (2025)"
    paper: ClassVar[str] = MdsL2.paper
    formula: ClassVar[str] = (
        "score = min_c (n - μ_c)ᵀ Σ⁺ (n - μ_c) - (n - μ_0)ᵀ Σ_0⁺ (n - μ_0), n = h / ‖h‖_2, "
        "Σ the covariance within classes, μ_0 and Σ_0 those of all training rows"
    )
    reading: ClassVar[str] = (
        "As rmds for directions, whatever the feature's length, unbounded: over training images the mean "
        "for their own class is 0, and far above that = unlike every class, but not as unlike the data as a"
        " whole."
    )

    unit: ClassVar[bool] = True
    relative: ClassVar[bool] = True
