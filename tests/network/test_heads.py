"""Two linear heads that a network averages are one; what is no linear layer is told as what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import heads, taps
from pipeline.network.classifier import Classifier, load

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


class NormLinear(nn.Module):
    """A head with a BatchNorm, as LeViT has."""

    def __init__(self, drop: float, affine: bool) -> None:
        super().__init__()
        self.bn, self.drop, self.linear = nn.BatchNorm1d(8, affine=affine), nn.Dropout(drop), nn.Linear(8, 5)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(self.drop(self.bn(feature)))


class Distilled(nn.Module):
    """Two heads on the tokens that `choose` gives, averaged in eval mode."""

    def __init__(
        self, make: Callable[[], nn.Module], choose: Any, mean: Any = lambda a, b: (a + b) / 2
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.head, self.head_dist = make(), make()
        self.choose, self.mean = choose, mean

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).relu().flatten(2).transpose(1, 2)
        one, other = self.choose(tokens)
        return self.mean(self.head(one), self.head_dist(other))


def tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, 0], x[:, 1]


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=1)
    return mean, mean


KINDS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "deit": (lambda: Distilled(lambda: nn.Linear(8, 5), tokens), 16, "head_dist.mean"),
    "one feature": (lambda: Distilled(lambda: nn.Linear(8, 5, bias=False), pooled), 8, "head_dist.mean"),
    "levit": (lambda: Distilled(lambda: NormLinear(0.0, True), pooled), 8, "head_dist.linear.mean"),
    "levit, plain": (lambda: Distilled(lambda: NormLinear(0.0, False), pooled), 8, "head_dist.linear.mean"),
    "levit, dropping": (
        lambda: Distilled(lambda: NormLinear(0.5, True), pooled),
        16,
        "head_dist.linear.mean",
    ),
}
"""Networks by their structure, the width of their feature and the name of their head."""


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights and statistics."""
    torch.manual_seed(1)
    model = build().eval().requires_grad_(False)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.5
            if norm.affine:
                norm.weight.data, norm.bias.data = torch.randn(8), torch.randn(8)
    return model


def loaded(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Classifier:
    """A network as the pipeline has it."""
    monkeypatch.setattr(heads, "built_here", lambda: model, raising=False)
    transform = Transform(crop=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    return load(Model(source="factory", name="pipeline.network.heads:built_here", transform=transform), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_averaged_heads_are_one_linear_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, width, name = KINDS[kind]
    images = torch.rand(4, 3, 8, 8)
    expected = made(build)(images).numpy()
    classifier = loaded(monkeypatch, made(build))
    assert (classifier.taps.head, classifier.head[0].shape) == (name, (5, width))
    found = classifier.forward_images(images)
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)
    weight, bias = classifier.head
    np.testing.assert_allclose(found["feature"] @ weight.T + bias, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_both_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(KINDS["deit"][0])
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    _, logits = loaded(monkeypatch, model).answer(images)
    (found,) = torch.autograd.grad(logits[:, 0].sum(), images)
    torch.testing.assert_close(found, expected)


def test_heads_that_are_not_averaged_are_named_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(lambda: Distilled(lambda: nn.Linear(8, 5), tokens, torch.maximum))
    with pytest.raises(
        UserError, match=r"2 layers have as many outputs \(head, head_dist\), .* Write a factory"
    ):
        loaded(monkeypatch, model)
    assert isinstance(model.get_submodule("head"), nn.Linear)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_that_of_float32(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(4, 3, 8, 8)
    given = plain().to(dtype)
    expected = plain().to(dtype).float()(images).detach().numpy()
    classifier = loaded(monkeypatch, given)
    np.testing.assert_array_equal(classifier.forward_images(images)["logits"], expected)
    assert classifier.digest == loaded(monkeypatch, plain().to(dtype).float()).digest


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain().to(torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.to(torch.bfloat16))


def test_a_network_that_casts_by_itself_is_told_to_leave_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"were bfloat16 and are float32 here: leave casts out of its forward"
    ):
        loaded(monkeypatch, Casts())


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A TorchScript archive."""
    torch.jit.trace(plain(), torch.rand(2, 3, 8, 8)).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


def test_torchscript_is_told_and_its_weights_can_be_used(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (torch.jit.load(archive), nn.Sequential(torch.jit.load(archive))):
        with pytest.raises(UserError, match=r"^model: its layers are TorchScript, .*state_dict\(\)"):
            loaded(monkeypatch, model)
    monkeypatch.setattr(heads, "built_here", plain, raising=False)
    fields = {"source": "factory", "name": "pipeline.network.heads:built_here"}
    transform = Transform(crop=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(
        UserError, match=r"^model\.weights: .*net\.pt is a TorchScript archive, .*state_dict\(\)"
    ):
        load(Model(**fields, weights=str(archive), transform=transform), 0)
    torch.save(torch.jit.load(archive).state_dict(), archive.with_name("weights.pt"))
    found = load(Model(**fields, weights=str(archive.with_name("weights.pt")), transform=transform), 0)
    assert taps.head_weight(found.module[3])[0].shape == (5, 144)


def test_a_linear_layer_on_a_torchscript_body_is_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    body = torch.jit.trace(plain()[:3], torch.rand(2, 3, 8, 8))
    classifier = loaded(monkeypatch, nn.Sequential(body, nn.Linear(144, 5)))
    assert (classifier.taps.head, classifier.head[0].shape) == ("1", (5, 144))
