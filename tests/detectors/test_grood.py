from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.columns import FEATURE, LABEL, PREDICTION
from pipeline.detectors.base import Mixup, Noise
from pipeline.detectors.grood import Grood
from pipeline.errors import UserError


def class_prototypes(rows):
    feature, label = rows.train[FEATURE].astype(np.float64), rows.train[LABEL]
    return np.stack([feature[label == c].mean(axis=0) for c in range(len(rows.bias))])


def autograd_gradient(feature, classes, ood, label):
    """Gradient, at the OOD prototype, of cross-entropy over negative Euclidean distances to prototypes."""
    prototype = torch.tensor(ood, dtype=torch.float64, requires_grad=True)
    prototypes = torch.cat([torch.tensor(classes, dtype=torch.float64), prototype[None]])
    difference = torch.tensor(feature, dtype=torch.float64) - prototypes
    logits = -difference.square().sum(dim=1).sqrt()
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))
    return torch.autograd.grad(loss, prototype)[0].numpy()


def fitted(rows, **parameters):
    detector = Grood(**parameters)
    return detector.fit(rows.training(detector))


@pytest.mark.parametrize("label", [0, 6])
@pytest.mark.parametrize("prototype", ["mixup", "noise", "proto_mean", "ood_val"])
def test_the_gradient_equals_autograd_whatever_the_label(rows, prototype, label):
    prototypes = fitted(rows, prototype=prototype).prototypes
    length, direction = prototypes.gradient(rows.query)
    classes = class_prototypes(rows)
    for row in range(0, len(length), 10):
        expected = autograd_gradient(rows.query[FEATURE][row], classes, prototypes.ood, label)
        error = np.linalg.norm(length[row] * direction[row] - expected)
        assert error <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("k", [1, 3])
def test_the_score_is_the_distance_to_the_kth_nearest_gradient_of_a_correct_row(rows, k):
    ood, classes = rows.results[Mixup]["mean"], class_prototypes(rows)
    correct = rows.train[FEATURE][rows.train[LABEL] == rows.train[PREDICTION]]
    assert len(correct) < len(rows.train[FEATURE])
    bank = [autograd_gradient(feature, classes, ood, 0) for feature in correct]
    score = rows.score(Grood(k=k))
    for row in range(0, len(score), 10):
        query = autograd_gradient(rows.query[FEATURE][row], classes, ood, 0)
        distance = sorted(float(np.linalg.norm(query - gradient)) for gradient in bank)
        assert score[row] == pytest.approx(distance[k - 1], rel=1e-4, abs=1e-7)


def test_each_choice_of_prototype_reads_its_own_source(rows):
    sources = {
        "mixup": rows.results[Mixup]["mean"],
        "noise": rows.results[Noise]["mean"],
        "proto_mean": class_prototypes(rows).mean(axis=0),
        "ood_val": rows.ood_val[FEATURE].mean(axis=0, dtype=np.float64),
    }
    for choice, expected in sources.items():
        np.testing.assert_allclose(
            fitted(rows, prototype=choice).prototypes.ood, expected, rtol=1e-12, atol=1e-14
        )


def test_only_ood_val_uses_ood_data():
    uses = {
        choice: Grood(prototype=choice).uses_ood() for choice in ("mixup", "noise", "proto_mean", "ood_val")
    }
    assert uses == {"mixup": False, "noise": False, "proto_mean": False, "ood_val": True}


def test_the_parameters_reach_the_pass():
    mixup = Grood(mixup_layer="layer1", mixup_weight=0.5, samples=20, class_samples=None)
    assert mixup.passes() == (Mixup(block="layer1", weight=0.5, samples=20, class_samples=None),)
    assert Grood(prototype="noise", samples=20).passes() == (Noise(samples=20),)
    assert Grood(prototype="proto_mean").passes() == Grood(prototype="ood_val").passes() == ()


def test_classes_without_training_rows_have_no_prototype(make_rows):
    rows = make_rows()
    label = np.where(rows.train[LABEL] == 2, -1, rows.train[LABEL])
    missing = replace(rows, train={**rows.train, LABEL: label})
    length, _ = fitted(missing).prototypes.gradient(rows.query)
    classes = np.delete(class_prototypes(rows), 2, axis=0)
    expected = autograd_gradient(rows.query[FEATURE][0], classes, rows.results[Mixup]["mean"], 0)
    assert length[0] == pytest.approx(np.linalg.norm(expected), rel=1e-9)


def test_a_feature_on_the_ood_prototype_has_no_gradient(rows):
    scorer = fitted(rows)
    length, direction = scorer.prototypes.gradient({FEATURE: scorer.prototypes.ood[None]})
    assert length[0] > 0
    assert not direction.any()


def test_a_feature_on_a_class_prototype_is_closer_to_it_than_to_ood(rows):
    length, _ = fitted(rows).prototypes.gradient({FEATURE: class_prototypes(rows)})
    assert (length < 0.5).all()


def test_far_features_keep_a_finite_gradient(rows):
    length, direction = fitted(rows).prototypes.gradient({FEATURE: 1e6 * rows.query[FEATURE]})
    assert np.isfinite(length).all()
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1, rtol=1e-12)


def test_gradients_that_vanish_in_float32_are_noticed(real, make_rows):
    detector = Grood()
    for near in (real, make_rows()):
        assert detector.notices(near.training(detector)) == ()
    mixup = near.results[Mixup]
    long = replace(
        near,
        train={**near.train, FEATURE: 1000 * near.train[FEATURE]},
        results={**near.results, Mixup: {**mixup, "mean": 1000 * mixup["mean"]}},
    )
    (notice,) = detector.notices(long.training(detector))
    assert notice.startswith("at every class mean the gradient is shorter than exp(-")


def test_training_rows_without_labels_are_refused(make_rows):
    rows = make_rows()
    unlabelled = {**rows.train, LABEL: np.full_like(rows.train[LABEL], -1)}
    with pytest.raises(UserError, match="need labels"):
        fitted(replace(rows, train=unlabelled))
