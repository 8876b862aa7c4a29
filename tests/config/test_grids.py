from __future__ import annotations

import pytest

from pipeline.config.grids import points
from pipeline.detectors.dice import Dice
from pipeline.detectors.grood import Grood
from pipeline.detectors.knn import Knn
from pipeline.errors import UserError


def test_a_grid_has_every_combination_over_the_fixed_parameters():
    grid = {"prototype": ["noise", "mixup"], "k": [1, 2]}
    found = points("mine", Grood, {"k": 9, "samples": 64}, grid)
    assert found == {
        "mine[prototype=noise, k=1]": {"k": 1, "samples": 64, "prototype": "noise"},
        "mine[prototype=noise, k=2]": {"k": 2, "samples": 64, "prototype": "noise"},
        "mine[prototype=mixup, k=1]": {"k": 1, "samples": 64, "prototype": "mixup"},
        "mine[prototype=mixup, k=2]": {"k": 2, "samples": 64, "prototype": "mixup"},
    }


def test_values_that_mean_the_same_are_one_point():
    assert list(points("dice", Dice, {}, {"p": [70, 70.0, 90]})) == ["dice[p=70.0]", "dice[p=90.0]"]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"kk": [5]}, r"tune\.grids\.knn\.kk: unknown key 'kk'\. Did you mean 'k'\? Known: k\."),
        ({"k": [5, 0]}, r"tune\.grids\.knn\.k: Input should be greater than or equal to 1, got 0\."),
        ({"k": 5}, r"tune\.grids\.knn\.k: expected a list of values to try, e\.g\. \[5, 20\], got 5\."),
        ({"k": []}, r"tune\.grids\.knn\.k: expected a list of values to try"),
    ],
)
def test_a_mistake_in_a_grid_names_field_and_fix(grid, expected):
    with pytest.raises(UserError, match=expected):
        points("knn", Knn, {}, grid)
