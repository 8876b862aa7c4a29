"""MDS on unit features (Mahalanobis++)."""

from __future__ import annotations

from typing import ClassVar

from pipeline.detectors._gaussian import Mahalanobis


class MdsL2(Mahalanobis):
    """Mahalanobis distance of features divided by their L2 norm; a zero feature stays zero."""

    title: ClassVar[str] = "Mahalanobis++ (2025)"
    paper: ClassVar[str] = (
        "Mueller, Hein: Mahalanobis++: Improving OOD Detection via Feature Normalization. "
        "ICML 2025, arXiv:2505.18032"
    )
    formula: ClassVar[str] = (
        "score = min_c (n - μ_c)ᵀ Σ⁺ (n - μ_c), n = h / ‖h‖_2, μ_c and Σ (within classes) those of n"
    )

    unit: ClassVar[bool] = True
