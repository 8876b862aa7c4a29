"""NECO: share of the feature inside the principal subspace of the training features, times MaxLogit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Scatter


class Neco(Detector):
    """Neural-collapse score.

    Implemented is the paper's ratio ‖P h‖ / ‖h‖, multiplied by the largest logit as the paper does for most
    networks, with P the leading eigenvectors of the covariance of the training features, applied to the
    feature as it is. The authors' code standardises every dimension before.
    """

    title: ClassVar[str] = "NECO (2024)"
    paper: ClassVar[str] = (
        "Ben Ammar, Belkhir, Popescu, Manzanera, Franchi: NECO: NEural Collapse Based Out-of-distribution "
        "Detection. ICLR 2024, arXiv:2310.06823"
    )
    formula: ClassVar[str] = (
        "score = -(‖P h‖_2 / ‖h‖_2) · max_c z_c, "
        "P the d leading principal directions of the training features"
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    dim: int | None = Field(
        default=None,
        ge=1,
        description="principal directions d, at most the feature's D; null = 100, but no more than half of D",
    )

    def statistics(self) -> tuple[Scatter]:
        """The covariance."""
        return (Scatter(),)

    def check(self, width: int, stages: Mapping[str, int]) -> None:
        """Whether the feature has that many directions.

        Raises:
            UserError: if it has fewer.
        """
        if self.dim is not None and self.dim > width:
            raise UserError(f"dim is {self.dim} but the feature has {width} dimensions; lower dim.")

    def fit(self, train: Training) -> NecoScorer:
        """Find the principal directions.

        Raises:
            UserError: if there are to be more directions than the feature has.
        """
        width = train.weight.shape[1]
        self.check(width, train.stages)
        dim = max(1, min(100, width // 2)) if self.dim is None else self.dim
        _, direction = train.train[Scatter()].spectrum()
        return NecoScorer(direction[:, width - dim :])


@dataclass(frozen=True)
class NecoScorer:
    """Share inside the subspace, times the largest logit."""

    inside: Float
    """(D, d) orthonormal directions."""

    def __call__(self, batch: Batch) -> Float:
        """Negative share times largest logit; the share of a zero feature is 0.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        feature = np.asarray(batch[FEATURE], dtype=np.float64)
        length = np.linalg.norm(feature, axis=1)
        inside = np.linalg.norm(feature @ self.inside, axis=1)
        share = np.divide(inside, length, out=np.zeros_like(length), where=length > 0)
        score: Float = -share * batch[LOGITS].max(axis=1)
        return score
