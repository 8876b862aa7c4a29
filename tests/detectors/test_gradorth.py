from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.gradorth import GradOrth


def slow_gradorth(rows, share, target):
    """The whole gradient matrix of every row by autograd, projected on singular vectors of the features."""
    _, singular, direction = np.linalg.svd(rows.train[FEATURE].astype(np.float64), full_matrices=False)
    dim = next(
        d for d in range(1, len(singular) + 1) if (singular[:d] ** 2).sum() >= share * (singular**2).sum()
    )
    projection = torch.from_numpy(direction[:dim].T @ direction[:dim])
    scores = []
    features, outputs = (torch.tensor(rows.query[name][:40]).double() for name in (FEATURE, LOGITS))
    for feature, logits in zip(features, outputs, strict=True):
        weight = torch.tensor(rows.weight).double().requires_grad_()
        classes = len(logits)
        label = torch.full_like(logits, 1 / classes)
        if target == "predicted":
            label = torch.nn.functional.one_hot(logits.argmax(), classes).double()
        rest = logits - (weight @ feature).detach()
        torch.nn.functional.cross_entropy(weight @ feature + rest, label).backward()
        scores.append(-torch.linalg.matrix_norm(weight.grad @ projection).item())
    return scores


@pytest.mark.parametrize("share", [0.5, 0.97])
@pytest.mark.parametrize("target", ["uniform", "predicted"])
def test_the_score_is_the_norm_of_the_projected_gradient(rows, share, target):
    score = rows.score(GradOrth(share=share, target=target))[:40]
    np.testing.assert_allclose(score, slow_gradorth(rows, share, target), rtol=1e-9, atol=1e-14)


def test_all_directions_leave_the_gradient_as_it_is(rows):
    probability = torch.tensor(rows.query[LOGITS]).double().softmax(dim=1).numpy()
    length = np.linalg.norm(rows.query[FEATURE].astype(np.float64), axis=1)
    expected = -np.linalg.norm(probability - 1 / len(rows.bias), axis=1) * length
    np.testing.assert_allclose(rows.score(GradOrth(share=1)), expected, rtol=1e-6)


def test_one_direction_is_left_where_the_share_is_tiny(rows):
    assert GradOrth(share=1e-9).fit(rows.training(GradOrth())).inside.shape[1] == 1


def test_a_feature_outside_the_subspace_has_no_projected_gradient(make_rows):
    rows = make_rows()
    flat = {**rows.train, FEATURE: rows.train[FEATURE] * (np.arange(16) < 4)}
    away = {**rows.query, FEATURE: rows.query[FEATURE] * (np.arange(16) >= 4)}
    score = replace(rows, train=flat, query=away).score(GradOrth(share=1 - 1e-9))
    np.testing.assert_allclose(score, 0, atol=1e-12)


def test_the_predicted_class_as_label_turns_the_order_of_sure_and_unsure_images(blobs):
    found = {
        target: roc_auc_score(blobs.is_ood, blobs.score(GradOrth(target=target)))
        for target in ("uniform", "predicted")
    }
    assert found["uniform"] > 0.95
    assert found["predicted"] < 0.05


def test_a_sure_image_keeps_the_digits_of_its_gradient(make_rows):
    rows = make_rows(classes=2)
    sure = {**rows.query, LOGITS: np.tile([[40.0, 0.0]], (200, 1))}
    score = replace(rows, query=sure).score(GradOrth(target="predicted", share=1))
    length = np.linalg.norm(rows.query[FEATURE].astype(np.float64), axis=1)
    np.testing.assert_allclose(score, -np.sqrt(2) * np.exp(-40) / (1 + np.exp(-40)) * length, rtol=1e-9)
