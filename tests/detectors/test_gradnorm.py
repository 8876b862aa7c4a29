import numpy as np
import pytest
import torch

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.gradnorm import GradNorm


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
