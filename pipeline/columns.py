"""Names of the columns that travel between the stages, and what they hold.

A batch is a mapping from column name to equally long arrays. Nothing here reads or writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

KEY = "key"
"""string; unique in its dataset: relative path, or array name and row number."""
LABEL = "label"
"""int32; the class index, -1 where it is unknown."""
PREDICTION = "prediction"
"""int32; argmax of the classifier's logits."""
FEATURE = "feature"
"""float32 (D,); input of the classifier's last linear layer."""
LOGITS = "logits"
"""float32 (C,); output of the classifier's last linear layer."""
BLOCK_NORM = "block_norm"
"""float32 (B,); FeatureNorm of each block, in the order the model runs them."""
DIGEST = "digest"
"""binary (16); the first half of the SHA-256 of an image's stored bytes."""
IS_OOD = "is_ood."
"""bool; prefix of one column per detector in the score tables of unlabelled datasets."""
P_VALUE = "p."
"""float64 in (0, 1]; prefix of one column per detector in the score tables of runs with thresholds."""
ERROR = "error"
"""string; why an image could not be read, beside the scores of images that a bundle judges."""
CALIBRATION = "calibration"
"""bool; in the score tables of ID data that are split: thresholds are calibrated on the row, not tested."""

Batch = Mapping[str, NDArray[Any]]
Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

T = TypeVar("T")


class SharedBatch(dict[str, NDArray[Any]]):
    """A batch that goes to several scorers and remembers what they compute by `once`."""

    def __init__(self, columns: Batch) -> None:
        super().__init__(columns)
        self.found: dict[Any, Any] = {}

    def adding(self, columns: Batch) -> SharedBatch:
        """The same batch with more columns for one scorer."""
        more = SharedBatch({**self, **columns})
        more.found = self.found
        return more


def once(function: Callable[..., T], batch: Batch, *given: Any) -> T:
    """What a function makes of a batch: of a `SharedBatch` it is computed once. Not to be written to.

    Args:
        function: of a batch and what else is given; reads no column that one scorer alone finds.
        batch: the rows.
        given: the same object is the same array; other values are compared.
    """
    if not isinstance(batch, SharedBatch):
        return function(batch, *given)
    key = function, *(id(each) if isinstance(each, np.ndarray) else each for each in given)
    if key not in batch.found:
        made = function(batch, *given)
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, np.ndarray):
                each.flags.writeable = False
        batch.found[key] = made, given  # what is held keeps its id
    result: T = batch.found[key][0]
    return result


def padded(values: NDArray[Any], size: int) -> NDArray[Any]:
    """The first axis brought to `size` by repeating the last row; at least one row must be there.

    Convolutions and matrix products give a row the same bits whatever stands beside it, but not whatever
    the number of rows: a fixed shape makes results independent of how rows are cut into parts.
    """
    return values[np.minimum(np.arange(size), len(values) - 1)]
