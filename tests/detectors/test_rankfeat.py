from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.detectors.base import RankReduced
from pipeline.detectors.rankfeat import RankFeat
from tests import slow
from tests.detectors.conftest import QUICKSTART, network


def columns(rows, *blocks):
    return [rows.query[RankReduced(block=block).column][:60].tolist() for block in blocks]


@pytest.mark.parametrize("temperature", [0.5, 1, 4])
def test_the_score_is_the_energy_of_the_mean_logits(rows, temperature):
    expected = []
    for pair in zip(*columns(rows, "early", "last"), strict=True):
        early, last = (slow.logits(rows, feature) for feature in pair)
        mean = [(a + b) / 2 for a, b in zip(early, last, strict=True)]
        expected.append(temperature * slow.energy([z / temperature for z in mean]))
    score = rows.score(RankFeat(temperature=temperature))[:60]
    np.testing.assert_allclose(score, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", ["early", "last"])
def test_one_block_is_enough(rows, block):
    expected = [slow.energy(slow.logits(rows, feature)) for feature in columns(rows, block)[0]]
    np.testing.assert_allclose(rows.score(RankFeat(blocks=(block,)))[:60], expected, rtol=1e-9)


def test_named_blocks_are_taken(make_rows):
    rows, detector = make_rows(), RankFeat(blocks=("a", "b", "c"))
    rng = np.random.default_rng(5)
    query = {RankReduced(block=name).column: rng.normal(size=(4, 16)).astype(np.float32) for name in "abc"}
    features = [column.astype(np.float64) for column in query.values()]
    expected = [slow.energy(slow.logits(rows, feature)) for feature in (sum(features) / 3).tolist()]
    np.testing.assert_allclose(replace(rows, query=query).score(detector), expected, rtol=1e-9)


def test_by_default_the_last_two_stages_are_reduced_at_temperature_one():
    assert RankFeat().extras() == (RankReduced(block="early"), RankReduced(block="last"))
    assert RankFeat().temperature == 1


def test_the_whole_method_on_one_image_at_a_time(real):
    model, expected = network().requires_grad_(False), []

    def reduced(maps):
        u, s, vh = torch.linalg.svd(maps[0].flatten(1), full_matrices=False)
        return maps - (s[0] * torch.outer(u[:, 0], vh[0])).view(maps.shape)

    for image in np.load(QUICKSTART / "images.npz")["id_test_x"][:8]:
        x = (torch.tensor(image[None, None]) / 255 - 0.2860) / 0.3530
        third = model.layer3(model.layer2(model.layer1(model.relu(model.bn1(model.conv1(x))))))
        both = [model.layer4(reduced(third)), reduced(model.layer4(third))]
        logits = sum(model.fc(maps.mean(dim=(2, 3)))[0] for maps in both) / 2
        expected.append(-logits.logsumexp(dim=0).item())
    np.testing.assert_allclose(real.score(RankFeat())[:8], expected, rtol=1e-4)  # a float32 decomposition


def test_a_block_that_is_named_twice_is_refused():
    with pytest.raises(ValidationError, match="last, last: one is named twice"):
        RankFeat(blocks=("last", "last"))
