"""Mahalanobis ensemble: the distance to the nearest class mean, summed over stages of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat

from pipeline.columns import FEATURE, Batch, Float
from pipeline.detectors._gaussian import MahalanobisScorer, classes_of, whitened
from pipeline.detectors._rank import require_free
from pipeline.detectors.base import Detector, Pooled, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Classes, Moments, Scatter

_COLUMN = Pooled().column


class MahalanobisEnsemble(Detector):
    """Weighted sum of the Mahalanobis distances of the pooled maps at the end of every stage.

    The paper finds the weights by a regression on OOD data, and moves the image a little along an input
    gradient first; neither is done here. Unless weights are given, every distance is divided by its mean over
    training images to their own class, which is the rank of the covariance.
    """

    title: ClassVar[str] = "Mahalanobis ensemble (2018)"
    paper: ClassVar[str] = (
        "Lee, Lee, Lee, Shin: A Simple Unified Framework for Detecting Out-of-Distribution Samples and "
        "Adversarial Attacks. NeurIPS 2018, arXiv:1807.03888"
    )
    formula: ClassVar[str] = (
        "score = Σ_l α_l min_c (f_l - μ_lc)ᵀ Σ_l⁺ (f_l - μ_lc), f_l the mean over positions of stage l, "
        "Σ_l = (1/N) Σ_c Σ_{i in c} (f_l,i - μ_lc)(f_l,i - μ_lc)ᵀ, α_l = 1 / rank Σ_l"
    )
    reading: ClassVar[str] = (
        "At least 0, a weighted sum of squared distances to class means, with default weights 1 on average "
        "for each stage over training images at their own class: far above the number of stages = OOD."
    )
    columns: ClassVar[tuple[str, ...]] = ()

    weights: tuple[FiniteFloat, ...] | None = Field(
        default=None, description="α, one for each stage from first to last, instead of 1 / rank"
    )

    def extras(self) -> tuple[Pooled]:
        """Pooled maps."""
        return (Pooled(),)

    def statistics(self) -> tuple[Classes, Scatter]:
        """Class means and scatter of the pooled maps."""
        return Classes(column=_COLUMN), Scatter(column=_COLUMN)

    def check(self, width: int, stages: Mapping[str, int]) -> None:
        """Whether there is one weight for each stage.

        Raises:
            UserError: if there is not.
        """
        if self.weights is not None and len(self.weights) != len(stages):
            raise UserError(
                f"weights: {len(self.weights)} given; expected one for each of {', '.join(stages)}."
            )

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether there are more rows than channels of any stage and classes.

        Raises:
            UserError: if there are not.
        """
        for stage, channels in stages.items():
            try:
                require_free(channels, rows, classes_of(count))
            except UserError as error:
                raise UserError(f"{stage}: {error}") from None

    def fit(self, train: Training) -> EnsembleScorer:
        """Whiten every stage.

        Raises:
            UserError: as `whitened` for a stage, or if there is not one weight for each.
        """
        self.check(train.weight.shape[1], train.stages)
        classes, moments = train.train[Classes(column=_COLUMN)], train.train[Scatter(column=_COLUMN)]
        scorers, parts, start = [], [], 0
        for stage, width in train.stages.items():
            part = slice(start, start := start + width)
            own = replace(
                classes,
                class_sum=classes.class_sum[:, part],
                unlabelled_sum=classes.unlabelled_sum[part],
            )
            cut = Moments(moments.count, moments.mean[part], moments.scatter[part, part])
            try:
                scorers.append(whitened(self.name, own, cut))
            except UserError as error:
                raise UserError(f"stage {stage}: {error}") from None
            parts.append(part)
        ranks = [max(scorer.whitening.shape[1], 1) for scorer in scorers]
        weights = [1 / rank for rank in ranks] if self.weights is None else self.weights
        return EnsembleScorer(tuple(scorers), tuple(parts), np.array(weights))


@dataclass(frozen=True)
class EnsembleScorer:
    """Weighted sum of the distances of several stages."""

    scorers: tuple[MahalanobisScorer, ...]
    parts: tuple[slice, ...]
    """Where the maps of each stage lie in the column."""
    weights: Float
    """(L,) α."""

    def __call__(self, batch: Batch) -> Float:
        """Sum of squared distances.

        Args:
            batch: the column of the pooled maps, (N, ΣM) float.

        Returns:
            (N,) float64.
        """
        pooled = batch[_COLUMN]
        stages = zip(self.scorers, self.parts, strict=True)
        distance = np.stack([scorer({FEATURE: pooled[:, part]}) for scorer, part in stages], axis=1)
        score: Float = distance @ self.weights
        return score
