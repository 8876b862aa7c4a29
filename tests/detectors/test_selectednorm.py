import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import BLOCK_NORM, FEATURE
from pipeline.detectors.base import Jigsaw
from pipeline.detectors.selectednorm import SelectedNorm
from pipeline.errors import UserError
from tests import slow


def slow_selected_norm(rows, block, score):
    scores = []
    for feature, norms in zip(rows.query[FEATURE][:40].tolist(), rows.query[BLOCK_NORM][:40], strict=True):
        scale = float(norms[block]) / math.hypot(*feature)
        logits = [
            math.fsum(w * h * scale for w, h in zip(weight, feature, strict=True)) + bias
            for weight, bias in zip(rows.weight.tolist(), rows.bias.tolist(), strict=True)
        ]
        total = math.fsum(math.exp(z) for z in logits)
        scores.append(-math.log(total) if score == "energy" else slow.msp(logits))
    return scores


@pytest.mark.parametrize("score", ["energy", "msp"])
@pytest.mark.parametrize("block", [0, 2])
def test_the_feature_has_the_length_of_the_named_block(rows, block, score):
    detector = SelectedNorm(block=rows.blocks[block], score=score)
    np.testing.assert_allclose(rows.score(detector)[:40], slow_selected_norm(rows, block, score), rtol=1e-9)


def test_auto_takes_the_block_with_the_highest_ratio(make_rows):
    rows = make_rows()
    found = replace(rows, results={**rows.results, Jigsaw: {"ratio": np.array([1.0, 1.1, 1.3])}})
    np.testing.assert_allclose(
        found.score(SelectedNorm())[:40], slow_selected_norm(found, 2, "energy"), rtol=1e-9
    )


def test_an_unknown_block_is_refused_with_the_closest_name(real):
    detector = SelectedNorm(block="layer3")
    with pytest.raises(UserError, match=r"unknown block 'layer3'\. Did you mean 'layer3\.0'\?"):
        detector.fit(real.training(detector))


def test_a_feature_without_a_direction_has_the_logits_of_the_bias(make_rows):
    rows = make_rows()
    zero = {**rows.query, FEATURE: np.zeros_like(rows.query[FEATURE])}
    expected = -math.log(math.fsum(math.exp(b) for b in rows.bias.tolist()))
    np.testing.assert_allclose(replace(rows, query=zero).score(SelectedNorm()), expected, rtol=1e-12)
