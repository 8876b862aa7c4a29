"""Residual: length of the feature outside the principal subspace of the training features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import FEATURE, Batch, Float, once
from pipeline.detectors._rank import require_directions, require_rows
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Head, Moments, Scatter
from pipeline.parameters import Frozen


class Subspace(Frozen):
    """How many directions the principal subspace has."""

    dim: int | None = Field(
        default=None,
        ge=1,
        description="dimensions D' of the principal subspace, fewer than the feature's D; null = 1000 where "
        "D is 2048 or more, 512 where it is 768 or more, else D / 2",
    )

    def check(self, width: int, stages: Mapping[str, int]) -> None:
        """Whether the feature has dimensions outside the subspace.

        Raises:
            UserError: if it has none.
        """
        _dimensions(self.dim, width)

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether so many rows can vary in more directions than the subspace has.

        Raises:
            UserError: if they cannot.
        """
        require_rows(_dimensions(self.dim, width), width, rows, left=1)


class Residual(Subspace, Detector):
    """ViM's residual alone.

    Implemented is ViM's section on the principal space: the origin is o = -W⁺ b, and the subspace is spanned
    by the eigenvectors of the D' largest eigenvalues of E[(h - o)(h - o)ᵀ].
    """

    title: ClassVar[str] = "Residual (2022)"
    paper: ClassVar[str] = (
        "Wang, Li, Feng, Zhang: ViM: Out-Of-Distribution with Virtual-logit Matching. "
        "CVPR 2022, arXiv:2203.10807"
    )
    formula: ClassVar[str] = (
        "score = ‖Rᵀ(h - o)‖_2, o = -W⁺ b, R the eigenvectors of the D - D' smallest eigenvalues of "
        "E_train[(h - o)(h - o)ᵀ]"
    )
    reading: ClassVar[str] = (
        "At least 0, the length of the part of the feature outside the principal subspace, in the feature's"
        " units: 0 = nothing that training images do not have; comparable within one network and D' only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    def statistics(self) -> tuple[Scatter]:
        """Second moments."""
        return (Scatter(),)

    def fit(self, train: Training) -> ResidualScorer:
        """Find the subspace.

        Raises:
            UserError: if the training features have no direction outside the subspace.
        """
        return required(Head(train.weight, train.bias), train.train[Scatter()], self.dim)


@dataclass(frozen=True)
class ResidualScorer:
    """Length of the feature's part outside the subspace."""

    origin: Float
    """(D,)."""
    outside: Float
    """(D, D - D') orthonormal directions."""

    def __call__(self, batch: Batch) -> Float:
        """Distance from the subspace.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64, at least 0.
        """
        return once(_length, batch, self.origin, self.outside)


def _length(batch: Batch, origin: Float, outside: Float) -> Float:
    """(N,) lengths of the features' parts in some directions."""
    part = (batch[FEATURE] - origin) @ outside
    length: Float = np.sqrt(np.einsum("nd,nd->n", part, part))
    return length


def residual(head: Head, moments: Moments, dim: int | None) -> ResidualScorer:
    """The complement of the principal subspace of `dim` dimensions, seen from -W⁺ b.

    Raises:
        UserError: if it is to be as large as the feature.
    """
    origin, (_, direction) = _seen_from_origin(head, moments)
    return ResidualScorer(origin, direction[:, : len(origin) - _dimensions(dim, len(origin))])


def required(head: Head, moments: Moments, dim: int | None) -> ResidualScorer:
    """The same, if the training features have a residual at all.

    Raises:
        UserError: if they have none: they are too few, or vary in too few directions.
    """
    origin, (variance, _) = _seen_from_origin(head, moments)
    require_directions(_dimensions(dim, len(origin)), variance, int(moments.count), left=1)
    return residual(head, moments, dim)


def _seen_from_origin(head: Head, moments: Moments) -> tuple[Float, tuple[Float, Float]]:
    """The origin -W⁺ b (D,), and the spectrum of E[(h - o)(h - o)ᵀ]."""
    origin = -np.linalg.pinv(head.weight.astype(np.float64)) @ head.bias.astype(np.float64)
    offset = moments.mean - origin
    return origin, moments.spectrum(np.outer(offset, offset))


def _dimensions(dim: int | None, width: int) -> int:
    """Dimensions of the subspace in a feature that has `width`."""
    if dim is None:
        dim = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    if dim >= width:
        raise UserError(f"dim is {dim} but the feature has {width} dimensions; lower dim.")
    return dim
