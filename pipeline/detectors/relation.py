"""Relation: how strongly an image is related to training images, in feature and in prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import FEATURE, LOGITS, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.learned.logits import probability, softmax
from pipeline.learned.statistics import Head, Part, Statistic, Statistics, normalize, unit_rows

_CHUNK = 1024
"""Training rows per matrix product, so that scoring needs little memory beside the draw itself."""
_AT_ONCE = 256
"""Rows whose probabilities are computed at once, in float64."""


class Relation(Detector):
    """Mean relation to training rows: similarity of the features times agreement of the predictions.

    The paper sums over all training images. Here it is the mean over a seeded draw, so that its size does
    not move the scores: 10,000 rows with 2048 dimensions and 1,000 classes take 122 MB in every worker.
    Weak relations count as none, as in the authors' code.
    """

    title: ClassVar[str] = "Relation (2023)"
    paper: ClassVar[str] = (
        "Kim, Yun, Song: Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier "
        "Data. NeurIPS 2023, arXiv:2301.12321"
    )
    formula: ClassVar[str] = (
        "score = -mean over drawn training rows i of r_i^t 1[r_i > θ], "
        "r_i = max(⟨n(h), n(h_i)⟩, 0) · ⟨p, p_i⟩, n(h) = h / ‖h‖_2, p = softmax(z)"
    )
    reading: ClassVar[str] = (
        "From -1 to 0, the mean relation to training images with its sign changed: 0 = related to none, and"
        " since most of them show other classes even typical images stay far from -1."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, LOGITS)

    power: float = Field(
        default=1.0,
        ge=0.1,
        le=16,
        description="t, the power of a relation; higher favours the strongest ones",
    )
    threshold: float = Field(
        default=0.03, ge=0, lt=1, description="θ, a relation that is not stronger than this counts as 0"
    )
    size: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="how many training rows are drawn, all where there are fewer; every worker holds them",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the draw; the same rows on every machine")

    def statistics(self) -> tuple[Draw]:
        """The drawn rows."""
        return (Draw(self.size, self.seed),)

    def fit(self, train: Training) -> RelationScorer:
        """Nothing but the draw."""
        drawn = train.train[Draw(self.size, self.seed)]
        return RelationScorer(drawn.feature, drawn.probability, self.power, self.threshold)


@dataclass(frozen=True)
class RelationScorer:
    """Mean relation to drawn training rows."""

    feature: NDArray[np.float32]
    """(M, D) unit vectors."""
    probability: NDArray[np.float32]
    """(M, C)."""
    power: float
    threshold: float

    def __call__(self, batch: Batch) -> Float:
        """Negative mean relation; a zero feature is related to none.

        Args:
            batch: `feature` (N, D) float, `logits` (N, C) float.

        Returns:
            (N,) float64 in [-1, 0].
        """
        feature, likely = once(unit_rows, batch), once(probability, batch, 1.0)
        total = np.zeros(len(feature))
        for start in range(0, len(self.feature), _CHUNK):
            rows = slice(start, start + _CHUNK)
            relation = feature @ self.feature[rows].T.astype(np.float64)
            relation *= likely @ self.probability[rows].T.astype(np.float64)
            relation[relation <= self.threshold] = 0  # no probability is negative, only a cosine
            total += (relation**self.power).sum(axis=1)
        score: Float = -total / len(self.feature)
        return score


@dataclass(frozen=True)
class Lowest(Part):
    """The rows with the lowest hashes, lowest first.

    They are the same however the rows are sliced: a row that is not among the lowest of its slice is not
    among the lowest of all.
    """

    merging: ClassVar[int] = 2

    size: NDArray[np.int64]
    """() how many are kept at most."""
    hashed: NDArray[np.uint64]
    """(M,) ascending."""

    def merge(self, other: Self) -> Self:
        """The lowest of both; among equal hashes the earlier rows."""
        kept = np.argsort(np.concatenate([self.hashed, other.hashed]), kind="stable")[: int(self.size)]
        rows = {name: value for name, value in self.arrays().items() if name != "size"}
        joined = partial(_joined, kept=kept, most=int(self.size))
        return replace(self, **{name: joined(value, getattr(other, name)) for name, value in rows.items()})


def _joined(first: NDArray[Any], then: NDArray[Any], kept: NDArray[np.int64], most: int) -> NDArray[Any]:
    """Some rows of two arrays one after the other, those of each in their order; large ones are not copied.

    They stay in the memory of the first array where that begins one with room for them, as ours do: it
    doubles up to half of `most` rows and then has all, of which the system gives no more than are written.
    """
    room, count = first.base, len(first)
    if not (
        isinstance(room, np.ndarray)
        and room.flags.writeable
        and (room.dtype, room.shape[1:], room.ctypes.data)
        == (first.dtype, first.shape[1:], first.ctypes.data)
        and len(room) >= len(kept)
    ):
        rows = 2 * len(kept) if 4 * len(kept) <= most else most
        room = np.empty((rows, *first.shape[1:]), first.dtype)
        room[:count] = first[: len(room)]
    for place in range(len(kept) - 1, -1, -1):  # no row moves to an earlier place: none is lost
        row = kept[place]
        if row != place or row >= count:
            room[place] = room[row] if row < count else then[row - count]
    return room[: len(kept)]


@dataclass(frozen=True)
class Hashes(Statistic[Lowest]):
    """The lowest hashes alone: which rows are drawn, so that no other rows travel between machines."""

    part: ClassVar[type[Part]] = Lowest

    size: int
    seed: int

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Lowest]:
        """Lowest hashes of a batch."""
        return self._of

    def _of(self, batch: Batch) -> Lowest:
        return Lowest(np.asarray(self.size), np.sort(hashes(batch[FEATURE], self.seed))[: self.size])


@dataclass(frozen=True)
class Drawn(Lowest):
    """The rows with the lowest hashes, and what they hold."""

    feature: NDArray[np.float32]
    """(M, D) divided by their L2 norm."""
    probability: NDArray[np.float32]
    """(M, C) softmax probabilities."""


@dataclass(frozen=True)
class Draw(Statistic[Drawn]):
    """A uniform draw without replacement; which rows it takes depends on features and seed alone."""

    part: ClassVar[type[Part]] = Drawn

    size: int
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Feature and the classifier's output."""
        return (FEATURE, LOGITS)

    def numbers(self, width: int, classes: int) -> int:
        """The rows."""
        return self.size * width

    def after(self) -> tuple[Hashes]:
        """The lowest hashes."""
        return (Hashes(self.size, self.seed),)

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], Drawn]:
        """The rows of a batch whose hash is among the lowest of all."""
        return partial(self._of, highest=known[Hashes(self.size, self.seed)].hashed[-1])

    def _of(self, batch: Batch, highest: np.uint64) -> Drawn:
        hashed = hashes(batch[FEATURE], self.seed)
        order = np.argsort(hashed, kind="stable")[: self.size]
        kept = order[hashed[order] <= highest]
        likely = np.empty((len(kept), batch[LOGITS].shape[1]), np.float32)
        for start in range(0, len(kept), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            likely[rows] = softmax(batch[LOGITS][kept[rows]])
        return Drawn(
            size=np.asarray(self.size),
            hashed=hashed[kept],
            feature=normalize(batch[FEATURE][kept]).astype(np.float32),
            probability=likely,
        )


def hashes(feature: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """(N,) a 64-bit hash of every row of (N, D); equal rows share theirs."""
    start = blake2b(digest_size=8, key=seed.to_bytes(4, "little"))

    def hashed(row: NDArray[Any]) -> bytes:
        each = start.copy()
        each.update(row.tobytes())
        return each.digest()

    return np.frombuffer(b"".join(map(hashed, np.ascontiguousarray(feature))), dtype="<u8")
