"""SCALE: energy after each feature is multiplied by how much its largest entries dominate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import Float, Mask
from pipeline.detectors._steps import Shape, Step, of_imagenet
from pipeline.detectors.base import Training

_IMAGENET = 85.0
LARGEST = 100.0
"""Bound of |s1 / s2|, far beyond any that sums of positive entries have."""


class Scale(Step):
    """ASH-S without its pruning, applied to the pooled feature as in the authors' code.

    Sums are over all entries, as in the authors' code: with signed features the ratio of the sums has no
    bound but the one of `sharpening`. The factor grows with how evenly a feature is spread; where that is
    true of OOD images, as behind the quickstart's network, they score as more in-distribution.
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
    reading: ClassVar[str] = (
        "The energy after scaling the feature, with its sign changed, in nats, unbounded: high = little "
        "evidence, or a few entries of the feature dominate; comparable within one network and p only."
    )
    version: ClassVar[int] = 2

    p: float = Field(
        default=_IMAGENET, ge=0, le=99, description="percentage of the entries of h that s2 leaves out"
    )

    def shape(self, train: Training) -> Shape:
        """Scale by the row's own factor."""
        return Sharpen(self.p)

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether the paper's share for ImageNet is taken of another network."""
        elsewhere = "The authors' code has none for other data; `tune` finds one for these."
        return of_imagenet(f"p = {self.p:g}", train, elsewhere) if self.p == _IMAGENET else ()


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
    """(N, 1) float64 exp(s1 / s2): the sum of all entries over that of those kept; exp(1) where s2 is 0.

    The quotient is cut to [-100, 100]: among signed entries s2 may be near 0.
    """
    everything = feature.sum(axis=1, keepdims=True)
    top = np.where(kept, feature, 0.0).sum(axis=1, keepdims=True)
    near = np.abs(top) * LARGEST <= np.abs(everything)
    bound = LARGEST * np.where(np.signbit(everything) == np.signbit(top), 1.0, -1.0)
    ratio = np.divide(everything, top, out=bound, where=~near)
    ratio[(top == 0) & (everything == 0)] = 1.0
    factor: Float = np.exp(ratio)
    return factor
