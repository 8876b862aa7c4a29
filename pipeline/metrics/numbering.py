"""Whether labels are numbered as the network numbers its classes.

A network that is right and labels in another order give an accuracy near chance, and silently wrong
statistics per class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BETTER = 0.1
"""Gain in accuracy of another numbering that is told."""

FEWEST = 20
"""Labelled images below which nothing is said."""

_UNLIKELY = 1e-3
_NAMED = 3


@dataclass(frozen=True)
class Numbering:
    """What is suspicious about labels."""

    images: int
    accuracy: float
    better: float | None
    """Accuracy if classes were numbered otherwise; None if no other numbering is known."""
    moved: tuple[tuple[int, int], ...] = ()
    """Labels, and the classes that the network gives these images instead."""

    def __str__(self) -> str:
        said = f"the network is right on {self.accuracy:.2%} of {self.images:,} labelled images"
        if self.better is None:
            return f"{said}, which is what guessing gives. Check weights, transform, and the order of labels"
        some = ", ".join(f"{label} as {given}" for label, given in self.moved[:_NAMED])
        more = f" and {len(self.moved) - _NAMED} more" if len(self.moved) > _NAMED else ""
        return (
            f"{said}, and would be on {self.better:.2%} if its classes were numbered otherwise: it knows "
            f"label {some}{more}. The order of labels is not that of the network"
        )


def suspicious(labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> Numbering | None:
    """What is wrong with the order of labels, or with the network; None if nothing seems to be.

    The best one-to-one numbering is found on every other image of a class and judged on the rest, so that few
    images per class do not find an order in noise.

    Args:
        labels: (N,) given classes; negative ones are no label.
        predictions: (N,) classes by the network, in [0, classes).
        classes: of the network.
    """
    from scipy.special import bdtr

    known = (labels >= 0) & (labels < classes)
    labels, predictions = labels[known], predictions[known]
    count = len(labels)
    if count < FEWEST:
        return None
    right = int((labels == predictions).sum())
    order = np.argsort(labels, kind="stable")
    labels, predictions = labels[order], predictions[order]
    numbered = _matched(labels[::2], predictions[::2], classes)
    judged = labels[1::2], predictions[1::2]
    gain = np.mean(numbered[judged[0]] == judged[1]) - np.mean(judged[0] == judged[1])
    if gain > BETTER:
        numbered = _matched(labels, predictions, classes)
        moved = [
            (int(label), int(numbered[label])) for label in np.unique(labels) if numbered[label] != label
        ]
        return Numbering(count, right / count, float(np.mean(numbered[labels] == predictions)), tuple(moved))
    if classes > 1 and (not right or bdtr(right - 1, count, 1 / classes) < 1 - _UNLIKELY):
        return Numbering(count, right / count, None)
    return None


def _matched(labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """The class of the network for each label, one to one, with which most images agree."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    identity = np.arange(classes)
    pairs = np.concatenate([labels, identity]), np.concatenate([predictions, identity])
    weight = np.concatenate([np.full(len(labels), 2.0 * classes), np.ones(classes)])  # ties: as they are
    agreement = coo_array((weight, pairs), shape=(classes, classes)).tocsr()
    row, column = min_weight_full_bipartite_matching(agreement, maximize=True)
    matched = np.empty(classes, np.int64)
    matched[row] = column
    return matched
