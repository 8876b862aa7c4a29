import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import BLOCK_NORM
from pipeline.detectors.base import Jigsaw
from pipeline.detectors.featurenorm import FeatureNorm
from pipeline.errors import UserError


def with_ratio(rows, ratio):
    return replace(rows, results={**rows.results, Jigsaw: {"ratio": np.array(ratio)}})


def chosen_block(rows, ratio):
    detector = FeatureNorm()
    return detector.fit(with_ratio(rows, ratio).training(detector)).block


@pytest.mark.parametrize("block", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"])
def test_the_score_is_the_negative_mean_channel_norm_of_the_named_block(real, real_maps, block):
    expected = []
    for image in real_maps[block]:
        norms = [math.sqrt(math.fsum(max(float(x), 0) ** 2 for x in channel.ravel())) for channel in image]
        expected.append(-math.fsum(norms) / len(norms))
    np.testing.assert_allclose(real.score(FeatureNorm(block=block))[:3], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "best"),
    [
        ([1.0, 1.2, 1.1], 1),
        ([1.3, 1.2, 1.1], 0),
        ([1.0, 1.2, 1.2], 1),
        ([np.nan, 0.9, 0.95], 2),
        ([0.8, np.inf, 0.7], 0),
    ],
)
def test_auto_takes_the_first_block_with_the_highest_finite_ratio(make_rows, ratio, best):
    rows = with_ratio(make_rows(), ratio)
    np.testing.assert_array_equal(
        rows.score(FeatureNorm()), -rows.query[BLOCK_NORM][:, best].astype(np.float64)
    )


def test_that_no_block_prefers_images_to_jigsaws_is_told(make_rows):
    for ratio, told in (([0.9, 0.95], 1), ([0.9, 1.0], 0), ([np.nan, 0.4], 1)):
        rows = with_ratio(make_rows(), ratio)
        found = FeatureNorm().notices(rows.training(FeatureNorm()))
        assert len(found) == told
        assert all(f"the best NormRatio is {np.nanmax(ratio):.3f}" in text for text in found)
    named = FeatureNorm(block=rows.training(FeatureNorm()).blocks[0])
    assert named.notices(rows.training(named)) == ()


def test_auto_without_any_ratio_is_an_error(make_rows):
    with pytest.raises(UserError, match="no block has a finite NormRatio"):
        chosen_block(make_rows(), [np.nan, np.nan, np.nan])


def test_auto_for_a_model_without_blocks_is_an_error(make_rows):
    with pytest.raises(UserError, match=r"check model\.blocks"):
        chosen_block(replace(make_rows(), blocks=()), [])


def test_an_unknown_block_is_refused_with_the_closest_name(real):
    detector = FeatureNorm(block="layer3")
    with pytest.raises(UserError, match=r"unknown block 'layer3'\. Did you mean 'layer3\.0'\?"):
        detector.fit(real.training(detector))


def test_only_auto_asks_for_the_jigsaw_pass():
    assert FeatureNorm(samples=50, grid=4).passes() == (Jigsaw(samples=50, grid=4),)
    assert FeatureNorm(block="layer4.0").passes() == ()
