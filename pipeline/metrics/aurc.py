"""Area under the risk-coverage curve: the error rate of what is accepted, over all shares of accepted rows.

References: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv
1705.08500 (risk and coverage); Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep
Neural Classifiers", ICLR 2019, arXiv 1805.08206, section 2 (the area).
"""

from __future__ import annotations

from math import log

import numpy as np

from pipeline.columns import Float
from pipeline.metrics.base import Counted, Metric
from pipeline.metrics.intervals import Failures


class AURC(Metric):
    """Mean over k = 1 ... n of the error rate of the k rows with the lowest scores.

    Of rows with equal scores, it is the mean over all their orders. Constant scores give the error rate.
    """

    label = "AURC"
    higher_is_better = False
    meaning = (
        "Failure detection on ID images: the error rate of the classifier among images that are accepted, "
        "mean over all shares of accepted images. 0 is best."
    )
    needs_labels = True

    def value(self, rows: Counted) -> Float:
        """(...) float64.

        m rows of one score after k others, with e errors after E others, add e + (E - e k / m) h to the sum
        of the error rates, where h is 1 / (k + 1) + ... + 1 / (k + m).
        """
        upto, wrong = rows.inside_upto, rows.wrong
        before = upto - rows.inside
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, upto.max() + 1))])
        errors_before = wrong.cumsum(-1) - wrong
        at = wrong + (errors_before - wrong * before / np.maximum(rows.inside, 1)) * (
            harmonic[upto] - harmonic[before]
        )
        return np.asarray(np.clip(at.sum(-1) / rows.n_inside, 0, 1))

    def uncertain(self, value: float, rows: Counted) -> Failures:
        """The influence of each row on E[wrong * -log(coverage at its score)], which the mean tends to.

        A wrong row adds -log of the coverage at its score; every row raises the coverage at all higher
        scores, which takes 1 / coverage from what wrong rows add there. Equal scores stand for all orders.
        """
        there = rows.inside > 0
        inside, wrong = rows.inside[there], rows.wrong[there]
        high = inside.cumsum() / rows.n_inside
        low = np.concatenate([[0.0], high[:-1]])
        logs = np.log(high)
        lower = np.concatenate([[0.0], low[1:] * logs[:-1]])
        mean_log = (high * logs - lower) / (high - low) - 1
        share = wrong / inside
        steps = np.concatenate([[0.0], share[1:] * (logs[1:] - logs[:-1])])
        later = steps[::-1].cumsum()[::-1] - steps
        taken = later + share * (logs - mean_log)
        error = wrong.sum() / rows.n_inside
        mean = -(wrong * mean_log).sum() / rows.n_inside
        of_right = error - mean - taken
        right = rows.right[there]
        return Failures.of(value, (right, of_right), (wrong, of_right - mean_log), _best, _worst)


def _best(error: float) -> float:
    """The value where every right row scores lower than every wrong one."""
    return error + (1 - error) * log(1 - error) if error < 1 else 1.0


def _worst(error: float) -> float:
    """The value where every wrong row scores lower than every right one."""
    return error * (1 - log(error)) if error > 0 else 0.0
