"""Mahalanobis distances to class means: what `mds`, `rmds`, their `_l2` and the ensemble share.

One eigendecomposition whitens the features at fit time; a score is then one matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.columns import FEATURE, Batch, Float, once
from pipeline.detectors._rank import require_covariance, require_free, varied
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Classes, ClassSums, Moments, Scatter, unit_rows


class Mahalanobis(Detector):
    """Squared distance to the nearest class mean under one covariance; the inverse is a pseudo-inverse."""

    columns: ClassVar[tuple[str, ...]] = (FEATURE,)
    unit: ClassVar[bool] = False
    """Whether features are divided by their L2 norm first."""
    relative: ClassVar[bool] = False
    """Whether the distance to the mean of all training rows, under their covariance, is subtracted."""

    def statistics(self) -> tuple[Classes, Scatter]:
        """Class means and the scatter of all rows."""
        return Classes(unit=self.unit), Scatter(unit=self.unit)

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether there are more rows than dimensions and classes.

        Raises:
            UserError: if there are not.
        """
        require_free(width, rows, classes_of(count))

    def fit(self, train: Training) -> MahalanobisScorer:
        """Whiten.

        Raises:
            UserError: as `whitened`.
        """
        classes, moments = train.train[Classes(unit=self.unit)], train.train[Scatter(unit=self.unit)]
        return whitened(self.name, classes, moments, self.unit, self.relative)


def classes_of(count: Mapping[int, int]) -> int:
    """How many classes have rows, of the numbers of rows by label."""
    return sum(label >= 0 and found > 0 for label, found in count.items())


def whitened(
    name: str, classes: ClassSums, moments: Moments, unit: bool = False, relative: bool = False
) -> MahalanobisScorer:
    """Distances under the covariance within classes of some training rows.

    Args:
        name: of the detector, for the message.
        classes: their sums by class.
        moments: their mean and scatter.
        unit: whether what is scored is divided by its L2 norm first.
        relative: whether the distance to the mean of all is subtracted.

    Raises:
        UserError: if rows have no label, are too few, or hardly vary within classes.
    """
    if classes.unlabelled_count:
        raise UserError(
            f"{name}: the covariance within classes needs labels, got {int(classes.unlabelled_count)} "
            "training rows without one. Give the dataset with role train its labels."
        )
    offset = classes.class_mean - moments.mean
    count = classes.class_count[classes.class_count > 0]
    between = (offset.T * (count / moments.count)) @ offset
    total = float(np.trace(moments.covariance))
    within = moments.spectrum(-between)
    require_covariance(within[0], total, int(moments.count), len(count))
    whitening = whiten(within, total)
    return MahalanobisScorer(
        unit=unit,
        mean=moments.mean,
        whitening=whitening,
        classes=offset @ whitening,
        background=whiten(moments.spectrum(), total) if relative else None,
    )


def whiten(spectrum: tuple[Float, Float], total: float) -> Float:
    """(D, R) matrix A with A Aᵀ the pseudo-inverse of a (D, D) covariance, `total` the variance of all."""
    variance, direction = spectrum
    kept = varied(variance, total)
    whitening: Float = direction[:, kept] / np.sqrt(variance[kept])
    return whitening


@dataclass(frozen=True)
class MahalanobisScorer:
    """Distances in whitened coordinates."""

    unit: bool
    mean: Float
    """(D,) mean of all training rows, the origin of the coordinates."""
    whitening: Float
    """(D, R) for the covariance within classes."""
    classes: Float
    """(K, R) whitened class means."""
    background: Float | None
    """(D, S) whitening for the covariance of all rows, to be subtracted; None if it is not."""

    def __call__(self, batch: Batch) -> Float:
        """Squared distance to the nearest class mean, minus that to the mean of all where it is relative.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64, at least 0 unless it is relative.
        """
        nearest = once(_nearest, batch, self.unit, self.mean, self.whitening, self.classes)
        if self.background is None:
            return nearest
        common = _centred(batch, self.unit, self.mean) @ self.background
        relative: Float = nearest - np.einsum("nr,nr->n", common, common)
        return relative


def _centred(batch: Batch, unit: bool, mean: Float) -> Float:
    """(N, D) features, normalised or not, around a mean."""
    centred: Float = (once(unit_rows, batch) if unit else batch[FEATURE]) - mean
    return centred


def _nearest(batch: Batch, unit: bool, mean: Float, whitening: Float, classes: Float) -> Float:
    """(N,) squared distance to the nearest class mean."""
    own = _centred(batch, unit, mean) @ whitening
    distance = own @ (-2 * classes.T)
    distance += np.einsum("kr,kr->k", classes, classes)
    nearest: Float = np.maximum(distance.min(axis=1) + np.einsum("nr,nr->n", own, own), 0)
    return nearest
