from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.columns import FEATURE
from pipeline.detectors.base import Perturbed
from pipeline.detectors.msp import Msp
from pipeline.detectors.odin import Odin
from tests import slow
from tests.detectors.conftest import QUICKSTART, network


@pytest.mark.parametrize("temperature", [0.5, 1, 1000])
def test_the_score_is_the_msp_of_the_moved_image(rows, temperature):
    detector = Odin(temperature=temperature)
    features = rows.query[Odin().extras()[0].column][:60]
    query = {detector.extras()[0].column: features}
    expected = [slow.msp(slow.logits(rows, feature), temperature) for feature in features.tolist()]
    np.testing.assert_allclose(replace(rows, query=query).score(detector), expected, rtol=1e-9)


def test_an_image_that_does_not_move_keeps_its_msp(rows):
    detector = Odin(noise=0, temperature=3)
    query = {**rows.query, detector.extras()[0].column: rows.query[FEATURE]}
    score = replace(rows, query=query).score(detector)
    np.testing.assert_allclose(score, rows.score(Msp(temperature=3)), rtol=1e-5)  # logits are float32 there


def test_the_image_moves_by_the_noise_in_pixel_values():
    expected = Perturbed(objective="log_softmax", step=0.0014, temperature=1000, pixels=True)
    assert Odin().extras() == (expected,)
    other = Odin(noise=0.01, temperature=2).extras()[0]
    assert (other.step, other.temperature) == (0.01, 2)


def test_the_whole_method_on_one_image_at_a_time(real):
    model, expected = network().requires_grad_(False), []
    pixels = np.load(QUICKSTART / "images.npz")["id_test_x"][:8]
    for image in pixels:
        x = ((torch.tensor(image[None, None]) / 255 - 0.2860) / 0.3530).requires_grad_()
        logits = model(x) / 1000
        torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
        step = 0.0014 / 0.3530 * x.grad.sign()
        expected.append(slow.msp(model(x.detach() - step)[0].tolist(), 1000))
    # At this temperature all probabilities are 1 / 10 and a little: what is compared is that little, of which
    # float32 features leave five digits.
    even = np.log(0.9)
    np.testing.assert_allclose(real.score(Odin())[:8] - even, np.array(expected) - even, rtol=1e-4)
