"""MDS on unit features (Mahalanobis++)."""

from __future__ import annotations

from typing import ClassVar

from pipeline.detectors._gaussian import Mahalanobis


class MdsL2(Mahalanobis):
    """Mahalanobis distance of features divided by their L2 norm; a zero feature stays zero."""

    title: ClassVar[str] = "MDS++ (2025)"
    paper: ClassVar[str] = (
        "Mueller, Hein: Mahalanobis++: Improving OOD Detection via Feature Normalization. "
        "ICML 2025, arXiv:2505.18032"
    )
    formula: ClassVar[str] = (
        "score = min_c (n - μ_c)ᵀ Σ⁺ (n - μ_c), n = h / ‖h‖_2, μ_c and Σ (within classes) those of n"
    )
    reading: ClassVar[str] = (
        "At least 0, as mds for directions, whatever the feature's length: over training images the mean to"
        " their own class is the rank of the covariance, at most D, and far above that = OOD."
    )

    unit: ClassVar[bool] = True
