"""The contract of a metric, and the counts it reads.

A score is higher for rows that look more OOD. Rows are counted at distinct scores, so ties are never split
and nothing depends on the order of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import Float

Counts = NDArray[np.int64]


class Estimate(NamedTuple):
    """A share in [0, 1] and its confidence interval, which holds the value."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Counted:
    """Rows at every score t in ascending order; scores that no row has are allowed."""

    inside: Counts
    """(..., T) ID rows, not all 0."""
    outside: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    """(..., T) OOD rows, not all 0; not read by metrics of ID rows alone."""
    right: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    """(..., T) ID rows that the classifier puts into their class; read by metrics that need labels alone."""

    @cached_property
    def inside_upto(self) -> Counts:
        """(..., T) ID rows <= t."""
        return np.asarray(self.inside.cumsum(-1))

    @cached_property
    def outside_upto(self) -> Counts:
        """(..., T) OOD rows <= t."""
        return np.asarray(self.outside.cumsum(-1))

    @cached_property
    def right_upto(self) -> Counts:
        """(..., T) ID rows <= t that the classifier has right."""
        return np.asarray(self.right.cumsum(-1))

    @property
    def n_inside(self) -> Counts:
        """(...) ID rows."""
        return np.asarray(self.inside_upto[..., -1])

    @property
    def n_outside(self) -> Counts:
        """(...) OOD rows."""
        return np.asarray(self.outside_upto[..., -1])

    @cached_property
    def wrong(self) -> Counts:
        """(..., T) ID rows that the classifier puts into another class."""
        return np.asarray(self.inside - self.right)

    @property
    def above(self) -> Float:
        """(T,) share of the OOD rows > t and half of those at t: DeLong's placements of ID rows."""
        return np.asarray((self.n_outside - self.outside_upto + self.outside / 2) / self.n_outside)

    @property
    def below(self) -> Float:
        """(T,) share of the ID rows < t and half of those at t: the placements of OOD rows."""
        return np.asarray((self.inside_upto - self.inside / 2) / self.n_inside)

    @cached_property
    def from_above(self) -> Counted:
        """The same with OOD in the place of ID, the highest score first."""
        return Counted(self.outside[..., ::-1], self.inside[..., ::-1])


class Metric(ABC):
    """One number of a detector, in [0, 1]."""

    higher_is_better: ClassVar[bool]
    needs_labels: ClassVar[bool] = False
    """Whether it reads which ID rows the classifier has right."""

    @property
    @abstractmethod
    def label(self) -> str:
        """For readers."""

    @property
    @abstractmethod
    def meaning(self) -> str:
        """A sentence or two."""

    @property
    def name(self) -> str:
        """In tables: that of its file unless there are several in one."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def arrow(self) -> str:
        """Where the better values are."""
        return "↑" if self.higher_is_better else "↓"

    @abstractmethod
    def value(self, rows: Counted) -> Float:
        """(...) float64."""

    def varies(self, rows: Counted) -> bool:
        """Whether resamples of (T,) rows tell how the value varies with the draw of the rows."""
        return True

    @abstractmethod
    def uncertain(self, value: float, rows: Counted) -> Any:
        """A value on (T,) rows with what its interval is made of.

        The `mean` of several is their `Estimate`, where they are of OOD sets that share the ID rows.
        """
