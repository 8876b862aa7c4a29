"""TempScale: MSP after temperature scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from pipeline.columns import LABEL, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Training
from pipeline.detectors.msp import MspScorer
from pipeline.learned.logits import softmax
from pipeline.learned.statistics import Head, Part, Statistic, Statistics

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of T: where the classifier gets every row right, the NLL falls all the way to T = 0."""

_POINTS = 16
_AT_ONCE = 128
"""Rows whose logits stay in the cache while they are divided by every temperature."""


class TempScale(Detector):
    """Largest softmax probability at the temperature that calibrates the classifier.

    As in the paper on held-out ID images, those of role id_val. Without any it is the training images, on
    which a classifier is surer: T comes out lower. As `msp` it gives log(1 - p).
    """

    title: ClassVar[str] = "TempScale (2017)"
    paper: ClassVar[str] = (
        "Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks. ICML 2017, arXiv:1706.04599"
    )
    formula: ClassVar[str] = (
        "score = log(1 - max_c softmax(z / T)_c), T = argmin_T -Σ_val log softmax(z / T)_y, 0.05 ≤ T ≤ 20"
    )
    reading: ClassVar[str] = (
        "As msp at the temperature that calibrates the classifier, at most log(1 - 1/C): -3 = a calibrated "
        "confidence of 95 %, on images like those it was calibrated on."
    )
    columns: ClassVar[tuple[str, ...]] = (LOGITS,)
    version: ClassVar[int] = 2

    def calibration(self) -> tuple[Slopes]:
        """The slope of the NLL around its minimum."""
        return (Slopes(refined=True),)

    def fit(self, train: Training) -> MspScorer:
        """Find the temperature."""
        return MspScorer(train.id_val[Slopes(refined=True)].temperature)


@dataclass(frozen=True)
class SlopeSums(Part):
    """Slope of the NLL, which is convex in 1 / T, at some points."""

    inverse: Float
    """(G,) the points 1 / T, ascending."""
    slope: Float
    """(G,) dNLL / d(1 / T), ascending."""

    def merge(self, other: SlopeSums) -> SlopeSums:
        """The slopes over both sets of rows."""
        return replace(self, slope=self.slope + other.slope)

    def around(self) -> tuple[float, float]:
        """The neighbouring points between which the slope changes sign; at an end if it never does."""
        first = int(np.clip(np.searchsorted(self.slope, 0), 1, len(self.slope) - 1))
        return float(self.inverse[first - 1]), float(self.inverse[first])

    @property
    def temperature(self) -> float:
        """T at which the slope is zero, to 6 digits, or the bound that is nearest to it."""
        if self.slope[0] >= 0:
            return float(1 / self.inverse[0])
        if self.slope[-1] <= 0:
            return float(1 / self.inverse[-1])
        from scipy.interpolate import CubicSpline  # takes half a second to import
        from scipy.optimize import brentq

        spline = CubicSpline(self.inverse, self.slope)
        return float(1 / brentq(spline, *self.around(), xtol=1e-12))


@dataclass(frozen=True)
class Slopes(Statistic[SlopeSums]):
    """Slope of the NLL at geometrically spaced temperatures; refined, at those around its zero.

    Two passes with 16 points each leave points 2.7 % apart, and a cubic between them the 6 digits.
    """

    part: ClassVar[type[Part]] = SlopeSums

    refined: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Logits and true class."""
        return (LOGITS, LABEL)

    def numbers(self, width: int, classes: int) -> int:
        """Points and slopes."""
        return 2 * _POINTS

    def after(self) -> tuple[Slopes, ...]:
        """The coarse slopes."""
        return (Slopes(),) if self.refined else ()

    def measure(self, head: Head, known: Statistics) -> Callable[[Batch], SlopeSums]:
        """Slopes over a batch."""
        low, high = known[Slopes()].around() if self.refined else (1 / HOTTEST, 1 / COLDEST)
        return partial(_slopes, inverse=np.geomspace(low, high, _POINTS))


def _slopes(batch: Batch, inverse: Float) -> SlopeSums:
    """Σ (E_softmax(z / T)[z] - z_y) over labelled rows, at every 1 / T."""
    known = batch[LABEL] >= 0
    logits = batch[LOGITS][known].astype(np.float64)
    true = logits[np.arange(len(logits)), batch[LABEL][known]]
    mean = np.empty((len(inverse), len(logits)))
    for start in range(0, len(logits), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        for each, place in zip(inverse, mean, strict=True):
            place[rows] = np.einsum("nc,nc->n", softmax(logits[rows], 1 / each), logits[rows])
    return SlopeSums(inverse, np.stack([(each - true).sum() for each in mean]))
