"""Columns beyond the forward pass, against the network run by hand on one image at a time.

Float32 networks give other last digits for other batch sizes. Where a test runs one by hand its tolerance is
1e-5 of the largest value; where nothing runs again, results are compared bit by bit.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline import quickstart
from pipeline.columns import FEATURE, LOGITS
from pipeline.config import loading
from pipeline.config.schema import Extract, Transform
from pipeline.detectors.base import Dropped, ParameterGradient, Perturbed, Pooled, RankReduced
from pipeline.detectors.gradnorm import GradNorm
from pipeline.errors import UserError
from pipeline.network import extras, gradients, taps
from pipeline.network.classifier import Classifier
from pipeline.network.classifier import load as load_classifier

KEYS = [f"dataset/{number}.png" for number in range(6)]
MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.4)


class Step(nn.Module):
    """A block with maps; smooth, so that no gradient is exactly zero."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class Spread(nn.Module):
    """A block that works on the last axis, and mixes what lies at different positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh(self.linear(x))
        return y + 0.5 * y.roll(1, dims=1) + 0.1 * y.mean(dim=tuple(range(1, y.dim() - 1)), keepdim=True)


class Maps(nn.Module):
    """Blocks on 8 x 8 maps of 4 channels, and on 4 x 4 maps of 24."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Step(3, 4), Step(4, 4), Step(4, 24, 2), Step(24, 24))
        self.fc = nn.Linear(24, 5)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.leave(self.body(self.enter(x))))


class ChannelsLast(Maps):
    """The same with the channels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Sequential(*(Spread(6) for _ in range(3)))
        self.fc = nn.Linear(6, 5)

    def enter(self, x: Tensor) -> Tensor:
        return self.stem(x).permute(0, 2, 3, 1)

    def leave(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2))


class Tokens(ChannelsLast):
    """Tokens with one in front that is no position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 6))

    def enter(self, x: Tensor) -> Tensor:
        grid = self.stem(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), -1, -1), grid], dim=1)

    def leave(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Dropping(nn.Module):
    """Whole channels are dropped, then single features."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step(3, 6)
        self.channels = nn.Dropout2d(0.3)
        self.features = nn.Dropout(0.6)
        self.never = nn.Dropout(0.0)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.never(self.features(self.channels(self.step(x)).mean(dim=(2, 3)))))


def wrap(module: nn.Module, blocks: tuple[str, ...] | None = None) -> Classifier:
    """A classifier of 8 x 8 images."""
    module.eval().requires_grad_(False)
    found = taps.find(module, torch.rand(3, 3, 8, 8), "auto", blocks)
    weight, bias = taps.head_weight(module.get_submodule(found.head))
    transform, head = Transform(crop=8, mean=MEAN, std=STD), (weight.numpy(), bias.numpy())
    return Classifier(transform, found, "", "", np.zeros((1, 1), np.float32), head, module)


def toy(kind: type[nn.Module], blocks: tuple[str, ...] | None = None) -> Classifier:
    torch.manual_seed(0)
    module = kind()
    if hasattr(module, "fc"):
        module.fc.weight.data *= 8  # sure of its predictions
    return wrap(module, blocks)


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return load_classifier(loading.load("quickstart").model, 0)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.load(Path(quickstart.__file__).parent / "images.npz")["id_test_x"][:6, ..., None]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)


def batch_of_one(classifier: Classifier, image: np.ndarray) -> Tensor:
    """What the network sees of one image."""
    mean, std = classifier.transform.mean, classifier.transform.std
    planes = [(image[..., c].astype(np.float64) / 255 - mean[c]) / std[c] for c in range(image.shape[2])]
    return torch.from_numpy(np.stack(planes)).float()[None]


def feature_of(classifier: Classifier, images: Tensor) -> Tensor:
    """What goes into the head."""
    seen = []
    handle = classifier.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        classifier.module(images)
    handle.remove()
    return seen[0]


def close(found: np.ndarray, expected: np.ndarray, share: float = 1e-5) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


# Perturbed


def moved(classifier: Classifier, spec: Perturbed, image: np.ndarray) -> Tensor:
    """One image after the step, value by value."""
    x = batch_of_one(classifier, image).requires_grad_()
    logits = classifier.module(x)[0]
    target = int(logits.argmax())
    value = logits[target]
    if spec.objective == "log_softmax":
        value = logits[target] / spec.temperature - torch.logsumexp(logits / spec.temperature, dim=0)
    value.backward()
    slope, result = x.grad[0], x.detach().clone()
    every = list(itertools.product(*map(range, slope.shape)))
    every.sort(key=lambda place: abs(float(slope[place])))
    for place in every[: max(1, int(spec.share * len(every)))]:
        step = spec.step / (classifier.transform.std[place[0]] if spec.pixels else 1)
        result[(0, *place)] += step * float(slope[place] > 0) - step * float(slope[place] < 0)
    return result


PERTURBED = [
    Perturbed(objective="log_softmax", step=0.0014, temperature=1000, pixels=True),
    Perturbed(objective="log_softmax", step=0.1, temperature=2),
    Perturbed(objective="logit", step=0.5, share=0.05),
    Perturbed(objective="logit", step=0.5, share=0.3, pixels=True),
    Perturbed(objective="logit", step=0.5, share=1e-9),
]


@pytest.mark.parametrize("spec", PERTURBED, ids=repr)
@pytest.mark.parametrize("kind", [Maps, ChannelsLast, Tokens])
def test_an_image_moves_along_the_sign_of_its_own_gradient(pixels, kind, spec):
    classifier = toy(kind)
    expected = [feature_of(classifier, moved(classifier, spec, image))[0].numpy() for image in pixels]
    close(extras.measure(classifier, spec, pixels, KEYS), expected)


@pytest.mark.parametrize("spec", PERTURBED[:3], ids=repr)
def test_the_shipped_network_s_images_move_likewise(shipped, photos, spec):
    expected = [feature_of(shipped, moved(shipped, spec, image))[0].numpy() for image in photos]
    close(extras.measure(shipped, spec, photos, KEYS), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_high_temperature_costs_half_precision_no_gradient(shipped, photos, precision):
    half = replace(shipped, precision=precision)
    plain = half.forward(photos)[FEATURE]
    moved = {
        temperature: extras.measure(
            half, Perturbed(objective="log_softmax", step=0.2, temperature=temperature), photos, KEYS
        )
        for temperature in (1e3, 1e6)
    }
    size = np.abs(moved[1e3] - plain).max()
    assert size > 0.1
    assert np.abs(moved[1e6] - moved[1e3]).max() < 0.1 * size


@pytest.mark.parametrize("objective", ["log_softmax", "logit"])
def test_a_small_step_raises_the_objective(pixels, objective):
    classifier = toy(Maps)
    weight, bias = classifier.head

    def value(step):
        spec = Perturbed(objective=objective, step=step)
        logits = torch.from_numpy(extras.measure(classifier, spec, pixels, KEYS) @ weight.T + bias)
        return (logits.log_softmax(1) if objective == "log_softmax" else logits).amax(dim=1)

    assert (value(0.01) > value(0)).all()


@pytest.mark.parametrize(
    "spec",
    [
        *PERTURBED,
        RankReduced(block="early"),
        Pooled(),
        ParameterGradient(layers=("body", "fc")),
    ],
    ids=repr,
)
def test_a_row_does_not_depend_on_the_others(pixels, spec):
    classifier = toy(Maps)
    whole = extras.measure(classifier, spec, pixels, KEYS)
    order = [4, 0, 5, 2, 1, 3]
    mixed = extras.measure(classifier, spec, pixels[order], [KEYS[i] for i in order])
    np.testing.assert_array_equal(mixed, whole[order])
    other = pixels.copy()
    other[1:] = 255 - other[1:]
    np.testing.assert_array_equal(extras.measure(classifier, spec, other, KEYS)[0], whole[0])


def test_extras_have_batches_of_a_size_of_their_own_but_those_that_a_forward_pass_brings(pixels, monkeypatch):
    classifier, sizes, measure = toy(Maps), list[int](), extras.measure
    specs = (PERTURBED[0], ParameterGradient(layers=("fc",)), Pooled())
    expected = [measure(classifier, spec, pixels, KEYS) for spec in specs]

    def counted(*given):
        assert len(given[2]) == len(given[3])
        sizes.append(len(given[2]))
        return measure(*given)

    monkeypatch.setattr(extras, "measure", counted)
    settings = Extract(batch_size=8, extras_batch_size=4)
    for spec, values in zip(specs, expected, strict=True):
        found = extras.column(classifier, spec, pixels, KEYS, settings)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)
    assert sizes == [4, 4, 4, 4, 8]


@pytest.mark.parametrize("spec", PERTURBED, ids=repr)
def test_no_step_gives_the_plain_feature(pixels, spec):
    classifier = toy(Maps)
    still = extras.measure(classifier, spec.model_copy(update={"step": 0.0}), pixels, KEYS)
    close(still, classifier.forward(pixels)[FEATURE], 1e-6)


class Shifting(nn.Module):
    """Shifts its input, in place or not, as networks do that normalise by themselves."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.step = Step(3, 6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = (x.sub_(0.5) if self.in_place else x - 0.5) * self.scale
        return self.fc(self.drop(self.step(x).mean(dim=(2, 3))))


@pytest.mark.parametrize(
    "spec",
    [*PERTURBED, Dropped(samples=3), ParameterGradient(layers=("fc", "step", "scale"))],
    ids=repr,
)
def test_a_network_may_change_its_input_in_place(pixels, spec):
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        classifier = wrap(Shifting(in_place))
        extras.check(spec, classifier)
        found.append(extras.measure(classifier, spec, pixels, KEYS))
    np.testing.assert_array_equal(*found)


def test_the_image_and_the_network_are_left_as_they_were(pixels):
    classifier, before = toy(Maps), pixels.copy()
    plain = classifier.forward(pixels)[LOGITS]
    for spec in (*PERTURBED, RankReduced(block="last"), Pooled(), ParameterGradient(layers=("fc",))):
        extras.measure(classifier, spec, pixels, KEYS)
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(classifier.forward(pixels)[LOGITS], plain)
    assert hooks(classifier.module) == 0
    assert all(each.grad is None and not each.requires_grad for each in classifier.module.parameters())


# RankReduced


def without_first(matrix: Tensor) -> Tensor:
    """A matrix minus s₁ u₁ v₁ᵀ."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (matrix.double() - s[0] * torch.outer(u[:, 0], vh[0])).float()


def reduced(output: Tensor, kind: type[nn.Module]) -> Tensor:
    """A block's output (1, ...) without its first singular value, by layout."""
    if kind is Maps:
        return without_first(output[0].flatten(1)).view(output.shape)
    if kind is ChannelsLast:
        return without_first(output[0].flatten(0, 1).T).T.reshape(output.shape)
    return without_first(output[0].T).T[None]


@pytest.mark.parametrize(
    ("kind", "block", "number"),
    [
        (Maps, "body.0", 0),
        (Maps, "early", 1),
        (Maps, "body.2", 2),
        (Maps, "last", 3),
        (ChannelsLast, "body.0", 0),
        (ChannelsLast, "last", 2),
        (Tokens, "body.1", 1),
        (Tokens, "last", 2),
    ],
)
def test_a_block_loses_its_first_singular_value(pixels, kind, block, number):
    classifier = toy(kind)
    network, expected = classifier.module, []
    for image in pixels:
        with torch.no_grad():
            output = network.body[: number + 1](network.enter(batch_of_one(classifier, image)))
            expected.append(network.leave(network.body[number + 1 :](reduced(output, kind)))[0].numpy())
    close(extras.measure(classifier, RankReduced(block=block), pixels, KEYS), expected)
    assert hooks(network) == 0


def test_a_head_that_reads_one_token_sees_the_last_block_change(pixels):
    class First(Tokens):
        """The token in front carries the feature."""

        def leave(self, x: Tensor) -> Tensor:
            return x[:, 0]

    classifier = toy(First)
    reduced = extras.measure(classifier, RankReduced(block="last"), pixels, KEYS)
    change = np.abs(reduced - classifier.forward(pixels)[FEATURE]).max(axis=1)
    assert (change > 0.1).all()


@pytest.mark.parametrize(("block", "number"), [("early", 3), ("last", 4), ("layer1.0", 1)])
def test_the_shipped_network_s_blocks_lose_it_likewise(shipped, photos, block, number):
    net, expected = shipped.module, []
    for image in photos:
        with torch.no_grad():
            maps = net.relu(net.bn1(net.conv1(batch_of_one(shipped, image))))
            for layer in range(1, 5):
                maps = net.get_submodule(f"layer{layer}")(maps)
                if layer == number:
                    maps = without_first(maps[0].flatten(1)).view(maps.shape)
            expected.append(maps.mean(dim=(0, 2, 3)).numpy())
    close(extras.measure(shipped, RankReduced(block=block), photos, KEYS), expected)


def test_maps_without_values_lose_nothing(pixels):
    classifier = toy(Maps)
    classifier.module.body[3].conv.weight.zero_()
    classifier.module.body[3].conv.bias.zero_()
    assert not extras.measure(classifier, RankReduced(block="last"), pixels, KEYS).any()


def test_maps_of_rank_one_lose_everything(pixels):
    classifier = toy(Maps)
    classifier.module.body[3].conv.weight.zero_()
    reduced = extras.measure(classifier, RankReduced(block="last"), pixels, KEYS)
    assert np.abs(reduced).max() < 1e-6 < np.abs(classifier.forward(pixels)[FEATURE]).max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_whose_maps_are_not_finite_leaves_the_others_alone(pixels, value):
    classifier, spec = toy(Maps), RankReduced(block="last")

    def spoil(_module, _inputs, output: Tensor) -> Tensor:
        spoiled = output.clone()
        spoiled[2, 0] = value
        return spoiled

    whole = extras.measure(classifier, spec, pixels, KEYS)
    with taps.hooked(classifier.module, {"body.3": spoil}):
        spoiled = extras.measure(classifier, spec, pixels, KEYS)
    np.testing.assert_array_equal(np.delete(spoiled, 2, axis=0), np.delete(whole, 2, axis=0))


def test_an_unknown_block_is_refused_with_the_known_ones(pixels):
    spec = RankReduced(block="body.33")
    expected = r"unknown block 'body\.33'\. Did you mean 'body\.3'\? Known: body\.0, .*, body\.3, early, last"
    with pytest.raises(UserError, match=expected):
        extras.measure(toy(Maps), spec, pixels, KEYS)
    with pytest.raises(UserError, match=expected):
        extras.check(spec, toy(Maps))


@pytest.mark.parametrize("spec", [RankReduced(block="last"), RankReduced(block="early"), Pooled()])
def test_a_model_without_blocks_is_refused(pixels, spec):
    class Flat(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 5))

    with pytest.raises(UserError, match=r"the model has no block with maps or tokens .* drop the detector"):
        extras.check(spec, toy(Flat))


# Dropped


def dropped_by_hand(network: Dropping, x: Tensor, key: str, seed: int, samples: int) -> np.ndarray:
    """Mean softmax of one image with masks drawn for its key, the seed and the number of the sample."""
    word = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16)
    total = np.zeros(5)
    for sample in range(samples):
        rng = np.random.default_rng([seed, sample, word])
        channels = torch.from_numpy(rng.random(6, dtype=np.float32) >= np.float32(0.3)) / 0.7
        features = torch.from_numpy(rng.random(6, dtype=np.float32) >= np.float32(0.6)) / 0.4
        with torch.no_grad():
            maps = network.step(x) * channels.view(1, 6, 1, 1)
            logits = network.fc(maps.mean(dim=(2, 3)) * features)[0].double()
        total += (logits.exp() / logits.exp().sum()).numpy()
    return total / samples


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("samples", [1, 5])
def test_dropout_takes_masks_of_key_seed_and_sample(pixels, samples, seed):
    classifier = toy(Dropping)
    expected = [
        dropped_by_hand(classifier.module, batch_of_one(classifier, image), key, seed, samples)
        for image, key in zip(pixels, KEYS, strict=True)
    ]
    close(extras.measure(classifier, Dropped(samples=samples, seed=seed), pixels, KEYS), expected)


def test_masks_belong_to_an_image_wherever_it_stands(pixels):
    classifier, spec = toy(Dropping), Dropped(samples=3)
    whole = extras.measure(classifier, spec, pixels, KEYS)
    order = [5, 3, 1, 0, 2, 4]
    np.testing.assert_array_equal(
        extras.measure(classifier, spec, pixels[order], [KEYS[i] for i in order]), whole[order]
    )
    few = extras.measure(classifier, spec, pixels[2:4], KEYS[2:4])
    close(few, whole[2:4])
    renamed = extras.measure(classifier, spec, pixels, [KEYS[0], "another", *KEYS[2:]])
    assert (renamed != whole).any(axis=1).tolist() == [False, True, False, False, False, False]


def test_many_samples_approach_the_expectation(pixels):
    class Small(nn.Module):
        """Four features, all sixteen masks of which can be listed."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(192, 4)
            self.drop = nn.Dropout(0.25)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(self.embed(x.flatten(1))))

    classifier, expected = toy(Small), []
    for image in pixels[:2]:
        with torch.no_grad():
            feature = classifier.module.embed(batch_of_one(classifier, image).flatten(1))[0]
        mean = np.zeros(3)
        for mask in itertools.product([0, 1], repeat=4):
            chance = math.prod(0.75 if kept else 0.25 for kept in mask)
            with torch.no_grad():
                logits = classifier.module.fc(feature * torch.tensor(mask) / 0.75)
            mean += chance * logits.softmax(0).double().numpy()
        expected.append(mean)
    found = extras.measure(classifier, Dropped(samples=4000), pixels[:2], KEYS[:2])
    # The standard deviation of a probability is at most 1 / 2: four of its mean over 4,000 samples.
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / math.sqrt(4000))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    once = extras.measure(classifier, Dropped(samples=1), pixels[:2], KEYS[:2])
    assert np.abs(once - expected).max() > 0.05


def test_dropout_is_gone_after_the_last_sample(pixels):
    classifier = toy(Dropping)
    before = classifier.forward(pixels)[LOGITS]
    extras.measure(classifier, Dropped(samples=2), pixels, KEYS)
    np.testing.assert_array_equal(classifier.forward(pixels)[LOGITS], before)
    assert hooks(classifier.module) == 0
    assert not any(each.training for each in classifier.module.modules())


def test_a_model_without_dropout_is_refused(shipped):
    for classifier in (shipped, toy(Maps)):
        with pytest.raises(UserError, match=r"no dropout layer with a rate above 0\. Drop the detector"):
            extras.check(Dropped(samples=2), classifier)


def test_dropout_that_does_not_run_is_refused():
    class Unused(Maps):
        """Has a layer that it never calls."""

        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

    with pytest.raises(UserError, match=r"dropout layers \(drop\) do not run"):
        extras.check(Dropped(samples=2), toy(Unused))


@pytest.mark.parametrize(("shape", "given"), [((1, -1, 6), r"\(1, 2, 6\)"), ((6, -1), r"\(6, 2\)")])
def test_dropout_where_images_are_not_at_the_first_axis_is_refused(shape, given):
    class Turned(Dropping):
        """A layer sees one sequence of all images."""

        def forward(self, x: Tensor) -> Tensor:
            feature = self.step(x).mean(dim=(2, 3))
            if len(shape) == 2:
                return self.fc(self.features(feature.T).T)
            return self.fc(self.features(feature[None])[0])

    with pytest.raises(UserError, match=rf"dropout layer 'features' gives {given} for 2 images.*Drop the"):
        extras.check(Dropped(samples=2), toy(Turned))


# Pooled


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        (Maps, {"body.1": 4, "body.3": 24}),
        (ChannelsLast, {"body.2": 6}),
        (Tokens, {"body.2": 6}),
    ],
)
def test_stages_are_averaged_over_their_positions(pixels, kind, stages):
    classifier = toy(kind)
    assert classifier.taps.stages == stages
    expected = []
    for image in pixels:
        with torch.no_grad():
            output, means = classifier.module.enter(batch_of_one(classifier, image)), []
            for number, block in enumerate(classifier.module.body):
                output = block(output)
                if f"body.{number}" in stages:
                    grid = {Maps: lambda o: o[0].flatten(1).T, ChannelsLast: lambda o: o[0].flatten(0, 1)}
                    rows = grid.get(kind, lambda o: o[0, 1:])(output)
                    means.append(sum(rows) / len(rows))
        expected.append(torch.cat(means).numpy())
    close(extras.measure(classifier, Pooled(), pixels, KEYS), expected)


def test_named_blocks_are_pooled_in_the_order_of_their_stages(pixels):
    forwards = extras.measure(toy(Maps, ("body.1", "body.3")), Pooled(), pixels, KEYS)
    classifier = toy(Maps, ("body.3", "body.1"))
    assert list(classifier.taps.stages.items()) == [("body.3", 24), ("body.1", 4)]
    backwards = extras.measure(classifier, Pooled(), pixels, KEYS)
    np.testing.assert_array_equal(backwards, np.hstack([forwards[:, 4:], forwards[:, :4]]))


def test_the_last_stage_of_the_shipped_network_is_its_feature(shipped, photos):
    pooled = extras.measure(shipped, Pooled(), photos, KEYS)
    assert shipped.taps.stages == {f"layer{n}.0": 8 * 2**n for n in (1, 2, 3, 4)}
    close(pooled[:, -128:], shipped.forward(photos)[FEATURE], 1e-6)


def test_a_plain_forward_pass_brings_the_same_bits_along(shipped, photos):
    wanted = [Perturbed(objective="logit", step=0.1), Pooled(), RankReduced(block="last")]
    with extras.beside(shipped, wanted) as found:
        shipped.forward(photos)
    assert list(found) == [Pooled()]
    pooled = extras.measure(shipped, Pooled(), photos, KEYS)
    assert found[Pooled()].numpy().tobytes() == pooled.tobytes()
    assert hooks(shipped.module) == 0


def test_nothing_else_comes_along(shipped, photos):
    with extras.beside(shipped, [RankReduced(block="last")]) as found:
        shipped.forward(photos)
    assert not found


def test_a_residual_network_has_a_stage_for_every_resolution():
    module = torchvision.models.resnet18().eval()
    found = taps.find(module, torch.rand(2, 3, 64, 64))
    assert list(found.stages.items()) == [(f"layer{n}.1", 32 * 2**n) for n in (1, 2, 3, 4)]


def test_a_vision_transformer_has_a_stage_for_every_quarter():
    module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32
    ).eval()
    found = taps.find(module, torch.rand(2, 3, 32, 32))
    names = [f"encoder.layers.encoder_layer_{number}" for number in range(6)]
    assert found.blocks == tuple(names)
    assert list(found.stages.items()) == [(names[number], 16) for number in (1, 2, 4, 5)]


def test_one_block_is_one_stage():
    assert toy(Maps, ("body.2",)).taps.stages == {"body.2": 24}


# ParameterGradient


def gradient_norms(classifier, image, groups, order, temperature):
    """Norm of the gradient in each group of parameters, from one backward pass."""
    network = copy.deepcopy(classifier.module).requires_grad_()
    probability = (network(batch_of_one(classifier, image))[0] / temperature).softmax(dim=0)
    uniform = 1 / len(probability)
    sum(uniform * (math.log(uniform) - each.log()) for each in probability).backward()
    parameters = dict(network.named_parameters())
    norms = []
    for group in groups:
        values = np.concatenate([parameters[name].grad.numpy().ravel() for name in group]).astype(np.float64)
        norms.append((np.abs(values) ** order).sum() ** (1 / order))
    return norms


TOY_LAYERS = [
    (("fc",), False, [["fc.weight"]]),
    (("fc",), True, [["fc.weight", "fc.bias"]]),
    (("fc.bias",), False, [["fc.bias"]]),
    (("body.2.conv.weight",), True, [["body.2.conv.weight"]]),
    (("body.2",), True, [["body.2.conv.weight", "body.2.conv.bias"]]),
    (
        ("fc", "body", "body.0.conv.bias"),
        False,
        [["fc.weight"], [f"body.{n}.conv.weight" for n in range(4)], ["body.0.conv.bias"]],
    ),
]


@pytest.mark.parametrize("order", [0.5, 1, 2, 3, 16])
@pytest.mark.parametrize(("layers", "bias", "groups"), TOY_LAYERS)
def test_gradient_norms_are_those_of_one_backward_pass(pixels, layers, bias, groups, order):
    classifier = toy(Maps)
    for temperature in (1, 3):
        spec = ParameterGradient(layers=layers, order=order, temperature=temperature, bias=bias)
        expected = [gradient_norms(classifier, image, groups, order, temperature) for image in pixels]
        found = extras.measure(classifier, spec, pixels, KEYS)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


class Various(Maps):
    """Layers that factor in different ways, and some that do not factor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 0), (1, 2))
        self.body = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        )
        self.mixed = nn.Linear(8, 8)  # over positions
        self.line = nn.Conv1d(8, 8, 3)
        self.twice = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.mixed(self.body(self.stem(x)).flatten(2).mT))
        y = self.line(tokens.mT).mean(dim=2)
        return self.fc(torch.tanh(self.twice(torch.tanh(self.twice(y)))))


VARIOUS = {
    "stem.weight": True,
    "stem.bias": True,
    "body.0.weight": True,
    "body.2.weight": False,
    "body.3.bias": False,
    "mixed.weight": True,
    "mixed.bias": True,
    "line.weight": False,
    "twice.weight": False,
    "fc.weight": True,
}
"""Whether the gradient of a parameter is found as a product."""


def test_gradients_are_those_of_one_backward_pass_whatever_the_layer(pixels):
    classifier = toy(Various)
    assert {name: gradients._factors(classifier, name) for name in VARIOUS} == VARIOUS
    spec = ParameterGradient(layers=tuple(VARIOUS), order=2)
    expected = [gradient_norms(classifier, image, [[name] for name in VARIOUS], 2, 1) for image in pixels]
    np.testing.assert_allclose(extras.measure(classifier, spec, pixels, KEYS), expected, rtol=2e-5)
    assert hooks(classifier.module) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_the_shipped_network_s_gradients_are_those_of_one_backward_pass(shipped, photos, order):
    inside = ("conv1", "conv2", "shortcut.0")
    layers = {
        "layer3": [f"layer3.0.{name}.weight" for name in inside],
        "layer4.0.conv2": ["layer4.0.conv2.weight"],
        "conv1": ["conv1.weight"],
        "bn1.bias": ["bn1.bias"],
        "fc": ["fc.weight"],
    }
    spec = ParameterGradient(layers=tuple(layers), order=order)
    expected = [gradient_norms(shipped, image, layers.values(), order, 1) for image in photos]
    np.testing.assert_allclose(extras.measure(shipped, spec, photos, KEYS), expected, rtol=1e-4)


@pytest.mark.parametrize("size", [5, 64, 300_001])
@pytest.mark.parametrize("order", [0.5, 1, 2, 3])
def test_the_norm_of_many_entries_has_the_digits_of_each(order, size):
    entries = np.random.default_rng(0).normal(scale=1e-3, size=(3, size)).astype(np.float32)
    exact = [math.fsum(abs(row) ** order) ** (1 / order) for row in entries.astype(np.float64)]
    np.testing.assert_allclose(extras._norm(torch.tensor(entries), order), exact, rtol=3e-7)


class Padded(nn.Conv2d):
    """A convolution of a class of its own."""


def test_layers_of_classes_of_their_own_count_too(pixels):
    classifier = toy(Maps)
    inside = classifier.module.body[2]
    own = Padded(4, 24, 3, 2, 1)
    own.load_state_dict(inside.conv.state_dict())
    spec = ParameterGradient(layers=("body.2",))
    expected = extras.measure(classifier, spec, pixels, KEYS)
    inside.conv = own
    np.testing.assert_allclose(extras.measure(classifier, spec, pixels, KEYS), expected, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
@pytest.mark.parametrize("temperature", [1, 3])
def test_in_the_last_layer_they_equal_the_closed_form(shipped, photos, temperature, order, bias):
    spec = ParameterGradient(layers=("fc",), order=order, temperature=temperature, bias=bias)
    scorer = GradNorm(order=order, temperature=temperature, bias=bias).fit(None)
    found = extras.measure(shipped, spec, photos, KEYS)[:, 0]
    np.testing.assert_allclose(found, -scorer(shipped.forward(photos)), rtol=1e-5)


def test_how_many_gradients_there_is_room_for_changes_nothing(pixels, monkeypatch):
    classifier, spec = toy(Maps), ParameterGradient(layers=("body", "fc"), order=2)
    together = extras.measure(classifier, spec, pixels, KEYS)
    monkeypatch.setattr(extras, "GRADIENTS", 1)
    np.testing.assert_allclose(extras.measure(classifier, spec, pixels, KEYS), together, rtol=1e-5)


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5, 6])
def test_gradients_are_taken_of_equally_many_images_at_a_time(pixels, monkeypatch, room):
    """Else the bits of a norm would depend on where in its batch an image stands."""
    classifier, spec = toy(Maps), ParameterGradient(layers=("fc",))
    taken, per_image = [], gradients.per_image

    def counted(classifier, names, images, temperature):
        taken.append(len(images))
        return per_image(classifier, names, images, temperature)

    monkeypatch.setattr(extras, "GRADIENTS", room * 16 * classifier.module.fc.weight.numel())
    monkeypatch.setattr(gradients, "per_image", counted)
    extras.measure(classifier, spec, pixels, KEYS)
    together = max(number for number in (1, 2, 3, 6) if number <= room)
    assert taken == [together] * (len(pixels) // together)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("boby.1", r"layers: unknown layer 'boby\.1'\. Did you mean 'body\.1'\?"),
        ("fc.weigth", r"layers: unknown layer 'fc\.weigth'\. Did you mean 'fc\.weight'\?"),
        ("body.2.norm", r"layers: unknown layer 'body\.2\.norm'\."),
        ("empty", r"layers: 'empty' has no linear or convolutional layer\. Name another"),
    ],
)
def test_a_layer_without_weights_is_refused(layer, message):
    classifier = toy(Maps)
    classifier.module.empty = nn.Tanh()
    with pytest.raises(UserError, match=message):
        extras.check(ParameterGradient(layers=("fc", layer)), classifier)


@pytest.mark.parametrize("layers", [("fc", "fc"), ("body", "body.0"), ("body.0.conv.weight", "body")])
def test_weights_that_would_count_twice_are_refused(layers):
    with pytest.raises(UserError, match=r"layers: '(fc|body\.0\.conv)\.weight' is in two of them"):
        extras.check(ParameterGradient(layers=layers), toy(Maps))


# check


class Detached(Maps):
    """The body gives no gradients."""

    def leave(self, x: Tensor) -> Tensor:
        return super().leave(x).detach()


class Undecided(Maps):
    """What runs depends on what is in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def leave(self, x: Tensor) -> Tensor:
        return super().leave(self.scale * (x if float(x.sum()) > 0 else -x))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (Detached, Perturbed(objective="log_softmax", step=0.1)),
        (Detached, Perturbed(objective="logit", step=0.1)),
        (Undecided, ParameterGradient(layers=("scale",))),
    ],
)
def test_a_network_that_cannot_be_differentiated_is_refused(kind, spec):
    with pytest.raises(UserError, match=rf"the model does not allow it \({spec.kind}\): .*Drop the detector"):
        extras.check(spec, toy(kind))


@pytest.mark.parametrize(
    "spec", [*PERTURBED[:1], Perturbed(objective="logit", step=0.1, share=0.5)], ids=repr
)
def test_an_input_gradient_that_is_no_number_is_not_taken_for_zero(pixels, spec):
    class Rooted(Maps):
        """Its output is finite, its gradient is 0 times infinity."""

        def leave(self, x: Tensor) -> Tensor:
            return super().leave(x) + (0 * x).sum(dim=(1, 2, 3))[:, None].sqrt()

    classifier = toy(Rooted)
    assert np.isfinite(classifier.forward(pixels)[LOGITS]).all()
    assert np.isnan(extras.measure(classifier, spec, pixels, KEYS)).all()
    with pytest.raises(UserError, match=r"input gradient is not finite \(perturbed\)\. Drop the detector"):
        extras.check(spec, classifier)


def test_a_layer_that_no_gradient_reaches_is_refused():
    spec = ParameterGradient(layers=("fc", "body.3"))
    with pytest.raises(UserError, match=r"layers: no gradient reaches 'body\.3'\. Name another"):
        extras.check(spec, toy(Detached))
    extras.check(ParameterGradient(layers=("fc",)), toy(Detached))


def test_an_extra_of_another_kind_is_refused(shipped):
    class Poled(Pooled):
        """No kind that there is code for."""

    with pytest.raises(UserError, match=r"unknown extra 'Poled'\. Did you mean 'Pooled'\?"):
        extras.check(Poled(), shipped)


@pytest.mark.parametrize(
    "spec",
    [*PERTURBED, RankReduced(block="last"), Pooled(), ParameterGradient(layers=("layer4", "fc"))],
    ids=repr,
)
def test_the_shipped_network_allows_everything_but_dropout(shipped, spec):
    extras.check(spec, shipped)
