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
    if dim + left > rank:
        needed = f"more than {dim}" if left else f"{dim}"
        raise UserError(
            f"dim is {dim}, which takes training features that vary in {needed} directions; {rows:,} rows "
            f"were found to vary in {rank} of {len(variance)}. Lower dim, or {_MORE}."
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
    width, free = len(variance), rows - means
    within = float(np.maximum(variance, 0).sum())
    if within <= width * TOLERANCE * total:
        raise UserError(
            f"the variance of the {rows:,} training rows within classes is {within:.1e}, of {total:.1e} in "
            f"total; a share of {width * TOLERANCE:.0e} or less cannot be told from rounding in "
            f"{width} dimensions. The features have collapsed to class means, or the rows are copies."
        )
    if int(varied(variance, total).sum()) >= free:
        raise UserError(
            f"a covariance in {width} dimensions takes more rows than dimensions and classes together, got "
            f"{rows:,} training rows of {means:,} classes; {_MORE}."
        )
