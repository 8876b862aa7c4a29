"""Which rows of a dataset are kept: `include_labels`, then `limit_per_class`, then `limit`.

A sample takes the rows whose keys have the smallest keyed hashes. It is uniform, the same on every machine
and in any order of the rows, and a smaller sample is part of a larger one of the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import Dataset
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.labels import Classes

Named = Callable[[Dataset], "Classes"]


def wanted(dataset: Dataset) -> bool:
    """Whether a dataset has filters."""
    return sampled(dataset) or dataset.include_labels is not None


def sampled(dataset: Dataset) -> bool:
    """Whether a seed decides which images a dataset has."""
    return dataset.limit is not None or dataset.limit_per_class is not None


def kept(dataset: Dataset, path: str, seed: int, classes: Named | None) -> NDArray[np.bool_]:
    """Which rows of a manifest the filters keep; a row of several accepted labels samples as of the first.

    Args:
        dataset: with the filters.
        path: the manifest of all its rows.
        seed: of the samples.
        classes: gives the meaning of class names, where the format has any.

    Returns:
        (rows,) bool.

    Raises:
        UserError: a class name that has no index.
    """
    included = _included(dataset, classes)
    ranks, labels, kept = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["key", "label", "accepted"]):
            keys, found, several = (batch[name].to_pylist() for name in ("key", "label", "accepted"))
            ranks.append(np.array([_rank(key, seed) for key in keys], np.uint64))
            labels.append(np.array(found, np.int32))
            own = [accepted or [label] for label, accepted in zip(found, several, strict=True)]
            kept.append(np.array([included is None or not included.isdisjoint(some) for some in own]))
    included_rows = np.flatnonzero(np.concatenate(kept))
    rows = _sampled(dataset, included_rows, np.concatenate(ranks), np.concatenate(labels))
    mask = np.zeros(sum(map(len, kept)), np.bool_)
    mask[rows] = True
    return mask


def _included(dataset: Dataset, classes: Named | None) -> set[int] | None:
    """The class indices that `include_labels` names."""
    if dataset.include_labels is None:
        return None
    where = f"datasets.{dataset.name}.include_labels"
    names = [name for name in dataset.include_labels if isinstance(name, str)]
    if names and classes is None:
        raise UserError(
            f"{where}: got {names[0]!r}, but classes of the format {dataset.format!r} have no names. "
            "Give their indices."
        )
    of = classes(dataset).of if names and classes is not None else lambda name, _: int(name)
    return {name if isinstance(name, int) else of(name, where) for name in dataset.include_labels}


def _sampled(
    dataset: Dataset, rows: NDArray[np.int64], ranks: NDArray[np.uint64], labels: NDArray[np.int32]
) -> NDArray[np.int64]:
    """The rows that the samples keep, in any order."""
    if dataset.limit_per_class is not None:
        rows = rows[np.lexsort((ranks[rows], labels[rows]))]
        _, starts, counts = np.unique(labels[rows], return_index=True, return_counts=True)
        rows = rows[np.arange(len(rows)) - np.repeat(starts, counts) < dataset.limit_per_class]
    if dataset.limit is not None:
        rows = rows[np.argsort(ranks[rows], kind="stable")[: dataset.limit]]
    return rows


def _rank(key: str, seed: int) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8, key=str(seed).encode()).digest())
