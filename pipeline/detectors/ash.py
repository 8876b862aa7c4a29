"""ASH: energy after the lowest entries of each feature are pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.columns import Float
from pipeline.detectors._steps import Shape, Step, of_imagenet
from pipeline.detectors.base import Training
from pipeline.detectors.scale import largest, sharpening

_DEFAULT = {"s": 90.0, "b": 65.0, "p": 60.0}


class Ash(Step):
    """Activation shaping, applied to the pooled feature as in the authors' code.

    Implementations that shape the map before pooling give other numbers. Entries as large as the smallest
    one that is kept are kept too, whatever their order. Sums are over all entries, as in the authors' code:
    with signed features the ratio of the sums has no bound but the one of `sharpening`. With s, the factor
    grows with how evenly a feature is spread; where that is true of OOD images, as behind the quickstart's
    network, they score as more in-distribution.
    """

    title: ClassVar[str] = "ASH (2023)"
    paper: ClassVar[str] = (
        "Djurisic, Bozanic, Ashok, Liu: Extremely Simple Activation Shaping for Out-of-Distribution "
        "Detection. ICLR 2023, arXiv:2209.09858"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W f(h) + b; f keeps the (100 - p) % largest entries K of h and is "
        "0 elsewhere; s: multiplied by exp(s1 / s2); b: set to s1 / |K|; p: as they are; "
        "s1 = Σ_j h_j, s2 = Σ_{j in K} h_j"
    )
    reading: ClassVar[str] = (
        "The energy after pruning and scaling the feature, with its sign changed, in nats, unbounded: high "
        "= what is left of the feature speaks for no class; comparable within one network, variant and p "
        "only."
    )
    version: ClassVar[int] = 2

    variant: Literal["s", "b", "p"] = Field(
        default="s", description="what becomes of the entries that are kept: scaled, made equal, or nothing"
    )
    p: float | None = Field(
        default=None,
        ge=0,
        le=99,
        description="percentage of the entries pruned; null = the paper's for ImageNet: s 90, b 65, p 60",
    )

    @property
    def percentage(self) -> float:
        """Of the entries that are pruned."""
        return _DEFAULT[self.variant] if self.p is None else self.p

    def shape(self, train: Training) -> Shape:
        """Prune, and treat what is left as the variant says."""
        return Prune(self.percentage, self.variant)

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether the share of the paper's ImageNet network is pruned of another."""
        if self.percentage != _DEFAULT[self.variant]:
            return ()
        elsewhere = "The authors' code prunes 95 % with variant s for CIFAR-10 and CIFAR-100."
        return of_imagenet(f"p = {self.percentage:g}", train, elsewhere)


@dataclass(frozen=True)
class Prune:
    """Keep the largest entries of each row."""

    p: float
    variant: Literal["s", "b", "p"]

    def __call__(self, feature: Float) -> Float:
        """The shaped feature, (N, D) float64."""
        kept = largest(feature, self.p)
        if self.variant == "b":
            total = feature.sum(axis=1, keepdims=True)
            return np.where(kept, total / kept.sum(axis=1, keepdims=True), 0.0)
        pruned = np.where(kept, feature, 0.0)
        return pruned * sharpening(feature, kept) if self.variant == "s" else pruned
