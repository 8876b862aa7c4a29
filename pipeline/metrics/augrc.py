"""Area under the generalised risk-coverage curve: how often a wrong class is accepted, over all thresholds.

Reference: Traub et al., "Overcoming Common Flaws in the Evaluation of Selective Classification Systems",
NeurIPS 2024, arXiv 2407.01032, equations 6 and 7.
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Metric
from pipeline.metrics.intervals import Failures


class AUGRC(Metric):
    """Area under P(wrong and accepted) over P(accepted), by trapezoids; the score is minus the confidence.

    So it is P(row one is wrong, and row two scores higher) plus half of the ties, where a row ties with
    itself: (1 - AUROC_f) a (1 - a) + (1 - a)**2 / 2 for an accuracy a and the AUROC_f of wrong rows among
    right ones. In [0, 0.5].
    """

    label = "AUGRC"
    higher_is_better = False
    meaning = (
        "Failure detection on ID images: the mean share of images that are accepted and wrong, over all "
        "thresholds of the score. 0 is best, 0.5 worst."
    )
    needs_labels = True

    def value(self, rows: Counted) -> Float:
        """(...) float64, one division of integers."""
        n = rows.n_inside[..., None]
        from_here = 2 * (n - rows.inside_upto) + rows.inside
        return np.asarray((rows.wrong * from_here).sum(-1) / (2 * rows.n_inside**2))

    def uncertain(self, value: float, rows: Counted) -> Failures:
        """A U-statistic of pairs of rows: what each adds as the one that is wrong, and as the other."""
        n, wrong = rows.n_inside, rows.wrong
        above = (n - rows.inside_upto + rows.inside / 2) / n
        wrong_below = (wrong.cumsum() - wrong / 2) / n
        of_right = wrong_below - 2 * value
        return Failures.of(value, (rows.right, of_right), (wrong, above + of_right), _best, _worst)


def _best(error: float) -> float:
    """The value where every right row scores lower than every wrong one."""
    return error**2 / 2


def _worst(error: float) -> float:
    """The value where every wrong row scores lower than every right one."""
    return float(error - np.square(error) / 2)
