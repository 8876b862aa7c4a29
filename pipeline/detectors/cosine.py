"""CosMax: cosine between the feature and the direction of the class that it is closest to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.columns import FEATURE, Batch, Float, once
from pipeline.detectors.base import Detector, Training
from pipeline.errors import UserError
from pipeline.learned.statistics import Classes, normalize, unit_rows


class Cosine(Detector):
    """Largest cosine to a class.

    Two readings: cosine to the mean feature of a class (class typical matching), over all its training rows;
    or to its row of the last layer's weight, as with networks trained on cosines. A class without training
    rows has no mean and is left out.
    """

    title: ClassVar[str] = "CosMax (2023)"
    paper: ClassVar[str] = (
        "Nguyen et al.: A Cosine Similarity-based Method for Out-of-Distribution Detection. "
        "SCIS workshop at ICML 2023, arXiv:2306.14920"
    )
    formula: ClassVar[str] = "score = -max_c ⟨h, v_c⟩ / (‖h‖_2 ‖v_c‖_2), v_c = E_train[h | class c] or W_c"
    reading: ClassVar[str] = (
        "From -1 to 1, the cosine to the closest class direction with its sign changed: -1 = the same "
        "direction, 0 = orthogonal to every class; the length of the feature plays no part."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    direction: Literal["mean", "weight"] = Field(
        default="mean",
        description="v_c is: mean, the mean training feature of the class; weight, its row of the last layer",
    )

    def statistics(self) -> tuple[Classes, ...]:
        """Class means, if they are the directions."""
        return (Classes(),) if self.direction == "mean" else ()

    def fit(self, train: Training) -> CosineScorer:
        """Normalise the class directions.

        Raises:
            UserError: if class means are wanted and no training row has a label.
        """
        if self.direction == "weight":
            return CosineScorer(normalize(train.weight))
        means = train.train[Classes()].class_mean
        if len(means) == 0:
            raise UserError(
                "cosine: class means need labels, got none in the training rows; expected at least one. "
                "Give the dataset with role train its labels, or set direction to weight."
            )
        return CosineScorer(normalize(means))


@dataclass(frozen=True)
class CosineScorer:
    """Largest cosine to a class."""

    directions: Float
    """(K, D) unit vectors of the classes; zero where a class has no direction."""

    def __call__(self, batch: Batch) -> Float:
        """Negative largest cosine.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64 in [-1, 1]; 0 for a feature without a direction, the zero vector.
        """
        score: Float = -(once(unit_rows, batch) @ self.directions.T).max(axis=1)
        return score
