"""AdaSCALE: SCALE with a percentile of each image's own, found from how a perturbation moves its feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.columns import FEATURE, Batch, Float
from pipeline.detectors.base import Detector, Perturbed, Samples, Training
from pipeline.learned.logits import logsumexp


class AdaScale(Detector):
    """Scaling that is the stronger the less a small perturbation shifts the largest activations.

    Takes a forward and a backward pass over every image that is scored, and a second forward pass; and the
    same over some ID images, of role id_val where there are any, else of the training images. Which pixels
    move, by how much, and over which entries the sums run is as in the authors' code.
    """

    title: ClassVar[str] = "AdaSCALE (2025)"
    paper: ClassVar[str] = "Regmi: AdaSCALE: Adaptive Scaling for OOD Detection. 2025, arXiv:2503.08023"
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c, z = W h exp(r) + b (A) or (W h + b) r² (L), r = Σ_j h_j⁺ / Σ of the "
        "(100 - p) % largest h_j⁺, p = p_min + (1 - F(Q')) (p_max - p_min), F the ECDF of Q' of ID images, "
        "Q' = λ Σ_j in top k2 % of h |h'_j - h_j| + Σ_j in top k1 % of h h'_j⁺, h' the feature of x + ε "
        "sign(∂z_ŷ/∂x) on the o % of x with the smallest |∂z_ŷ/∂x|"
    )
    reading: ClassVar[str] = (
        "The energy of logits whose scaling is weaker the more a small perturbation shifts the feature, "
        "with its sign changed, in nats, unbounded: high = no class gets much evidence; comparable within "
        "one network and these parameters only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    variant: Literal["A", "L"] = Field(default="A", description="A scales the feature, L the logits")
    p_min: float = Field(default=80.0, ge=0, le=99, description="percentile of the most shifted images")
    p_max: float = Field(default=85.0, ge=0, le=99, description="percentile of the least shifted images")
    k1: float = Field(default=5.0, gt=0, le=100, description="percentage of h whose perturbed value counts")
    k2: float = Field(default=1.0, gt=0, le=100, description="percentage of h whose shift counts")
    weight: float = Field(default=10.0, ge=0, le=1e6, description="λ, of the shift")
    share: float = Field(default=5.0, gt=0, le=100, description="o, percentage of the input that moves")
    step: float = Field(default=0.5, ge=0, le=100, description="ε, in the network's normalised input")
    samples: int = Field(default=1000, ge=1, le=10**6, description="ID images behind F")

    @model_validator(mode="after")
    def _in_order(self) -> AdaScale:
        if self.p_min > self.p_max:
            raise ValueError(f"p_min is {self.p_min} but p_max is {self.p_max}; expected p_min <= p_max")
        return self

    def _extra(self) -> Perturbed:
        return Perturbed(objective="logit", step=self.step, share=self.share / 100)

    def _pass(self) -> Samples:
        return Samples(extra=self._extra(), samples=self.samples)

    def extras(self) -> tuple[Perturbed]:
        """Features of the perturbed images."""
        return (self._extra(),)

    def passes(self) -> tuple[Samples]:
        """Features of some ID images, as they are and perturbed."""
        return (self._pass(),)

    def fit(self, train: Training) -> AdaScaleScorer:
        """Sort the shifts of the ID images."""
        found = train.passes[self._pass()]
        return AdaScaleScorer(
            column=self._extra().column,
            shifts=np.sort(shift(found["feature"], found["extra"], self.k1, self.k2, self.weight)),
            detector=self,
            weight=train.weight.astype(np.float64),
            bias=train.bias.astype(np.float64),
        )


def shift(feature: Float, moved: Float, k1: float, k2: float, weight: float) -> Float:
    """(N,) float64 Q' of features and perturbed features (N, D)."""
    order = np.argsort(-feature, axis=1, kind="stable")
    top1, top2 = (order[:, : max(1, int(feature.shape[1] * k / 100))] for k in (k1, k2))
    shifted = np.take_along_axis(np.abs(moved - feature), top2, axis=1).sum(axis=1)
    remaining = np.take_along_axis(np.maximum(moved, 0), top1, axis=1).sum(axis=1)
    total: Float = weight * shifted + remaining
    return total


@dataclass(frozen=True)
class AdaScaleScorer:
    """Energy after scaling by each row's own factor."""

    column: str
    shifts: Float
    """(n,) Q' of ID images, ascending."""
    detector: AdaScale
    weight: Float
    """(C, D)."""
    bias: Float
    """(C,)."""

    def __call__(self, batch: Batch) -> Float:
        """Negative free energy.

        Args:
            batch: `feature` and the column of the perturbed features, (N, D) float each.

        Returns:
            (N,) float64.
        """
        feature = batch[FEATURE].astype(np.float64, copy=False)
        ratio = self._ratio(feature, batch[self.column].astype(np.float64, copy=False))[:, None]
        if self.detector.variant == "A":
            logits = feature @ self.weight.T * np.exp(ratio) + self.bias
        else:
            logits = (feature @ self.weight.T + self.bias) * ratio**2
        score: Float = -logsumexp(logits)
        return score

    def _ratio(self, feature: Float, moved: Float) -> Float:
        """(N,) r: the sum of the positive entries over that of the largest; 1 where there are none."""
        method, width = self.detector, feature.shape[1]
        quotient = shift(feature, moved, method.k1, method.k2, method.weight)
        below = np.searchsorted(self.shifts, quotient, side="right") / len(self.shifts)
        percentile = method.p_min + (1 - below) * (method.p_max - method.p_min)
        kept = np.maximum(1, width - np.round(width * percentile / 100)).astype(np.int64)
        sums = np.cumsum(-np.sort(-np.maximum(feature, 0), axis=1), axis=1)
        top = np.take_along_axis(sums, kept[:, None] - 1, axis=1)[:, 0]
        ratio: Float = np.divide(sums[:, -1], top, out=np.ones(len(sums)), where=top > 0)
        return ratio
