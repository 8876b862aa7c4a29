from dataclasses import replace

import numpy as np

from pipeline.detectors.base import Dropped
from pipeline.detectors.mcdropout import McDropout


def test_the_score_is_what_the_largest_mean_probability_leaves(rows):
    expected = [sum(sorted(row)[:-1]) for row in rows.query[Dropped(samples=10).column].tolist()]
    np.testing.assert_allclose(rows.score(McDropout()), expected, rtol=1e-12)


def test_images_whose_probability_rounds_to_one_keep_their_order(make_rows):
    mean = np.array([[1, 1e-30], [1, 1e-20], [1, 1e-9]], dtype=np.float32)
    rows = replace(make_rows(), query={Dropped(samples=10).column: mean})
    assert (np.diff(rows.score(McDropout())) > 0).all()


def test_samples_and_seed_choose_the_column(make_rows):
    assert McDropout().extras() == (Dropped(samples=10, seed=0),)
    detector = McDropout(samples=3, seed=8)
    assert detector.extras() == (Dropped(samples=3, seed=8),)
    mean = np.array([[0.25, 0.75], [0.5, 0.5]], dtype=np.float32)
    rows = replace(make_rows(), query={Dropped(samples=3, seed=8).column: mean})
    np.testing.assert_array_equal(rows.score(detector), [0.25, 0.5])
