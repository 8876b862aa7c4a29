import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.columns import FEATURE
from pipeline.detectors.adascale import AdaScale
from pipeline.detectors.base import Perturbed, Samples
from pipeline.detectors.energy import Energy
from pipeline.detectors.scale import Scale
from tests import slow

MOVED = AdaScale().extras()[0].column


def shift(feature, moved, k1, k2, weight):
    """Q' of one row: λ times the shift of the largest k2 %, and what remains of the largest k1 %."""
    order = sorted(range(len(feature)), key=lambda j: -feature[j])
    shifted = math.fsum(abs(moved[j] - feature[j]) for j in order[: max(1, int(len(order) * k2 / 100))])
    remains = math.fsum(max(moved[j], 0) for j in order[: max(1, int(len(order) * k1 / 100))])
    return weight * shifted + remains


def slow_adascale(rows, detector, count=40):
    arguments = (detector.k1, detector.k2, detector.weight)
    samples = rows.results[Samples]
    known = [
        shift(feature, moved, *arguments)
        for feature, moved in zip(samples["feature"].tolist(), samples["extra"].tolist(), strict=True)
    ]
    scores = []
    query = zip(rows.query[FEATURE][:count].tolist(), rows.query[MOVED][:count].tolist(), strict=True)
    for feature, moved in query:
        own = shift(feature, moved, *arguments)
        ecdf = sum(other <= own for other in known) / len(known)
        percentile = detector.p_min + (1 - ecdf) * (detector.p_max - detector.p_min)
        positive = sorted((max(h, 0.0) for h in feature), reverse=True)
        kept = max(1, len(feature) - round(len(feature) * percentile / 100))
        ratio = math.fsum(positive) / math.fsum(positive[:kept])
        if detector.variant == "A":
            logits = slow.logits(rows, [h * math.exp(ratio) for h in feature])
        else:
            logits = [z * ratio**2 for z in slow.logits(rows, feature)]
        scores.append(slow.energy(logits))
    return scores


@pytest.mark.parametrize("variant", ["A", "L"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"p_min": 0, "p_max": 99}, {"k1": 40, "k2": 80}, {"k1": 100, "k2": 0.1, "weight": 0}],
    ids=repr,
)
def test_the_score_is_the_energy_after_scaling_by_the_percentile_of_the_shift(rows, variant, changes):
    detector = AdaScale(variant=variant, **changes)
    np.testing.assert_allclose(rows.score(detector)[:40], slow_adascale(rows, detector), rtol=1e-9)


def at(rows, moved):
    return replace(rows, query={**rows.query, MOVED: moved.astype(np.float32)})


@pytest.fixture
def unsigned(rows):
    """As behind a ReLU, which is where the sums of SCALE and AdaSCALE are the same."""
    return replace(rows, query={**rows.query, FEATURE: np.abs(rows.query[FEATURE])})


def test_the_most_shifted_images_are_scaled_as_by_scale_at_p_min(unsigned):
    far = at(unsigned, unsigned.query[FEATURE] + 1000)
    score = far.score(AdaScale(p_min=40, p_max=90))
    np.testing.assert_allclose(score, unsigned.score(Scale(p=40)), rtol=1e-12)


def test_the_least_shifted_images_are_scaled_as_by_scale_at_p_max(unsigned):
    # More than that of any sample, but for images that do not move and of which nothing remains.
    still = at(unsigned, unsigned.query[FEATURE])
    samples = {**unsigned.results[Samples], "extra": unsigned.results[Samples]["feature"] + 1000}
    still = replace(still, results={**unsigned.results, Samples: samples})
    score = still.score(AdaScale(p_min=40, p_max=90))
    np.testing.assert_allclose(score, unsigned.score(Scale(p=90)), rtol=1e-12)


def test_equal_percentiles_are_scale_whatever_moves(unsigned):
    np.testing.assert_allclose(
        unsigned.score(AdaScale(p_min=85, p_max=85)), unsigned.score(Scale(p=85)), rtol=1e-12
    )


def test_a_feature_without_positive_entries_keeps_the_energy_of_its_logits(make_rows):
    rows = make_rows()
    negative = replace(rows, query={**rows.query, FEATURE: -np.abs(rows.query[FEATURE])})
    expected = [slow.energy(slow.logits(rows, h)) for h in negative.query[FEATURE].tolist()]
    np.testing.assert_allclose(negative.score(AdaScale(variant="L")), expected, rtol=1e-9)
    assert Energy().temperature == 1


def test_by_default_a_twentieth_of_the_input_moves_by_a_half():
    assert AdaScale().extras() == (Perturbed(objective="logit", step=0.5, share=0.05),)
    assert AdaScale().passes() == (Samples(extra=AdaScale().extras()[0], samples=1000),)
    moved = AdaScale(step=0.25, share=10, samples=7)
    assert moved.extras() == (Perturbed(objective="logit", step=0.25, share=0.1),)
    assert moved.passes()[0].samples == 7


def test_defaults_are_the_authors_for_resnet_50():
    method = AdaScale()
    assert (method.variant, method.p_min, method.p_max) == ("A", 80, 85)
    assert (method.k1, method.k2, method.weight, method.share, method.step) == (5, 1, 10, 5, 0.5)


def test_percentiles_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match=r"p_min is 90\.0 but p_max is 80\.0; expected p_min <= p_max"):
        AdaScale(p_min=90, p_max=80)
