"""Head, feature and blocks are found in real architectures, and a model that hides them is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import taps
from pipeline.network.classifier import Classifier, load

EXPECTED = {
    "resnet18": ("fc", [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)], "layer3.1"),
    "vgg11_bn": (
        "classifier.6",
        [f"features.{number}" for number in (2, 6, 10, 13, 17, 20, 24, 27)],
        "features.20",
    ),
    "mobilenet_v2": ("classifier.1", [f"features.{number}" for number in range(19)], "features.13"),
    "efficientnet_b0": (
        "classifier.1",
        [
            "features.0",
            *(
                f"features.{stage}.{block}"
                for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1), start=1)
                for block in range(blocks)
            ),
            "features.8",
        ],
        "features.5.2",
    ),
    "convnext_tiny": (
        "classifier.2",
        [f"features.{stage}.{block}" for stage, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for block in range(n)],
        "features.5.8",
    ),
    "densenet121": (
        "classifier",
        [
            f"features.{kind}{stage}"
            for stage in (1, 2, 3, 4)
            for kind in (("denseblock", "transition") if stage < 4 else ("denseblock",))
        ],
        "features.denseblock3",
    ),
}


class Net(nn.Module):
    """A small network with any end; five classes unless the end says otherwise."""

    def __init__(self, end: nn.Module, finish: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.end = end
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.end(self.pool(self.act(self.conv(x)))))


def flat(head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), head)


class Twice(nn.Module):
    """Two passes through one head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x.flatten(1)) + self.fc(2 * x.flatten(1))) / 2


class Everywhere(nn.Module):
    """A head at each of four positions, and the mean over them."""

    def __init__(self, head: nn.Module, between: nn.Module | None = None, axis: int = 1) -> None:
        super().__init__()
        self.head = head
        self.between = between or nn.Identity()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([torch.cat([x, 3 * x], 2), torch.cat([x.square(), -x], 2)], 3).movedim(1, self.axis)
        return self.between(self.head(maps)).movedim(self.axis, 1).mean(dim=(2, 3))


def find(model: nn.Module, head: str = "auto", blocks: tuple[str, ...] | None = None) -> taps.Taps:
    torch.manual_seed(0)
    return taps.find(model.eval(), torch.rand(2, 3, 12, 12), head, blocks)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


LARGE = ("vgg11_bn", "densenet121")
"""Drawing their weights, or tracing their layers, takes seconds."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in EXPECTED],
)
def named(request: pytest.FixtureRequest) -> tuple[str, Classifier]:
    """An architecture of torchvision with random weights, for 64 x 64 images."""
    transform = Transform(crop=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = Model(source="torchvision", name=request.param, weights="random", transform=transform)
    return request.param, load(model, seed=0)


def test_head_and_blocks_of_published_architectures_are_found(named):
    name, classifier = named
    head, blocks, early = EXPECTED[name]
    found = classifier.taps
    assert (found.head, found.blocks, found.early) == (head, tuple(blocks), early)
    assert set(blocks) <= set(found.layers)
    assert head not in found.layers


def test_forward_gives_what_the_plain_model_gives_and_leaves_no_hook(named):
    _, classifier = named
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        plain = classifier.module(images)
    output = classifier.forward_images(images)
    assert torch.equal(torch.from_numpy(output["logits"]), plain)
    assert output["block_norm"].shape == (2, len(classifier.taps.blocks))
    weight, bias = classifier.head
    assert output["feature"] @ weight.T + bias == pytest.approx(output["logits"], abs=1e-5)
    assert hooks(classifier.module) == 0


@pytest.mark.parametrize(
    ("end", "head"),
    [
        (flat(nn.Linear(6, 5)), "end.1"),
        (flat(nn.Linear(6, 5, bias=False)), "end.1"),
        (nn.Sequential(nn.Conv2d(6, 5, 1), nn.Flatten()), "end.0"),
        (nn.Sequential(nn.Conv2d(6, 5, 1, bias=False), nn.Flatten()), "end.0"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 5)), "end.2"),
        (flat(nn.Sequential(nn.Dropout(), nn.Linear(6, 5), nn.Identity())), "end.1.1"),
    ],
    ids=["linear", "no bias", "1x1 convolution", "convolution without bias", "two linear", "dropout"],
)
def test_the_head_is_the_last_linear_layer(end, head):
    model = Net(end)
    found = find(model)
    assert found.head == head
    weight, bias = taps.head_weight(model.get_submodule(head))
    assert (weight.shape[0], bias.shape) == (5, (5,))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Net(flat(nn.Linear(6, 5)), lambda x: x + 1), "model.head: 'end.1' applied to its input differs"),
        (Net(flat(nn.Linear(6, 5)), lambda x: 30 * x), "Something follows the layer"),
        (Net(flat(nn.Linear(6, 5)), lambda x: x.softmax(1)), "differs from the model's output"),
        (
            Net(flat(nn.Sequential(nn.Linear(6, 5), nn.LogSoftmax(1)))),
            "'end.1.0' applied to its input differs from the model's output",
        ),
        (
            Net(nn.Flatten()),
            "no Linear or 1x1 convolution gives the 6 logits; the last layer is 'end' (Flatt",
        ),
        (
            Net(Twice()),
            "no Linear or 1x1 convolution gives the 5 logits; the last layer is 'end.fc' (Linear)",
        ),
        (Net(flat(nn.Linear(6, 5)), lambda x: x[:, :3]), "no Linear or 1x1 convolution gives the 3 logits"),
        (Net(flat(nn.Linear(6, 5)), lambda x: [x]), "model: its output is list; expected logits"),
        (Net(flat(nn.Linear(6, 5)), lambda x: x[None]), "model: its output is (1, 2, 5); expected logits"),
        (Net(flat(nn.Linear(6, 5)), lambda x: x * float("nan")), "differs from the model's output by nan"),
    ],
)
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(model, expected):
    with pytest.raises(UserError) as caught:
        find(model)
    assert expected in str(caught.value)
    assert hooks(model) == 0


@pytest.mark.parametrize("end", [Everywhere(nn.Conv2d(6, 5, 1)), Everywhere(nn.Linear(6, 5), axis=-1)])
def test_a_head_before_the_mean_over_positions_is_the_same_head_after_it(end):
    model = Net(end)
    assert find(model).head == "end.head"
    calls, logits = taps.trace(model, torch.rand(2, 3, 12, 12))
    source = next(call.source for call in calls if call.name == "end.head")
    weight, bias = taps.head_weight(end.head)
    feature = taps.penultimate(end.head, source)
    assert feature.shape == (2, 6)
    assert torch.allclose(feature @ weight.T + bias, logits, atol=1e-6)


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Softmax(1)])
def test_a_head_before_something_that_does_not_commute_with_the_mean_is_refused(between):
    with pytest.raises(UserError, match=r"'end\.head' runs at every position, and the mean .* not linear"):
        find(Net(Everywhere(nn.Conv2d(6, 5, 1), between=between)))


def test_a_named_head_is_checked_and_taken():
    model = Net(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 4)))
    assert find(model, head="end.2").head == "end.2"
    with pytest.raises(UserError, match=r"model\.head: 'end\.1' applied to its input differs"):
        find(model, head="end.1")
    with pytest.raises(UserError, match=r"model\.head: 'end\.0' is a Flatten; expected Linear or a 1x1"):
        find(model, head="end.0")
    with pytest.raises(UserError, match=r"model\.head: unknown layer 'end\.3'\. Did you mean 'end\.\d'"):
        find(model, head="end.3")


def test_a_head_that_gives_another_number_of_logits_is_refused():
    model = Net(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 3)))
    with pytest.raises(UserError, match=r"model\.head: 'end\.1' gives 4 logits, the model \(3,\)"):
        find(model, head="end.1")


def test_named_blocks_are_checked_and_taken_in_their_order():
    model = Net(flat(nn.Linear(6, 5)))
    assert find(model, blocks=("act", "conv")).blocks == ("act", "conv")
    with pytest.raises(UserError, match=r"model\.blocks: unknown layer 'cnov'\. Did you mean 'conv'"):
        find(model, blocks=("cnov",))
    for name in ("pool", "end.0", "end"):
        with pytest.raises(UserError, match=rf"model\.blocks: '{name}' gives .* no map whose channels"):
            find(model, blocks=(name,))


def test_a_named_layer_that_runs_twice_is_refused():
    with pytest.raises(UserError, match=r"model\.head: 'end\.fc' does not run exactly once"):
        find(Net(Twice()), head="end.fc")


def test_a_model_without_repeated_blocks_gives_its_activations():
    found = find(Net(flat(nn.Linear(6, 5))))
    assert (found.blocks, found.early) == (("act",), "act")


def test_a_model_without_maps_has_no_blocks():
    found = find(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 6), nn.ReLU(), nn.Linear(6, 5)))
    assert found == taps.Taps("3", (), None, layers=("0", "1", "2"))


def test_hooks_are_gone_after_an_exception():
    model = Net(flat(nn.Linear(6, 5)))
    with pytest.raises(RuntimeError, match="channels"):
        taps.find(model, torch.rand(2, 1, 12, 12))
    assert hooks(model) == 0


@pytest.mark.parametrize("names", [["conv", "act"], ["conv", "nowhere"]])
def test_hooks_last_as_long_as_their_block_whatever_happens_in_it(names):
    model = Net(flat(nn.Linear(6, 5)))
    entered = []
    with pytest.raises(AttributeError), taps.hooked(model, dict.fromkeys(names, print)):
        entered.append(hooks(model))
        raise AttributeError
    assert entered == ([2] if names == ["conv", "act"] else [])
    assert hooks(model) == 0
