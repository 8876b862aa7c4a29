"""NECO: share of the standardised feature inside the principal subspace of the training features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors._rank import require_directions, require_rows, varied
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.percentiles import Histogram
from pipeline.learned.statistics import Moments, Scatter

_SHARE = 0.9


class Neco(Detector):
    """Neural-collapse score.

    As in the authors' code every dimension is standardised by the training rows before their principal
    directions are found, and the share is multiplied by the largest logit for every network but ResNets. What
    tells these apart here are their features: behind a ReLU none is negative.
    """

    title: ClassVar[str] = "NECO (2024)"
    paper: ClassVar[str] = (
        "Ben Ammar, Belkhir, Popescu, Manzanera, Franchi: NECO: NEural Collapse Based Out-of-distribution "
        "Detection. ICLR 2024, arXiv:2310.06823"
    )
    formula: ClassVar[str] = (
        "score = -‖P n‖_2 / ‖n‖_2, times max_c z_c where features have negative entries, "
        "n_j = (h_j - μ_j) / σ_j, μ, σ mean and standard deviation of the training features, "
        "P the d leading principal directions of their n"
    )
    reading: ClassVar[str] = (
        "From -1 to 0 for features behind a ReLU, the share of the standardised feature inside the "
        "principal subspace with its sign changed: 0 = all of it is outside; times the largest logit, and "
        "so unbounded, for other features."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)
    version: ClassVar[int] = 2

    dim: int | None = Field(
        default=None,
        ge=1,
        description="principal directions d, at most the feature's D; the authors' code has 100. null = as "
        "many as `share` takes",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the variance of n that the directions hold at least; null = 0.9, unless dim is "
        "given",
    )
    standardise: bool = Field(
        default=True,
        description="whether dimensions are divided by their standard deviation; the authors advise against "
        "it for ViTs on CIFAR, whose classes have collapsed to points",
    )
    length: Literal["standardised", "feature"] = Field(
        default="standardised",
        description="what divides: the length of n, or that of h, as the authors do for DeiT and Swin and "
        "wherever nothing is standardised",
    )
    max_logit: bool | None = Field(
        default=None,
        description="whether the share is multiplied by the largest logit; null = if training features have "
        "negative entries",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Neco:
        if self.dim is not None and self.share is not None:
            raise ValueError(f"dim is {self.dim} and share is {self.share}; expected one of the two")
        return self

    def statistics(self) -> tuple[Scatter, Histogram]:
        """The covariance, and whether entries are negative."""
        return Scatter(), Histogram()

    def check(self, width: int, stages: Mapping[str, int]) -> None:
        """Whether the feature has that many directions.

        Raises:
            UserError: if it has fewer.
        """
        if self.dim is not None and self.dim > width:
            raise UserError(f"dim is {self.dim} but the feature has {width} dimensions; lower dim.")

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether so many rows can vary in as many directions as are kept.

        Raises:
            UserError: if they cannot.
        """
        require_rows(self.dim or 1, width, rows, centred=True)

    def fit(self, train: Training) -> NecoScorer:
        """Find the principal directions.

        Raises:
            UserError: if the training features vary in fewer directions than are to be kept, or in none.
        """
        self.check(train.weight.shape[1], train.stages)
        moments = train.train[Scatter()]
        scale = self._scale(moments)
        variance, direction = (
            np.linalg.eigh(moments.covariance / np.outer(scale, scale))
            if self.standardise
            else moments.spectrum()
        )
        held = np.cumsum(np.maximum(variance[::-1], 0))
        reached = 1 + int(np.searchsorted(held, (self.share or _SHARE) * held[-1]))
        dim = self.dim or min(reached, len(held))
        require_directions(dim, variance, int(moments.count))
        signed = bool(train.train[Histogram()].negative)
        return NecoScorer(
            mean=moments.mean,
            scale=scale,
            inside=direction[:, len(held) - dim :],
            of_feature=self.length == "feature" or not self.standardise,
            times_logit=signed if self.max_logit is None else self.max_logit,
        )

    def _scale(self, moments: Moments) -> Float:
        """(D,) what dimensions are divided by; 1 where they do not vary."""
        own = np.diag(moments.covariance)
        vary = varied(own, float(own.sum())) & self.standardise
        return np.sqrt(np.where(vary, own, 1.0))


@dataclass(frozen=True)
class NecoScorer:
    """Share inside the subspace, times the largest logit or not."""

    mean: Float
    """(D,) μ."""
    scale: Float
    """(D,) σ; 1 where a dimension does not vary."""
    inside: Float
    """(D, d) orthonormal directions."""
    of_feature: bool
    """Whether the length of h divides, instead of that of n."""
    times_logit: bool

    def __call__(self, batch: Batch) -> Float:
        """Negative share, times the largest logit where that is asked for; of a zero vector it is 0.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64; in [-1, 0] without the logit, if the length of n divides.
        """
        feature = batch[FEATURE].astype(np.float64, copy=False)
        standardised = (feature - self.mean) / self.scale
        length = np.linalg.norm(feature if self.of_feature else standardised, axis=1)
        inside = np.linalg.norm(standardised @ self.inside, axis=1)
        share = np.divide(inside, length, out=np.zeros_like(length), where=length > 0)
        largest = batch[LOGITS].max(axis=1)
        score: Float = -share * (largest if self.times_logit else 1.0)
        return score
