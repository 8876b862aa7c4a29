"""DICE: energy through a last layer that keeps only its largest mean contributions."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import Float
from pipeline.detectors._steps import Step, of_imagenet
from pipeline.detectors.base import Training
from pipeline.learned.statistics import Classes

_IMAGENET = 70.0


class Dice(Step):
    """Directed sparsification of the last layer.

    The paper drops 70 % of the weights on ImageNet and 90 % on CIFAR; OpenOOD drops 90 % everywhere.
    """

    title: ClassVar[str] = "DICE (2022)"
    paper: ClassVar[str] = (
        "Sun, Li: DICE: Leveraging Sparsification for Out-of-Distribution Detection. "
        "ECCV 2022, arXiv:2111.09805"
    )
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = (W ⊙ M) h + b, "
        "M = 1[V > p-th percentile of V], V_cj = W_cj · E_train[h_j]"
    )
    reading: ClassVar[str] = (
        "The energy through the weights that are kept, with its sign changed, in nats, unbounded: high = "
        "what usually speaks for some class is missing; comparable within one network and p only."
    )

    p: float = Field(
        default=_IMAGENET,
        ge=0,
        lt=100,
        description="percentage of the last layer's weights that is dropped, lowest contributions V first",
    )

    def statistics(self) -> tuple[Classes]:
        """The mean feature."""
        return (Classes(),)

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether the paper's share for ImageNet is dropped of another network."""
        if self.p != _IMAGENET:
            return ()
        return of_imagenet(f"p = {self.p:g}", train, "The paper drops 90 % on CIFAR.")

    def weigh(self, weight: Float, train: Training) -> Float:
        """The weight (C, D), 0 where the contribution to the mean training feature's logits is low."""
        contribution = weight * train.train[Classes()].mean
        return weight * (contribution > np.percentile(contribution, self.p))
