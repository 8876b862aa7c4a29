import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.base import ParameterGradient
from pipeline.detectors.gradnorm import GradNorm
from pipeline.network import extras
from tests.detectors.conftest import QUICKSTART, classifier, network


def autograd_gradnorm(rows, count, temperature, order=1.0, with_bias=False):
    """Norm of the gradient of KL(uniform || softmax) in the last layer, sample by sample."""
    weight = torch.tensor(rows.weight, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(rows.bias, dtype=torch.float64, requires_grad=True)
    uniform = torch.full((len(bias),), 1 / len(bias), dtype=torch.float64)
    norms, logits = [], []
    for feature in torch.tensor(rows.query[FEATURE][:count], dtype=torch.float64):
        logit = weight @ feature + bias
        log_probability = torch.log_softmax(logit / temperature, dim=0)
        loss = torch.nn.functional.kl_div(log_probability, uniform, reduction="sum")
        gradients = torch.autograd.grad(loss, [weight, bias] if with_bias else [weight])
        entries = torch.cat([gradient.ravel() for gradient in gradients])
        norms.append(entries.abs().pow(order).sum().pow(1 / order).item())
        logits.append(logit.detach().numpy())
    return np.array(norms), np.array(logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
@pytest.mark.parametrize("temperature", [1, 3])
def test_the_closed_form_equals_the_gradient_by_autograd(rows, temperature, order, bias):
    norm, logits = autograd_gradnorm(rows, 100, temperature, order, bias)
    scorer = GradNorm(temperature=temperature, order=order, bias=bias).fit(rows.training(GradNorm()))
    score = scorer({FEATURE: rows.query[FEATURE][:100], LOGITS: logits})
    np.testing.assert_allclose(score, -norm, rtol=1e-9)


def test_stored_float32_logits_give_the_gradient_to_five_digits(rows):
    norm, _ = autograd_gradnorm(rows, 100, 1)
    np.testing.assert_allclose(rows.score(GradNorm())[:100], -norm, rtol=1e-5)


def test_a_uniform_prediction_has_no_gradient():
    batch = {FEATURE: np.ones((1, 4), dtype=np.float32), LOGITS: np.full((1, 3), 7, dtype=np.float32)}
    np.testing.assert_allclose(GradNorm().fit(None)(batch), [0], atol=1e-15)


def query_of(rows, detector, norms):
    return replace(rows, query={**rows.query, detector.extras()[0].column: norms.astype(np.float32)})


@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
def test_the_norm_over_layers_follows_from_those_of_each(make_rows, order):
    detector = GradNorm(layers=("a", "b", "c"), order=order)
    entries = np.abs(np.random.default_rng(2).normal(size=(20, 3, 7)))
    each = [[math.fsum(layer**order) ** (1 / order) for layer in row] for row in entries]
    expected = [-(math.fsum(row.ravel() ** order) ** (1 / order)) for row in entries]
    score = query_of(make_rows(), detector, np.array(each)).score(detector)
    np.testing.assert_allclose(score, expected, rtol=1e-6)


def test_layers_choose_what_is_differentiated():
    assert GradNorm().extras() == ()
    detector = GradNorm(layers=("layer4", "fc"), order=2, temperature=3, bias=True)
    expected = ParameterGradient(layers=("layer4", "fc"), order=2, temperature=3, bias=True)
    assert detector.extras() == (expected,)


def images_of(real, detector):
    """The first images of the query and their gradient norms."""
    pixels = np.load(QUICKSTART / "images.npz")["id_test_x"][:8]
    spec = detector.extras()[0]
    norms = extras.measure(classifier(), spec, pixels[..., None], [str(number) for number in range(8)])
    return pixels, query_of(real, detector, norms).score(detector)


def test_the_last_layer_by_name_gives_the_closed_form(real):
    _, score = images_of(real, GradNorm(layers=("fc",)))
    np.testing.assert_allclose(score, real.score(GradNorm())[:8], rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_several_layers_give_the_norm_of_one_backward_pass(real, order):
    pixels, score = images_of(real, GradNorm(layers=("layer4", "fc"), order=order))
    for image, found in zip(pixels, score, strict=True):
        model = network()
        logits = model((torch.tensor(image[None, None]) / 255 - 0.2860) / 0.3530)
        torch.nn.functional.cross_entropy(logits, torch.full((1, 10), 0.1)).backward()
        layers = [model.layer4[0].conv1, model.layer4[0].conv2, model.layer4[0].shortcut[0], model.fc]
        entries = torch.cat([layer.weight.grad.ravel() for layer in layers]).double()
        assert found == pytest.approx(-entries.norm(p=order).item(), rel=1e-5)


def test_an_order_whose_norm_fits_no_column_is_refused():
    with pytest.raises(ValidationError, match=r"order is 0\.2; expected at least 0\.5 with layers"):
        GradNorm(layers=("fc",), order=0.2)
    assert GradNorm(order=0.2).order == 0.2
