"""The channel axis of a block is known from evidence, and a block whose axis could be another is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.network import channels, taps
from pipeline.network.classifier import feature_norm
from pipeline.network.description import Layout


class Net(nn.Module):
    """Convolution, then a map made of it, then two blocks on the map and a head on its mean."""

    def __init__(
        self, width: int, blocks: Callable[[], nn.Module], shape: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.first, self.second = blocks(), blocks()
        self.shape = shape
        self.fc = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.shape(self.stem(x))))
        return self.fc(x.flatten(1))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Silent(nn.Module):
    """A block whose layers see no tensor of the shape that the block gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean().view(1, 1)).sigmoid()


class Transposed(nn.Module):
    """A layer along the last axis between two transpositions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(1, -1)).transpose(1, -1)


class Extra(nn.Module):
    """Tokens that do not depend on the image, before or behind those that do."""

    def __init__(self, count: int, width: int, behind: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, count, width))
        self.behind = behind
        self.keep = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid, extra = x.flatten(2).transpose(1, 2), self.tokens.expand(len(x), -1, -1)
        return self.keep(torch.cat([grid, extra] if self.behind else [extra, grid], dim=1))


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def found(model: nn.Module, side: int = 16, blocks: tuple[str, ...] | None = None) -> taps.Taps:
    torch.manual_seed(0)
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        model.eval()(images)  # its last layer takes the width that comes
    return taps.find(model, images, blocks=blocks)


@pytest.mark.parametrize(
    ("width", "inner", "shape", "expected"),
    [
        (6, lambda: nn.Conv2d(6, 6, 1), lambda x: x, Layout(1, 16)),
        (6, lambda: nn.BatchNorm2d(6), lambda x: x, Layout(1, 16)),
        (6, lambda: nn.LayerNorm(6), channels_last, Layout(3, 16)),
        (6, lambda: nn.Linear(6, 6), channels_last, Layout(3, 16)),
        (4, lambda: nn.Conv2d(4, 4, 1), lambda x: x, Layout(1, 16)),
        (4, lambda: nn.LayerNorm(4), channels_last, Layout(3, 16)),
        (6, lambda: nn.LayerNorm(6), tokens, Layout(2, 16)),
        (16, lambda: nn.LayerNorm(16), tokens, Layout(2, 16)),
        (6, lambda: nn.LayerNorm(6), Extra(1, 6, behind=False), Layout(2, 16, 1)),
        (6, lambda: nn.Linear(6, 6), Extra(5, 6, behind=False), Layout(2, 16, 5)),
    ],
)
def test_the_axis_is_that_of_the_modules_inside(width, inner, shape, expected):
    model = Net(width, lambda: Residual(inner()), shape)
    assert found(model).layouts == (expected, expected)


@pytest.mark.parametrize("axis", [1, 3])
def test_a_square_map_of_a_square_image_needs_no_other_evidence(axis):
    model = Net(6, lambda: Silent(), (lambda x: x) if axis == 1 else channels_last)
    assert found(model).layouts == (Layout(axis, 16), Layout(axis, 16))


@pytest.mark.parametrize(
    ("width", "inner", "shape"),
    [
        (4, lambda: Silent(), lambda x: x),
        (4, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4)), lambda x: x),
        (6, lambda: nn.Linear(4, 4), lambda x: x[..., :3, :]),
        (6, lambda: Silent(), tokens),
        (6, lambda: nn.BatchNorm1d(6), lambda x: x.flatten(2)),
        (6, lambda: Transposed(16), tokens),
        (6, lambda: nn.LayerNorm(6), Extra(1, 6, behind=True)),
        (6, lambda: nn.LayerNorm(6), lambda x: tokens(x)[:, :15]),
        (6, lambda: nn.Linear(4, 4), lambda x: x.flatten(0, 1)[:, None]),
    ],
    ids=[
        "as many channels as pixels per side",
        "two axes",
        "no square",
        "tokens without evidence",
        "channels before positions",
        "a layer between transpositions",
        "class token at the end",
        "tokens of no square",
        "channels in the batch",
    ],
)
def test_what_is_not_certain_is_no_block_and_refused_by_name(width, inner, shape):
    model = Net(width, lambda: Residual(inner()), shape)
    with pytest.raises(
        UserError, match=r"model\.blocks: 'first' gives \(.*no map whose channels are certain"
    ):
        found(model, blocks=("first",))
    assert found(model).blocks == ()


def slow(maps: Tensor) -> np.ndarray:
    """FeatureNorm from (N, M, positions), by a loop."""
    images = maps.double().clamp(min=0).numpy()
    return np.array([np.mean([np.sqrt((row**2).sum()) for row in image]) for image in images])


@pytest.mark.parametrize(
    ("model", "read"),
    [
        (
            lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5),
            lambda output: output[:, 1:].transpose(1, 2),
        ),
        (
            lambda: torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5),
            lambda output: output.flatten(1, 2).transpose(1, 2),
        ),
        (lambda: torchvision.models.resnet18(weights=None), lambda output: output.flatten(2)),
    ],
    ids=["class token and grid", "channels last", "channels first"],
)
def test_feature_norm_is_that_of_the_channels(model, read):
    torch.manual_seed(1)
    module, images = model().eval(), torch.rand(2, 3, 32, 32)
    named = taps.find(module, images)
    outputs = {}

    def keep(name):
        return lambda _module, _inputs, output: outputs.update({name: output})

    with torch.inference_mode(), taps.hooked(module, {name: keep(name) for name in named.blocks}):
        module(images)
    assert outputs
    for name, place in zip(named.blocks, named.layouts, strict=True):
        expected = slow(read(outputs[name]))
        np.testing.assert_allclose(feature_norm(place.maps(outputs[name])).numpy(), expected, rtol=1e-6)


def test_an_exported_module_is_known_by_the_class_it_had():
    program = torch.export.export(nn.Sequential(nn.Linear(3, 3)), (torch.rand(2, 3),))
    module = torch.export.unflatten(program)
    assert channels.kind(module.get_submodule("0")) == "torch.nn.modules.linear.Linear"
