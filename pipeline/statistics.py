"""Mergeable float64 statistics of feature rows: fitted anywhere, merged in order.

Sums over a fixed slicing of the rows, merged in slice order, do not depend on who computed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import FEATURE, LABEL, PREDICTION, Batch, Float


@dataclass(frozen=True)
class Statistics:
    """Sums over rows, by class."""

    class_count: NDArray[np.int64]
    """(C,) rows of each class, by true label."""
    correct_count: NDArray[np.int64]
    """(C,) rows of each class that the classifier got right."""
    class_sum: Float
    """(C, D) sum of the features of each class."""
    correct_sum: Float
    """(C, D) the same over the rows that the classifier got right."""
    unlabelled_count: int
    """Rows without a label."""
    unlabelled_sum: Float
    """(D,) sum of the features of rows without a label."""

    @classmethod
    def of(cls, batch: Batch, classes: int) -> Statistics:
        """Statistics of one batch.

        Args:
            batch: `feature` (N, D) float, `label` and `prediction` (N,) int.
            classes: number of classes C; labels lie in [-1, C).
        """
        feature = np.asarray(batch[FEATURE], dtype=np.float64)
        label, prediction = batch[LABEL], batch[PREDICTION]
        known = label >= 0
        correct = known & (label == prediction)
        return cls(
            class_count=np.bincount(label[known], minlength=classes),
            correct_count=np.bincount(label[correct], minlength=classes),
            class_sum=_class_sum(feature[known], label[known], classes),
            correct_sum=_class_sum(feature[correct], label[correct], classes),
            unlabelled_count=int((~known).sum()),
            unlabelled_sum=feature[~known].sum(axis=0),
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows together."""
        return Statistics(
            class_count=self.class_count + other.class_count,
            correct_count=self.correct_count + other.correct_count,
            class_sum=self.class_sum + other.class_sum,
            correct_sum=self.correct_sum + other.correct_sum,
            unlabelled_count=self.unlabelled_count + other.unlabelled_count,
            unlabelled_sum=self.unlabelled_sum + other.unlabelled_sum,
        )

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.class_count.sum()) + self.unlabelled_count

    @cached_property
    def mean(self) -> Float:
        """(D,) mean feature of all rows."""
        mean: Float = (self.class_sum.sum(axis=0) + self.unlabelled_sum) / self.count
        return mean

    @cached_property
    def class_mean(self) -> Float:
        """(K, D) mean feature of each class that has rows, in class order."""
        present = self.class_count > 0
        return self.class_sum[present] / self.class_count[present, None]


def _class_sum(feature: Float, label: NDArray[np.int32], classes: int) -> Float:
    """(C, D) sum of the features (N, D) of each class, by label (N,) in [0, C)."""
    total = np.zeros((classes, feature.shape[1]))
    order = np.argsort(label, kind="stable")
    present, starts = np.unique(label[order], return_index=True)
    if len(present):
        total[present] = np.add.reduceat(feature[order], starts, axis=0)
    return total
