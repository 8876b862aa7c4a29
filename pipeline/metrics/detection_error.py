"""The smallest mean of both error rates: 1 - max over t of (P(OOD > t) + P(ID <= t)) / 2."""

from __future__ import annotations

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Metric
from pipeline.metrics.intervals import Minimum


class DetectionError(Metric):
    """Both classes weigh the same, whatever their sizes."""

    label = "Detection error"
    higher_is_better = False
    meaning = "The smallest mean of the two error rates, OOD accepted and ID rejected, over all thresholds."

    def value(self, rows: Counted) -> Float:
        """(...) float64, one division of integers."""
        n_id, n_ood = rows.n_inside[..., None], rows.n_outside[..., None]
        pairs = 2 * (n_id * n_ood)[..., 0]
        told = n_id * (n_ood - rows.outside_upto) + n_ood * rows.inside_upto
        return np.asarray((pairs - told.max(-1)) / pairs)

    def uncertain(self, value: float, rows: Counted) -> Minimum:
        """Both error rates at the best threshold."""
        n_id, n_ood = int(rows.n_inside), int(rows.n_outside)
        best = int((rows.outside_upto * n_id - rows.inside_upto * n_ood).argmin())
        accepted, kept = float(rows.outside_upto[best] / n_ood), float(rows.inside_upto[best] / n_id)
        tied = float(rows.outside[best] / n_ood + rows.inside[best] / n_id) / 2
        return Minimum(value, accepted, n_ood, 1 - kept, n_id, tied)
