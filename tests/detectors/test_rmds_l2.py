import numpy as np

from pipeline.detectors.rmds_l2 import RmdsL2
from tests import slow


def test_the_score_is_the_distance_relative_to_that_from_all_rows(rows):
    own, background = slow.mahalanobis(rows, unit=True)
    error = np.abs(rows.score(RmdsL2()) - (own - background))
    assert (error <= 1e-6 * (own + background)).all()
