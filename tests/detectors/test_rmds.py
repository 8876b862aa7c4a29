import numpy as np

from pipeline.detectors.rmds import Rmds
from tests import slow


def test_the_score_is_the_distance_relative_to_that_from_all_rows(rows):
    own, background = slow.mahalanobis(rows)
    error = np.abs(rows.score(Rmds()) - (own - background))
    assert (error <= 1e-6 * (own + background)).all()
