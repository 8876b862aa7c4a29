import math

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from pipeline.columns import FEATURE
from pipeline.detectors.knn import Knn
from pipeline.learned.statistics import normalize


def slow_unit(feature):
    return np.array([[float(x) / math.hypot(*map(float, row)) for x in row] for row in feature])


@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_score_is_the_distance_to_the_kth_nearest_unit_vector(rows, k):
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(slow_unit(rows.train[FEATURE]))
    expected = search.kneighbors(slow_unit(rows.query[FEATURE]))[0][:, k - 1]
    np.testing.assert_allclose(rows.score(Knn(k=k)), expected, rtol=1e-5)


def test_wrongly_classified_training_rows_are_in_the_bank(make_rows):
    rows = make_rows()
    bank = Knn().fit(rows.training(Knn())).bank
    assert bank.keep(rows.train).all()


def test_normalized_rows_have_length_one_and_a_zero_row_stays_zero():
    rows = np.array([[3, 4], [0, 0], [1e-30, 0], [0, -2e18]], dtype=np.float32)
    np.testing.assert_allclose(normalize(rows), [[0.6, 0.8], [0, 0], [1, 0], [0, -1]], rtol=1e-7)
