"""Ensemble: detectors together, each by how unusual its score is among those of held-out ID images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.columns import CALIBRATION, Batch, Float, Mask
from pipeline.detectors._combination import Combination

Combine = Literal["fisher", "harmonic", "mean", "rank", "majority"]


class Ensemble(Combination):
    """Members' p-values, or ranks, among the calibration images, combined into one score.

    The formulas of p-values take members to be independent, or correct for it; members of one network are
    neither. Their value is only a score here: it is compared with those of the calibration images, like that
    of any detector. Fisher: Statistical Methods for Research Workers, 1932; harmonic mean: Wilson, PNAS 2019.

    A p-value counts calibration scores that are equal to the member's, as if they were more unusual; a rank
    counts half of them, so that a member with many equal scores (as MSP that has rounded to 1) does not vote
    for ID there. Without equal scores `rank` and `mean` give one order.

    The p-value of a member for a calibration image counts the image itself: A / (n + 1) for A scores at least
    as high, which it would have beside a new image that no member finds more unusual. So its ensemble score
    is never below the one that it has among all n + 1 images, whatever the new one is; a new image, which is
    exchangeable with them, then has an ensemble p-value of at most a with probability of at most a.
    """

    title: ClassVar[str] = "Ensemble of detectors (2020)"
    paper: ClassVar[str] = "Vovk, Wang: Combining p-values via averaging. Biometrika 2020, arXiv:1212.4966"
    formula: ClassVar[str] = (
        "p_j = (1 + #{i: s_j(c_i) >= s_j(x)}) / (n + 1) for n calibration images c_i and m members; fisher: "
        "-2 Σ_j log p_j; harmonic: (1/m) Σ_j 1/p_j; mean: 1 - (1/m) Σ_j p_j; rank: (1/m) Σ_j r_j with "
        "r_j = (#{i: s_j(c_i) < s_j(x)} + #{i: s_j(c_i) = s_j(x)}/2 + 1/2) / (n + 1); majority: 1 - p_(k), "
        "the k-th smallest, k = ⌊m/2⌋ + 1"
    )
    reading: ClassVar[str] = (
        "How unusual an image is to the members together among n calibration images, at least 0 for fisher, "
        "from 1 to n + 1 for harmonic and from 0 to 1 for the others: high = unusual to all, or to one of "
        "them very much (fisher, harmonic), or to most (majority)."
    )

    combine: Combine = Field(
        default="fisher",
        description="Fisher's statistic, inverse harmonic or arithmetic mean of the p-values, mean rank, or "
        "the p-value at which a majority of the members flags",
    )

    def calibrated(self, held: Mapping[str, Float]) -> EnsembleScorer:
        """Sort the scores of the calibration images."""
        return EnsembleScorer({label: np.sort(held[label]) for label in self.members}, self.combine)


@dataclass(frozen=True)
class EnsembleScorer:
    """Combined p-values or ranks."""

    held: Mapping[str, Float]
    """(n,) scores of the calibration images, lowest first, by member."""
    combine: Combine

    def __call__(self, batch: Batch) -> Float:
        """Combine the members.

        Args:
            batch: (N,) scores of each member, NaN where there is none, and `calibration` (N,) bool.

        Returns:
            (N,) float64, NaN where a member has none.
        """
        own = batch[CALIBRATION]
        values = np.stack([self._values(batch[label], held, own) for label, held in self.held.items()])
        lost = np.any([np.isnan(batch[label]) for label in self.held], axis=0)
        return np.where(lost, np.nan, self._combined(values))

    def _values(self, scores: Float, held: Float, own: Mask) -> Float:
        """(N,) p-values of a member, or ranks."""
        below, at_most = (np.searchsorted(held, scores, side) for side in ("left", "right"))
        if self.combine == "rank":
            return (below / 2 + at_most / 2 + np.where(own, 1.0, 0.5)) / (len(held) + 1)
        return (len(held) - below + np.where(own, 0.0, 1.0)) / (len(held) + 1)

    def _combined(self, values: Float) -> Float:
        """(N,) of (m, N)."""
        found: Float
        match self.combine:
            case "fisher":
                found = -2 * np.log(np.maximum(values, _LEAST)).sum(axis=0)
            case "harmonic":
                found = (1 / np.maximum(values, _LEAST)).mean(axis=0)
            case "mean":
                found = 1 - values.mean(axis=0)
            case "rank":
                found = values.mean(axis=0)
            case "majority":
                found = 1 - np.sort(values, axis=0)[len(values) // 2]
        return found


_LEAST = 1e-12
"""Below every p-value; for rows whose score is lost, which have none."""
