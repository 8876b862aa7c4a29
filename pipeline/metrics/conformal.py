"""Conformal p-values and thresholds: how unusual a score is among those of held-out ID images.

Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005; by class, their Mondrian form. For an
exchangeable new ID image the probability of a p-value of at most a is at most a, for any detector and any
network; Benjamini, Hochberg: Controlling the False Discovery Rate, JRSS B 1995, for many images at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import Float, Mask


def exact(rate: float) -> Fraction:
    """A rate as it is written, 0.1 as 1/10: p-values are fractions of whole numbers that often equal it.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate: got {rate:g}; expected a number between 0 and 1, as 0.05")
    return Fraction(repr(float(rate)))


def needed(rate: float) -> int:
    """How many calibration images a false-alarm rate takes at least: with fewer nothing is ever flagged.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    return math.ceil(1 / exact(rate)) - 1


@dataclass(frozen=True)
class Calibration:
    """Scores of ID images that no detector was fitted to and no metric is computed on."""

    scores: Float
    """(n,), higher = more OOD; those that are not finite do not count."""
    predictions: NDArray[np.integer] | None = None
    """(n,) predicted classes, if images are compared with those of the same predicted class alone."""

    @cached_property
    def groups(self) -> Mapping[int, Float]:
        """The scores in ascending order, by predicted class; all under -1 where classes do not count."""
        there = np.isfinite(self.scores)
        scores, order = self.scores[there], np.argsort(self.scores[there], kind="stable")
        if self.predictions is None:
            return {-1: scores[order]}
        classes = self.predictions[there][order]
        return {int(each): scores[order][classes == each] for each in np.unique(classes)}

    def p_values(self, scores: Float, predictions: NDArray[np.integer] | None = None) -> Float:
        """Share of ID images at least as unusual: (1 + |{calibration scores >= score}|) / (n + 1).

        Args:
            scores: (N,).
            predictions: (N,) predicted classes; read if the calibration is by class.

        Returns:
            (N,) float64 in (0, 1]; NaN where a score is not finite. 1 in a class without calibration images.
        """
        found = np.full(len(scores), np.nan)
        for rows, group in self._matched(scores, predictions):
            above = len(group) - np.searchsorted(group, scores[rows], side="left")
            found[rows] = (1 + above) / (len(group) + 1)
        return found

    def flags(self, rate: float, scores: Float, predictions: NDArray[np.integer] | None = None) -> Mask:
        """(N,) bool, which images are flagged at a false-alarm rate: those whose p-value is at most the rate.

        A score that is not finite is not flagged.

        Raises:
            ValueError: the rate is not between 0 and 1.
        """
        found = np.zeros(len(scores), np.bool_)
        for rows, group in self._matched(scores, predictions):
            found[rows] = scores[rows] > _threshold(group, rate)
        return found

    def thresholds(self, rate: float) -> dict[int, float]:
        """The largest score that is not flagged, by predicted class; under -1 where classes do not count.

        It is a calibration score, the ⌈(n + 1)(1 - rate)⌉-th smallest; +inf where there are too few.

        Raises:
            ValueError: the rate is not between 0 and 1.
        """
        return {each: _threshold(group, rate) for each, group in self.groups.items()}

    def _matched(
        self, scores: Float, predictions: NDArray[np.integer] | None
    ) -> list[tuple[NDArray[np.intp], Float]]:
        """Rows with finite scores, each with the calibration scores they are compared with."""
        there = np.flatnonzero(np.isfinite(scores))
        if self.predictions is None:
            return [(there, self.groups[-1])]
        assert predictions is not None
        classes, nothing = predictions[there], np.empty(0)
        return [(there[classes == each], self.groups.get(int(each), nothing)) for each in np.unique(classes)]


def _threshold(group: Float, rate: float) -> float:
    """Of scores in ascending order."""
    flagged = math.floor(exact(rate) * (len(group) + 1)) - 1
    return float(group[len(group) - 1 - flagged]) if flagged >= 0 else math.inf


def discoveries(p_values: Float, rate: float) -> Mask:
    """Which of many images are OOD, so that of those named on average at most a share `rate` is not.

    Benjamini and Hochberg's procedure: the k smallest p-values, for the largest k with p_(k) <= rate · k / N.

    Args:
        p_values: (N,) in (0, 1]; NaN is never named and does not count in N.
        rate: false-discovery rate in (0, 1).

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    there = np.flatnonzero(~np.isnan(p_values))
    ordered = np.sort(p_values[there])
    above, below = map(float, exact(rate).as_integer_ratio())
    # one rounding, as in p-values: what is equal stays equal
    limits = above * np.arange(1, len(ordered) + 1) / (below * max(len(ordered), 1))
    kept = np.flatnonzero(ordered <= limits)
    found = np.zeros(len(p_values), np.bool_)
    if len(kept):
        found[there] = p_values[there] <= ordered[kept[-1]]
    return found
