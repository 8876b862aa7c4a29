"""Area under the ROC curve: P(OOD > ID) + P(OOD = ID) / 2."""

from __future__ import annotations

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Metric
from pipeline.metrics.intervals import Average


class AUROC(Metric):
    """The chance that an OOD row scores higher than an ID row, which is one division of integers."""

    label = "AUROC"
    higher_is_better = True
    meaning = "The chance that an OOD image scores higher than an ID image. 0.5 is guessing."

    def value(self, rows: Counted) -> Float:
        """(...) float64; exact below 2**31 rows on each side."""
        pairs = 2 * (rows.n_inside * rows.n_outside)
        return np.asarray((rows.outside * (2 * rows.inside_upto - rows.inside)).sum(-1) / pairs)

    def uncertain(self, value: float, rows: Counted) -> Average:
        """The placements of DeLong et al. 1988."""
        return Average.of(value, [(rows.inside, rows.above - value)], (rows.outside, rows.below - value))
