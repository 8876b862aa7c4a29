"""SCALE: energy after each feature is multiplied by how much its largest entries dominate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import Float, Mask
from pipeline.detectors._steps import Shape, Step
from pipeline.detectors.base import Training


class Scale(Step):
    """ASH-S without its pruning, applied to the pooled feature; the authors' code scales the map.

    Sums count positive entries, which are all of them behind a ReLU: with signed features the ratio of the
    sums would have no bound.
    """

    title: ClassVar[str] = "SCALE (2024)"
    paper: ClassVar[str] = (
        "Xu, Chen, Franchi, Yao: Scaling for Training Time and Post-hoc Out-of-distribution Detection "
        "Enhancement. ICLR 2024, arXiv:2310.00227"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W h exp(s1 / s2) + b, s1 = Σ_j h_j, "
        "s2 the sum of the (100 - p) % largest entries of h"
    )

    p: float = Field(
        default=85.0, ge=0, le=99, description="percentage of the entries of h that s2 leaves out"
    )

    def shape(self, train: Training) -> Shape:
        """Scale by the row's own factor."""
        return Sharpen(self.p)


@dataclass(frozen=True)
class Sharpen:
    """Multiply each row by exp(s1 / s2)."""

    p: float

    def __call__(self, feature: Float) -> Float:
        """The scaled feature, (N, D) float64."""
        return feature * sharpening(feature, largest(feature, self.p))


def largest(feature: Float, p: float) -> Mask:
    """(N, D) bool, the (100 - p) % largest entries of each row and those equal to them; at least one."""
    width = feature.shape[1]
    kept = max(1, width - round(width * p / 100))
    least = np.partition(feature, width - kept, axis=1)[:, width - kept]
    mask: Mask = feature >= least[:, None]
    return mask


def sharpening(feature: Float, kept: Mask) -> Float:
    """(N, 1) float64 exp(s1 / s2): sums of the positive entries, all over those kept; exp(1) for 0 / 0."""
    positive = np.maximum(feature, 0)
    everything = positive.sum(axis=1, keepdims=True)
    top = np.where(kept, positive, 0.0).sum(axis=1, keepdims=True)
    factor: Float = np.exp(np.divide(everything, top, out=np.ones_like(top), where=top > 0))
    return factor
