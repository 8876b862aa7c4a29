"""Area under the open-set classification rate: right classes kept, over OOD rows accepted.

Reference: Dhamija et al., "Reducing Network Agnostophobia", NeurIPS 2018, arXiv 1811.04110, equation 6.
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Metric
from pipeline.metrics.intervals import Average


class OSCR(Metric):
    """Area under CCR(t) over FPR(t), by trapezoids, for all thresholds t of the score.

    CCR is the share of the ID rows that are accepted (score <= t) and put into their class, FPR the share of
    the OOD rows that are accepted. So it is P(the ID row is right, and OOD > ID) plus half of the ties: at
    most the ID accuracy, and at most the AUROC.
    """

    label = "OSCR"
    higher_is_better = True
    meaning = (
        "Area under the share of ID images that are kept and put into the right class, over the share of OOD "
        "images accepted. At most the ID accuracy."
    )
    needs_labels = True

    def value(self, rows: Counted) -> Float:
        """(...) float64, one division of integers."""
        pairs = 2 * (rows.n_inside * rows.n_outside)
        return np.asarray((rows.outside * (2 * rows.right_upto - rows.right)).sum(-1) / pairs)

    def uncertain(self, value: float, rows: Counted) -> Average:
        """The placements of DeLong et al. 1988, where a wrong ID row is never below an OOD row."""
        below = (rows.right_upto - rows.right / 2) / rows.n_inside
        inside = [(rows.right, rows.above - value), (rows.wrong, np.full(len(rows.wrong), -value))]
        return Average.of(value, inside, (rows.outside, below - value))
