"""ViM: energy against a virtual logit made of the feature's residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import FEATURE, LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.detectors.residual import Residual, ResidualScorer, Subspace, required, residual
from pipeline.learned.logits import evidence
from pipeline.learned.statistics import Head, Part, Scatter, Statistic, Statistics


class Vim(Subspace, Detector):
    """Virtual-logit matching.

    Implemented is the paper's score without its last, monotone step (the softmax over C + 1 logits), as in
    the authors' code: the virtual logit minus the energy of the others.
    """

    title: ClassVar[str] = "ViM (2022)"
    paper: ClassVar[str] = Residual.paper
    formula: ClassVar[str] = (
        "score = α ‖Rᵀ(h - o)‖_2 - log Σ_c exp z_c, o = -W⁺ b, R the eigenvectors of the D - D' smallest "
        "eigenvalues of E_train[(h - o)(h - o)ᵀ], α = E_train[max_c z_c] / E_train[‖Rᵀ(h - o)‖_2]"
    )
    reading: ClassVar[str] = (
        "The virtual logit of what the principal subspace leaves of the feature minus the log-sum-exp of "
        "the others, in units of logits, unbounded: positive = the virtual class gets more evidence than "
        "all classes together."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    def statistics(self) -> tuple[Scatter, Match]:
        """Second moments, and what scales the residual to the logits."""
        return Scatter(), Match(self.dim)

    def fit(self, train: Training) -> VimScorer:
        """Find the subspace and match the scales.

        Raises:
            UserError: if the training features have no direction outside the subspace.
        """
        head = Head(train.weight, train.bias)
        return VimScorer(
            required(head, train.train[Scatter()], self.dim), train.train[Match(self.dim)].factor
        )


@dataclass(frozen=True)
class VimScorer:
    """Virtual logit minus energy."""

    residual: ResidualScorer
    factor: float
    """α."""

    def __call__(self, batch: Batch) -> Float:
        """Virtual logit against the others.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64.
        """
        return self.factor * self.residual(batch) - once(evidence, batch, 1.0)


@dataclass(frozen=True)
class Sizes(Part):
    """Sums of what α compares."""

    largest_logit: Float
    """() Σ max_c z_c."""
    residual: Float
    """() Σ ‖Rᵀ(h - o)‖_2."""

    @property
    def factor(self) -> float:
        """α; 0 where no training row has a residual."""
        return float(self.largest_logit / self.residual) if self.residual > 0 else 0.0


@dataclass(frozen=True)
class Match(Statistic[Sizes]):
    """Sizes of largest logit and residual."""

    part: ClassVar[type[Part]] = Sizes

    dim: int | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Feature and logits."""
        return (FEATURE, LOGITS)

    def numbers(self, width: int, classes: int) -> int:
        """Two sums."""
        return 2

    def after(self) -> tuple[Scatter]:
        """The moments behind the subspace."""
        return (Scatter(),)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Sizes]:
        """Sums of a batch."""
        return _Matching(residual(head, known[Scatter()], self.dim))


@dataclass(frozen=True)
class _Matching:
    residual: ResidualScorer

    def __call__(self, batch: Batch) -> Sizes:
        largest = batch[LOGITS].max(axis=1).sum(dtype=np.float64)
        return Sizes(np.asarray(largest), np.asarray(self.residual(batch).sum()))
