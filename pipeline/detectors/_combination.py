"""Detectors of the scores of other detectors, rather than of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from pipeline.columns import Float
from pipeline.detectors.base import Detector, Scorer


class Combination(Detector):
    """What several detectors of a run say together; it costs no pass over features.

    It is fitted by `calibrated`. Its scorer finds the scores of each member in a column of the member's
    label, NaN where there is none, and in the column `calibration` which rows it was calibrated on.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    members: tuple[str, ...] = Field(
        default=(), description="labels of two detectors of the run or more, whose scores are combined"
    )

    def calibrated(self, held: Mapping[str, Float]) -> Scorer:
        """Fit to scores of held-out ID images.

        Args:
            held: by member: (n,) finite scores, of the same images in the same order.
        """
        raise NotImplementedError
