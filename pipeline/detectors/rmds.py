"""RMDS: Mahalanobis distance to the nearest class mean, relative to that from all training data."""

from __future__ import annotations

from typing import ClassVar

from pipeline.detectors._gaussian import Mahalanobis


class Rmds(Mahalanobis):
    """Relative Mahalanobis distance."""

    title: ClassVar[str] = "RMDS (2021)"
    paper: ClassVar[str] = (
        "Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan: A Simple Fix to Mahalanobis Distance for Improving "
        "Near-OOD Detection. ICML UDL workshop 2021, arXiv:2106.09022"
    )
    formula: ClassVar[str] = (
        "score = min_c (h - μ_c)ᵀ Σ⁺ (h - μ_c) - (h - μ_0)ᵀ Σ_0⁺ (h - μ_0), "
        "Σ the covariance within classes, μ_0 and Σ_0 those of all training rows"
    )
    reading: ClassVar[str] = (
        "The squared distance to the nearest class mean minus that to the mean of all training images, "
        "unbounded: over training images its mean for their own class is 0, and far above that = unlike "
        "every class, but not as unlike the data as a whole."
    )

    relative: ClassVar[bool] = True
