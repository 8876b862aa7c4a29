"""What is learned from training rows: mergeable float64 sums, fitted anywhere, merged in order.

Sums over a fixed slicing of the rows, merged in slice order, do not depend on who computed them. A
statistic of one detector alone lies in that detector's file; those here serve several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import FEATURE, LABEL, LOGITS, PREDICTION, Batch, Float
from pipeline.learned.logits import softmax


@dataclass(frozen=True)
class Head:
    """The classifier's last linear layer, and how wide the stages before it are."""

    weight: NDArray[np.float32]
    """(C, D)."""
    bias: NDArray[np.float32]
    """(C,)."""
    stages: tuple[int, ...] = ()
    """Channels of every stage before it, as they lie in a column of pooled maps."""


@dataclass(frozen=True)
class Part:
    """What a statistic holds of some rows: numeric arrays, or numbers as () arrays."""

    merging: ClassVar[int] = 3
    """Times its bytes that merging takes: two parts and what it gives."""

    def merge(self, other: Self) -> Self:
        """What it holds of both sets of rows together; here the sum of every array.

        It may be in the memory of this part, which is not to be used any more then.
        """
        return type(self)(**{name: value + getattr(other, name) for name, value in self.arrays().items()})

    def roomy(self) -> Self:
        """The same in memory that `merge` may write to, where it does: then nothing large is allocated."""
        return self

    def whole(self) -> Part:
        """What is kept of all rows; of some rows it may hold less than that."""
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays by name, to be stored; the constructor takes them back."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Statistic(Generic[P]):
    """A specification of what to learn from training rows; equal ones are computed once."""

    part: ClassVar[type[Part]]
    """What it gives, of all rows."""
    piece: ClassVar[type[Part] | None] = None
    """What it gives of some rows, if that is another: parts are `whole` pieces."""
    version: ClassVar[int] = 1
    """Goes up when the bits of its result change: what is kept of it is then computed again."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the feature table it reads."""
        return (FEATURE,)

    def numbers(self, width: int, classes: int) -> int:
        """Most numbers that it holds, of pairs of columns or of columns by class unless it says otherwise.

        Args:
            width: values that a row of its columns has.
            classes: of the head.
        """
        return width * max(width, classes)

    def after(self) -> tuple[Statistic[Any], ...]:
        """Statistics of all rows it builds on; it is measured in a later pass than they are."""
        return ()

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Part]:
        """A picklable function of one batch, at least one row, that gives a piece; called once per pass.

        Args:
            head: the last layer.
            known: holds at least the statistics of `after`.
        """
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes its result from that of any other statistic of the same rows."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        after = {"after": [each.identity for each in self.after()]} if self.after() else {}
        return {"statistic": name, "version": self.version, **asdict(self), **after}


@dataclass(frozen=True)
class Statistics:
    """Statistics that were computed, by specification."""

    found: Mapping[Statistic[Any], Part] = field(default_factory=dict)

    def __getitem__(self, wanted: Statistic[P]) -> P:
        return cast("P", self.found[wanted])


def compute(
    wanted: Iterable[Statistic[Any]],
    sweep: Callable[[Sequence[Statistic[Any]], Statistics], Iterable[Part]],
) -> Statistics:
    """Statistics and all they build on, in as few passes over the rows as that takes.

    Args:
        wanted: what to compute.
        sweep: one pass; gives the results for some statistics, given those of earlier passes.
    """
    found: dict[Statistic[Any], Part] = {}
    for group in in_passes(wanted):
        found |= zip(group, sweep(group, Statistics(dict(found))), strict=True)
    return Statistics(found)


def columns(wanted: Iterable[Statistic[Any]]) -> set[str]:
    """Columns of the rows that statistics, and those that they build on, read."""
    return {name for group in in_passes(wanted) for statistic in group for name in statistic.columns}


def in_passes(wanted: Iterable[Statistic[Any]]) -> list[list[Statistic[Any]]]:
    """Statistics in groups of which each builds only on earlier ones."""
    number: dict[Statistic[Any], int] = {}

    def place(statistic: Statistic[Any]) -> int:
        earlier = [place(before) for before in statistic.after()]
        return number.setdefault(statistic, 1 + max(earlier, default=-1))

    for statistic in wanted:
        place(statistic)
    groups: list[list[Statistic[Any]]] = [[] for _ in range(1 + max(number.values(), default=-1))]
    for statistic, group in number.items():
        groups[group].append(statistic)
    return groups


def of(batch: Batch, wanted: Iterable[Statistic[Any]], head: Head) -> Statistics:
    """Statistics of rows that are all in memory."""
    return compute(wanted, lambda group, known: [each.measure(head, known)(batch).whole() for each in group])


def normalize(feature: NDArray[Any]) -> Float:
    """Rows of (N, D) divided by their L2 norm, as float64; a zero row stays zero."""
    rows = feature.astype(np.float64, copy=False)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit


def unit_rows(batch: Batch) -> Float:
    """(N, D) the features of a batch, normalised; for `once`."""
    return normalize(batch[FEATURE])


@dataclass(frozen=True)
class Occurring(Part):
    """Sums over rows of the classes that they are of: of many classes some rows have few.

    Merged, it has room for all classes; what is stored are those that occur.
    """

    merging: ClassVar[int] = 2

    classes: NDArray[np.int64]
    """(K,) ascending."""
    count: NDArray[np.int64]
    """(K,) rows of each."""
    total: Float
    """(K, W) sum over the rows of each."""
    known: NDArray[np.int64]
    """() C, classes that there are."""

    @classmethod
    def of(cls, rows: NDArray[Any], label: NDArray[Any], known: int, **more: NDArray[Any]) -> Self:
        """Sums of rows (N, W) by label (N,) in [0, C).

        Args:
            rows: what is summed.
            label: of each row.
            known: C.
            more: what else it holds.
        """
        order = np.argsort(label, kind="stable")
        classes, starts, count = np.unique(label[order], return_index=True, return_counts=True)
        total = np.empty((len(classes), rows.shape[1]))
        for place, own in zip(total, np.split(order, starts[1:]), strict=False):  # one stays in the cache
            rows[own].astype(np.float64).sum(axis=0, out=place)
        return cls(
            classes=classes.astype(np.int64), count=count, total=total, known=np.asarray(known), **more
        )

    def merge(self, other: Self) -> Self:
        """Sums of both sets of rows."""
        both = self if len(self.classes) == self.known else self.roomy()
        both.count[other.classes] += other.count
        for place, more in zip(other.classes, other.total, strict=True):  # a copy of all would be large
            both.total[place] += more
        return both

    def roomy(self) -> Self:
        """With all classes."""
        count, total = np.zeros(self.known, np.int64), np.zeros((self.known, self.total.shape[1]))
        count[self.classes], total[self.classes] = self.count, self.total
        return replace(self, classes=np.arange(len(count)), count=count, total=total)

    def dense(self) -> tuple[NDArray[np.int64], Float]:
        """Count (C,) and sum (C, W) of the rows of every class."""
        full = self if len(self.classes) == self.known else self.roomy()
        return full.count, full.total

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays, of the classes that occur."""
        there = self.count > 0
        rows = {} if there.all() else {"classes": self.classes, "count": self.count, "total": self.total}
        return super().arrays() | {name: value[there] for name, value in rows.items()}


@dataclass(frozen=True)
class Labelled(Occurring):
    """The same, and the sum of the rows without a label."""

    unlabelled_count: NDArray[np.int64]
    """() rows without a label."""
    unlabelled_sum: Float
    """(W,) their sum."""

    def merge(self, other: Self) -> Self:
        """Sums of both sets of rows."""
        return replace(
            super().merge(other),
            unlabelled_count=self.unlabelled_count + other.unlabelled_count,
            unlabelled_sum=self.unlabelled_sum + other.unlabelled_sum,
        )

    def whole(self) -> ClassSums:
        """With all classes."""
        return ClassSums(*self.dense(), self.unlabelled_count, self.unlabelled_sum)


@dataclass(frozen=True)
class ClassSums(Part):
    """Sums over rows, by class."""

    class_count: NDArray[np.int64]
    """(C,) rows of each class, by true label."""
    class_sum: Float
    """(C, D) sum of the features of each class."""
    unlabelled_count: NDArray[np.int64]
    """() rows without a label."""
    unlabelled_sum: Float
    """(D,) sum of the features of rows without a label."""

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.class_count.sum()) + int(self.unlabelled_count)

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


@dataclass(frozen=True)
class Classes(Statistic[ClassSums]):
    """Count and sum of the rows of each class."""

    part: ClassVar[type[Part]] = ClassSums
    piece: ClassVar[type[Part] | None] = Labelled
    version: ClassVar[int] = 2

    column: str = FEATURE
    """What is summed: features, or logits (then D is C)."""
    unit: bool = False
    """Whether each row is divided by its L2 norm first."""
    correct: bool = False
    """Whether only rows that the classifier got right are counted."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What is summed, the class, and whether the classifier got it right."""
        return (self.column, LABEL, *((PREDICTION,) if self.correct else ()))

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Labelled]:
        """Sums of a batch; its labels lie in [-1, C)."""
        return partial(self._of, classes=len(head.bias))

    def _of(self, batch: Batch, classes: int) -> Labelled:
        rows, label = normalize(batch[self.column]) if self.unit else batch[self.column], batch[LABEL]
        if self.correct:
            right = label == batch[PREDICTION]
            rows, label = rows[right], label[right]
        known = label >= 0
        return Labelled.of(
            rows if known.all() else rows[known],
            label[known],
            classes,
            unlabelled_count=np.asarray((~known).sum()),
            unlabelled_sum=rows[~known].astype(np.float64).sum(axis=0),
        )


@dataclass(frozen=True)
class Moments(Part):
    """Count, mean, and scatter around that mean.

    Each part is centred on its own mean and merged by Chan, Golub and LeVeque's formula. A fixed common
    shift would need a pass of its own to be known, and Σ h hᵀ - n μ μᵀ would lose the digits that the
    mean is larger than the spread.
    """

    count: NDArray[np.int64]
    """()."""
    mean: Float
    """(D,)."""
    scatter: Float
    """(D, D) Σ (h - μ)(h - μ)ᵀ."""

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        count = self.count + other.count
        between = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + between * (other.count / count),
            scatter=self.scatter
            + other.scatter
            + np.outer(between, between) * (self.count * (other.count / count)),
        )

    @property
    def covariance(self) -> Float:
        """(D, D) Σ (h - μ)(h - μ)ᵀ / n."""
        covariance: Float = self.scatter / self.count
        return covariance

    def spectrum(self, change: Float | None = None) -> tuple[Float, Float]:
        """Eigenvalues (D,), ascending, and eigenvectors (D, D) of the covariance.

        Args:
            change: (D, D) symmetric, is added to the covariance first.

        Cost:
            4 s for 2048 dimensions, and as much memory as the scatter; once for all who ask for the same.
        """
        key = b"" if change is None else sha256(change.tobytes()).digest()
        if key not in self._spectra:
            values, vectors = np.linalg.eigh(self.covariance if change is None else self.covariance + change)
            self._spectra[key] = values, vectors
        return self._spectra[key]

    @cached_property
    def _spectra(self) -> dict[bytes, tuple[Float, Float]]:
        """Spectra by hash of the change."""
        return {}


@dataclass(frozen=True)
class Scatter(Statistic[Moments]):
    """Mean and scatter of all features."""

    part: ClassVar[type[Part]] = Moments

    unit: bool = False
    """Whether each row is divided by its L2 norm first."""
    column: str = FEATURE
    """Whose moments these are."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The one column."""
        return (self.column,)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Moments]:
        """Moments of a batch."""
        return self._of

    def _of(self, batch: Batch) -> Moments:
        rows = normalize(batch[self.column]) if self.unit else batch[self.column].astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return Moments(np.asarray(len(rows)), mean, rows.T @ rows)


@dataclass(frozen=True)
class SoftmaxSums(Part):
    """Sums of softmax probabilities, by predicted class."""

    count: NDArray[np.int64]
    """(C,) rows of each predicted class."""
    sum: Float
    """(C, C) sum of the probabilities of the rows of each predicted class."""


@dataclass(frozen=True)
class Predicted(Occurring):
    """Sums of softmax probabilities of the predicted classes that occur."""

    def whole(self) -> SoftmaxSums:
        """With all classes."""
        return SoftmaxSums(*self.dense())


@dataclass(frozen=True)
class Softmax(Statistic[SoftmaxSums]):
    """Count and sum of the softmax probabilities of each predicted class."""

    version: ClassVar[int] = 2
    part: ClassVar[type[Part]] = SoftmaxSums
    piece: ClassVar[type[Part] | None] = Predicted

    @property
    def columns(self) -> tuple[str, ...]:
        """The classifier's output."""
        return (LOGITS, PREDICTION)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Predicted]:
        """Sums of a batch."""
        return self._of

    def _of(self, batch: Batch) -> Predicted:
        probability = softmax(batch[LOGITS])
        return Predicted.of(probability, batch[PREDICTION], probability.shape[1])
