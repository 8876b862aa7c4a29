"""The network on a GPU: what it gives is what a CPU gives, up to rounding, and the same bits every time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from pipeline import quickstart
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LOGITS, Pixels
from pipeline.config import loading
from pipeline.config.schema import Extract, Model, Transform
from pipeline.detectors.base import Dropped, Extra, ParameterGradient, Perturbed, Pooled, RankReduced
from pipeline.errors import UserError
from pipeline.network import extras
from pipeline.network.classifier import Classifier, load
from pipeline.stages import decoding, estimate, extract
from pipeline.stages.shards import Plan

pytestmark = pytest.mark.gpu

_log = logging.getLogger(__name__)

ROUNDING = 1e-4
"""Of the largest value. Sums of float32 products in another order, or by another algorithm of cuDNN, were far
below 1e-5 between CPUs; TF32, which keeps 10 bits of a factor, would be near 1e-3."""

TOLERANCES = {
    FEATURE: ROUNDING,
    LOGITS: ROUNDING,
    BLOCK_NORM: ROUNDING,
    "pooled": ROUNDING,
    "dropped": ROUNDING,
    # A sign of a gradient, or a pixel among those with small ones, may be another where it is all but zero:
    # weights that differ by 3e-7 of themselves gave 2e-4.
    "perturbed": 5e-3,
    # What is left without the largest singular value is small beside the maps whose rounding it has.
    "rank_reduced": 1e-3,
    # A ReLU whose input is all but zero may be on its other side, and takes its share of the gradient along.
    "parameter_gradient": 1e-3,
}
"""Largest differences of columns, as parts of the largest value."""

NETWORKS = """
import torch
import torchvision

def resnet18():
    return torchvision.models.resnet18(num_classes=20)

def vit():
    network = torchvision.models.VisionTransformer(32, 8, 4, 4, 64, 128, dropout=0.1, num_classes=20)
    torch.nn.init.normal_(network.heads.head.weight)
    return network
"""

COMMON: tuple[Extra, ...] = (
    Perturbed(objective="log_softmax", step=0.0014, temperature=1000),
    Perturbed(objective="logit", step=0.002, pixels=True, share=0.05),
    RankReduced(block="last"),
    RankReduced(block="early"),
    Pooled(),
)
EXTRAS: dict[str, tuple[Extra, ...]] = {
    "quickstart": (*COMMON, ParameterGradient(layers=("fc", "layer4"))),
    "resnet18": (*COMMON, ParameterGradient(layers=("fc", "layer4"))),
    "vit": (
        *COMMON,
        ParameterGradient(layers=("heads.head", "encoder.layers.encoder_layer_3.mlp")),
        Dropped(samples=3),
    ),
}


@dataclass(frozen=True)
class Case:
    """A network and images for it."""

    name: str
    plan: Plan
    pixels: Pixels

    def with_settings(self, **changes: object) -> Case:
        settings = self.plan.settings.model_copy(update=changes)
        return replace(self, plan=replace(self.plan, settings=settings))

    def classifier(self) -> Classifier:
        return extract.load_in_worker(self.plan, 1, compiled=self.plan.settings.compile)

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Features and extras by a name, by a classifier that is loaded anew."""
        classifier, keys = self.classifier(), [f"{row}.png" for row in range(len(self.pixels))]
        found = classifier.forward(self.pixels)
        for number, spec in enumerate(EXTRAS[self.name]):
            found[f"{spec.kind} {number}"] = extras.measure(classifier, spec, self.pixels, keys)
        return found


@pytest.fixture(scope="module", params=list(EXTRAS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name: str = request.param
    if name == "quickstart":
        model = loading.load("quickstart").model
        with np.load(Path(quickstart.__file__).parent / "images.npz") as arrays:
            pixels = arrays["id_test_x"][:48, ..., None]
    else:
        side = {"resnet18": 64, "vit": 32}[name]
        file = tmp_path_factory.mktemp("networks") / "networks.py"
        file.write_text(NETWORKS)
        transform = Transform(crop=side, mean=(0.5,) * 3, std=(0.25,) * 3)
        model = Model(source="factory", name=f"{file}:{name}", transform=transform)
        pixels = np.random.default_rng(0).integers(0, 256, (48, side, side, 3), np.uint8)
    loaded = load(model, 0)
    settings = Extract(batch_size=len(pixels), gpus_per_actor=1)
    return Case(name, Plan(model, settings, 0, loaded.digest, loaded.transform, loaded.probe), pixels)


def differences(found: dict[str, NDArray[np.float32]], expected: dict[str, NDArray[np.float32]]) -> str:
    """The columns that differ by more than their tolerance, with their largest difference."""
    wrong = []
    for name, values in expected.items():
        difference = float(np.abs(found[name] - values).max() / np.abs(values).max())
        _log.info("%s differs by %.1e of the largest value", name, difference)
        if not difference <= TOLERANCES[name.split()[0]]:
            wrong.append(f"{name} {difference:.1e}")
    return ", ".join(wrong)


def test_features_extras_and_gradients_are_those_of_the_cpu(case: Case) -> None:
    assert case.classifier().device == "cuda"
    assert differences(case.columns(), case.with_settings(device="cpu").columns()) == ""


def test_two_workers_give_the_same_bits(case: Case) -> None:
    one, other = case.columns(), case.columns()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_a_row_does_not_depend_on_the_others_of_its_batch(case: Case) -> None:
    classifier = case.classifier()
    order = np.random.default_rng(1).permutation(len(case.pixels))
    whole, shuffled = classifier.forward(case.pixels), classifier.forward(case.pixels[order])
    for name, values in whole.items():
        np.testing.assert_array_equal(shuffled[name], values[order], err_msg=name)


def test_batches_that_are_begun_one_after_the_other_keep_their_results(case: Case) -> None:
    """However far the GPU is when they are fetched."""
    classifier, size = case.classifier(), len(case.pixels)
    batches = [np.roll(case.pixels, number, axis=0) for number in range(5)]
    alone = [classifier.forward(batch) for batch in batches]
    begun = [classifier.begin(batch, size) for batch in batches]
    for fetch, expected in zip(begun, alone, strict=True):
        for name, values in fetch().items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.filterwarnings("default")  # the compiler warns of what it could do faster
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"channels_last": True}, ROUNDING),
        ({"compile": True}, ROUNDING),
        # 8 and 11 bits are kept of every value between layers.
        ({"precision": "bf16"}, 0.06),
        ({"precision": "fp16"}, 0.01),
        ({"precision": "bf16", "channels_last": True}, 0.06),
        ({"precision": "bf16", "channels_last": True, "compile": True}, 0.06),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_other_numerics_stay_close_to_the_cpu(
    case: Case, changes: dict[str, object], tolerance: float
) -> None:
    expected = case.with_settings(device="cpu").classifier().forward(case.pixels)
    found = case.with_settings(**changes).classifier().forward(case.pixels)
    wrong = {}
    for name, values in expected.items():
        difference = float(np.abs(found[name] - values).max() / np.abs(values).max())
        _log.info("%s differs by %.1e of the largest value", name, difference)
        if not difference <= tolerance:
            wrong[name] = difference
    assert wrong == {}
    assert all(values.dtype == np.float32 for values in found.values())


@pytest.fixture
def little_memory() -> Iterator[None]:
    """This process may have a hundredth of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture
def large(case: Case) -> Pixels:
    """A batch whose maps alone take more than that."""
    each = {"quickstart": 16 * 28 * 28, "resnet18": 64 * 32 * 32, "vit": 17 * 128}[case.name] * 4
    memory = torch.cuda.get_device_properties(0).total_memory
    return np.resize(case.pixels, (int(0.015 * memory / each), *case.pixels.shape[1:]))


SHORT = r"^extract\.(extras_)?batch_size: \d+ images do not fit into the memory of the GPU \(CUDA out of mem"


def test_a_batch_that_does_not_fit_names_the_key_to_lower(
    case: Case, large: Pixels, little_memory: None
) -> None:
    classifier = case.classifier()
    with pytest.raises(UserError, match=SHORT):
        classifier.forward(large)
    with pytest.raises(UserError, match=SHORT):
        extras.measure(classifier, EXTRAS[case.name][0], large, ["key"] * len(large))
    gc.collect()  # what was raised holds tensors
    assert classifier.forward(case.pixels)[FEATURE].shape[0] == len(case.pixels)


def test_the_search_for_a_batch_size_ends_where_memory_does(
    case: Case, large: Pixels, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({KEY: [f"{row}" for row in range(len(case.pixels))]})
    decoded = decoding.Decoded(case.pixels, table.to_pylist(), [])
    monkeypatch.setattr(decoding, "decode_rows", lambda *_: decoded)
    monkeypatch.setattr(estimate, "_SECONDS", 0.1)
    found = estimate.Prober(case.plan, 1).measure(table, [16, len(large), 32])
    assert list(found.forward) == [16]
