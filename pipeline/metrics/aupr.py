"""Average precision (steps, not trapezoids), with ID or with OOD as the positive class.

Depends on the ratio of the sizes of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Counts, Metric
from pipeline.metrics.intervals import Average


@dataclass(frozen=True)
class AUPR(Metric):
    """The mean over positive rows of the precision where they are found."""

    positive: Literal["in", "out"]

    higher_is_better = True

    @property
    def name(self) -> str:
        """aupr_in or aupr_out."""
        return f"aupr_{self.positive}"

    @property
    def _positive(self) -> str:
        return {"in": "ID", "out": "OOD"}[self.positive]

    @property
    def label(self) -> str:
        """For readers."""
        return f"AUPR, {self._positive} positive"

    @property
    def meaning(self) -> str:
        """A sentence or two."""
        return (
            f"Average precision with {self._positive} as the positive class. "
            "Depends on the ratio of ID to OOD images."
        )

    def _ranked(self, rows: Counted) -> Counted:
        """Rows with the positive class as `inside`, most positive first."""
        return rows if self.positive == "in" else rows.from_above

    def value(self, rows: Counted) -> Float:
        """(...) float64."""
        ranked = self._ranked(rows)
        hits, alarms = ranked.inside_upto, ranked.outside_upto
        precision = hits / np.maximum(hits + alarms, 1)
        return np.asarray((ranked.inside * precision).sum(-1) / hits[..., -1])

    def uncertain(self, value: float, rows: Counted) -> Average:
        """The derivatives of the sum over positive rows of hits / (hits + alarms)."""
        ranked = self._ranked(rows)
        of_positive, of_negative = _added(ranked)
        if self.positive == "in":
            return Average.of(value, [(rows.inside, of_positive)], (rows.outside, of_negative))
        positive, negative = of_positive[::-1], of_negative[::-1]
        return Average.of(value, [(rows.inside, negative)], (rows.outside, positive))


def _added(ranked: Counted) -> tuple[Float, Float]:
    """What positive and negative rows add to the average precision; (T,) each."""
    positive: Counts = ranked.inside
    hits, alarms = ranked.inside_upto, ranked.outside_upto
    n_hits, n_alarms, found = hits[-1], alarms[-1], (hits + alarms).astype(np.float64)
    precision = hits / found
    by_hit, by_alarm = (np.cumsum((positive * part / found**2)[::-1])[::-1] for part in (alarms, hits))
    added = precision + by_hit
    lost = -by_alarm * (n_alarms / n_hits)
    return added - (positive * added).sum() / n_hits, lost - (ranked.outside * lost).sum() / n_alarms
