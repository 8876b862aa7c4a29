"""MDS: Mahalanobis distance to the nearest class mean."""

from __future__ import annotations

from typing import ClassVar

from pipeline.detectors._gaussian import Mahalanobis


class Mds(Mahalanobis):
    """Mahalanobis distance with a covariance tied across classes, on the penultimate feature alone.

    The paper also perturbs the input and combines layers by a regression on OOD data; neither is done here.
    """

    title: ClassVar[str] = "MDS (2018)"
    paper: ClassVar[str] = (
        "Lee, Lee, Lee, Shin: A Simple Unified Framework for Detecting Out-of-Distribution Samples and "
        "Adversarial Attacks. NeurIPS 2018, arXiv:1807.03888"
    )
    formula: ClassVar[str] = (
        "score = min_c (h - μ_c)ᵀ Σ⁺ (h - μ_c), Σ = (1/N) Σ_c Σ_{i in c} (h_i - μ_c)(h_i - μ_c)ᵀ"
    )
    reading: ClassVar[str] = (
        "At least 0, the squared distance to the nearest class mean in standard deviations: over training "
        "images its mean to their own class is the rank of the covariance, at most D, and far above that = "
        "OOD."
    )
