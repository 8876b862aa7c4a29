import math

import numpy as np
import pytest

from pipeline.columns import FEATURE
from pipeline.detectors.ash import Ash
from tests import slow


def shaped(feature, variant, p):
    """One feature, pruned by sorting it; positive entries make the sums."""
    count = max(1, len(feature) - round(len(feature) * p / 100))
    least = sorted(feature, reverse=True)[count - 1]
    kept = [h >= least for h in feature]
    everything = math.fsum(max(h, 0) for h in feature)
    top = math.fsum(max(h, 0) for h, keep in zip(feature, kept, strict=True) if keep)
    if variant == "b":
        return [everything / sum(kept) if keep else 0.0 for keep in kept]
    factor = math.exp(everything / top) if variant == "s" else 1.0
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
def test_a_feature_without_positive_entries_has_a_finite_score(make_rows, variant):
    rows = make_rows(dim=4)
    scorer = Ash(variant=variant).fit(rows.training(Ash(variant=variant)))
    feature = np.array([[0, 0, 0, 0], [-1, -2, -3, -1e-30], [5, 0, 0, -1]], dtype=np.float32)
    assert np.isfinite(scorer({FEATURE: feature})).all()
