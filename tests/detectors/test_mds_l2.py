from dataclasses import replace

import numpy as np

from pipeline.columns import FEATURE
from pipeline.detectors.mds_l2 import MdsL2
from tests import slow


def test_the_score_is_the_distance_of_unit_features(rows):
    np.testing.assert_allclose(rows.score(MdsL2()), slow.mahalanobis(rows, unit=True)[0], rtol=1e-6)


def test_the_length_of_a_feature_does_not_matter(make_rows):
    rows = make_rows()
    longer = replace(rows, query={**rows.query, FEATURE: rows.query[FEATURE] * 8})
    np.testing.assert_allclose(longer.score(MdsL2()), rows.score(MdsL2()), rtol=1e-9)
