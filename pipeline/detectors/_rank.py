"""How many directions training features vary in, which limits what a subspace or a covariance may keep.

Beyond that number directions are arbitrary and variances are rounding: scores would be made of neither. One
rule for all detectors: what is asked for and is not there is refused.
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import Float, Mask
from pipeline.errors import UserError

TOLERANCE = 1e-12
"""Directions with less than this share of the total variance of the training features count as having none.

Float32 features resolve no less: a standard deviation of 10⁻⁶ of the features' spread.
"""

_MORE = "give the dataset with role train more images"


def varied(variance: Float, total: float) -> Mask:
    """(D,) bool, which of some eigenvalues (D,) are not 0 beside the total variance."""
    mask: Mask = variance > TOLERANCE * total
    return mask


def require_directions(dim: int, variance: Float, rows: int, left: int = 0) -> None:
    """Whether features vary in as many directions as a subspace keeps.

    Args:
        dim: directions of the subspace.
        variance: (D,) eigenvalues behind it.
        rows: how many they were found in.
        left: directions with variance that have to be left outside.

    Raises:
        UserError: if they do not.
    """
    rank = int(varied(variance, float(variance.sum())).sum())
    _require_rank(dim, left, rank, f"{rows:,} rows were found to vary in {rank} of {len(variance)}")


def require_rows(dim: int, width: int, rows: int, left: int = 0, centred: bool = False) -> None:
    """Whether so many rows can vary in as many directions as a subspace keeps.

    Args:
        dim: directions of the subspace.
        width: dimensions of the feature.
        rows: how many there are at most.
        left: as in `require_directions`.
        centred: whether the rows are seen from their own mean.

    Raises:
        UserError: if they cannot.
    """
    most = min(width, rows - centred)
    _require_rank(dim, left, most, f"{rows:,} rows vary in {most} of {width} at most")


def _require_rank(dim: int, left: int, rank: int, found: str) -> None:
    if dim + left > rank:
        needed = f"more than {dim}" if left else f"{dim}"
        raise UserError(
            f"dim is {dim}, which takes training features that vary in {needed} directions; {found}. "
            f"Lower dim, or {_MORE}."
        )


def require_covariance(variance: Float, total: float, rows: int, means: int) -> None:
    """Whether a covariance around class means can be told from rounding.

    Args:
        variance: (D,) its eigenvalues.
        total: the variance of all rows, around one mean.
        rows: how many there are.
        means: how many classes they have.

    Raises:
        UserError: if there are too few rows, or hardly any variance is left within classes.
    """
    width = len(variance)
    within = float(np.maximum(variance, 0).sum())
    if within <= width * TOLERANCE * total:
        raise UserError(
            f"the variance of the {rows:,} training rows within classes is {within:.1e}, of {total:.1e} in "
            f"total; a share of {width * TOLERANCE:.0e} or less cannot be told from rounding in "
            f"{width} dimensions. The features have collapsed to class means, or the rows are copies."
        )
    require_free(width, rows, means)


def require_free(width: int, rows: int, means: int) -> None:
    """Whether rows are enough for a covariance around class means: more than dimensions and classes together.

    Raises:
        UserError: if they are not.
    """
    if rows - means <= width:
        raise UserError(
            f"a covariance in {width} dimensions takes more rows than dimensions and classes together, got "
            f"{rows:,} training rows of {means:,} classes; {_MORE}."
        )
