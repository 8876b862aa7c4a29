import math

import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors._steps import combined
from pipeline.detectors.ash import Ash
from pipeline.detectors.dice import Dice
from pipeline.detectors.maxlogit import MaxLogit
from pipeline.detectors.scale import Scale
from tests import slow


def shaped(feature, variant, p):
    """One feature, pruned by sorting it; all entries make the sums."""
    count = max(1, len(feature) - round(len(feature) * p / 100))
    least = sorted(feature, reverse=True)[count - 1]
    kept = [h >= least for h in feature]
    everything = math.fsum(feature)
    top = math.fsum(h for h, keep in zip(feature, kept, strict=True) if keep)
    if variant == "b":
        return [everything / sum(kept) if keep else 0.0 for keep in kept]
    ratio = min(max(everything / top, -100), 100)
    factor = math.exp(ratio) if variant == "s" else 1.0
    return [h * factor if keep else 0.0 for h, keep in zip(feature, kept, strict=True)]


@pytest.mark.parametrize("p", [0, 40, 90, 99])
@pytest.mark.parametrize("variant", ["s", "b", "p"])
def test_the_score_is_the_energy_of_shaped_features(rows, variant, p):
    expected = [
        slow.energy(slow.logits(rows, shaped(feature, variant, p)))
        for feature in rows.query[FEATURE][:40].tolist()
    ]
    np.testing.assert_allclose(rows.score(Ash(variant=variant, p=p))[:40], expected, rtol=1e-9)


@pytest.mark.parametrize(("variant", "p"), [("s", 90), ("b", 65), ("p", 60)])
def test_each_variant_has_its_own_share(real, variant, p):
    np.testing.assert_array_equal(real.score(Ash(variant=variant)), real.score(Ash(variant=variant, p=p)))


@pytest.mark.parametrize("variant", ["s", "b", "p"])
def test_a_feature_whose_kept_entries_vanish_has_a_finite_score(make_rows, variant):
    rows = make_rows(dim=4)
    scorer = Ash(variant=variant).fit(rows.training(Ash(variant=variant)))
    feature = np.array([[0, 0, 0, 0], [-1, -2, -3, -1e-30], [5, 0, 0, -1], [0, -1, -1, -1]], dtype=np.float32)
    assert np.isfinite(scorer({FEATURE: feature})).all()


def test_sums_are_over_negative_entries_too(make_rows):
    rows = make_rows(dim=4)
    prune = Ash(variant="s", p=50).shape(rows.training())
    found = prune(np.array([[4.0, 2.0, -1.0, -3.0]]))
    np.testing.assert_allclose(found, [[4 * math.exp(2 / 6), 2 * math.exp(2 / 6), 0, 0]], rtol=1e-12)
    fill = Ash(variant="b", p=50).shape(rows.training())
    np.testing.assert_allclose(fill(np.array([[4.0, 2.0, -1.0, -3.0]])), [[1, 1, 0, 0]], rtol=1e-12)


@pytest.mark.parametrize(
    ("detector", "value"), [(Ash(), 90), (Ash(variant="b"), 65), (Scale(), 85), (Dice(), 70)]
)
def test_a_choice_made_on_imagenet_is_noticed_on_small_networks(make_rows, detector, value):
    for classes, noticed in ((7, True), (1000, False)):
        training = make_rows(classes=classes).training(detector)
        notices = detector.notices(training)
        assert bool(notices) == noticed
    small = make_rows().training(detector)
    (notice,) = detector.notices(small)
    assert notice.startswith(f"p = {value} is the paper's for ImageNet, this network has 7 classes. ")
    assert combined(MaxLogit(), [detector]).notices(small) == (notice,)
    assert detector.model_copy(update={"p": 50.0}).notices(small) == ()
