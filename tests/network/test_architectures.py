"""What is found in published architectures, and which detectors apply to them: the table of docs/models.md.

Random weights, and small images where the architecture takes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import detectors
from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import taps
from pipeline.network.classifier import Classifier, load
from pipeline.stages.prepare import check_applies
from tests.network.loaded import Loaded

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "models.md"
ALL = "all"


@dataclass(frozen=True)
class Row:
    """One architecture; `size` and `options` make it small enough for a test."""

    source: str
    name: str
    head: str
    width: int
    blocks: int
    early: str
    applies: str = ALL
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def documented(self) -> str:
        cells = f"`{self.name}`", f"`{self.head}`", self.width, self.blocks, f"`{self.early}`", self.applies
        return "| " + " | ".join(map(str, (self.source, *cells))) + " |"


SMALL = {"img_size": 64}
TABLE = (
    Row("torchvision", "resnet18", "fc", 512, 8, "layer3.1"),
    Row("torchvision", "resnet50", "fc", 2048, 16, "layer3.5"),
    Row("torchvision", "wide_resnet50_2", "fc", 2048, 16, "layer3.5"),
    Row("torchvision", "resnext50_32x4d", "fc", 2048, 16, "layer3.5"),
    Row("torchvision", "densenet121", "classifier", 1024, 7, "features.denseblock3"),
    Row("torchvision", "mobilenet_v2", "classifier.1", 1280, 19, "features.13"),
    Row("torchvision", "mobilenet_v3_small", "classifier.3", 1024, 13, "features.8"),
    Row("torchvision", "efficientnet_b0", "classifier.1", 1280, 18, "features.5.2"),
    Row("torchvision", "efficientnet_v2_s", "classifier.1", 1280, 42, "features.5.8"),
    Row("torchvision", "regnet_y_400mf", "fc", 440, 4, "trunk_output.block3"),
    Row("torchvision", "convnext_tiny", "classifier.2", 768, 18, "features.5.8"),
    Row("torchvision", "vgg11_bn", "classifier.6", 4096, 8, "features.20"),
    Row("torchvision", "shufflenet_v2_x0_5", "fc", 1024, 16, "stage3.7"),
    Row("torchvision", "mnasnet0_5", "classifier.1", 1280, 16, "layers.11.1"),
    Row("torchvision", "googlenet", "fc", 1024, 12, "inception4e"),
    Row("torchvision", "inception_v3", "fc", 2048, 16, "Mixed_6e", size=128),
    Row(
        "torchvision",
        "vit_b_16",
        "heads.head",
        768,
        12,
        "encoder.layers.encoder_layer_8",
        options={"image_size": 64},
    ),
    Row("torchvision", "swin_t", "head", 768, 15, "features.5.5"),
    Row("torchvision", "maxvit_t", "classifier.5", 512, 6, "blocks.2", size=224),
    Row("timm", "vit_tiny_patch16_224", "head", 192, 12, "blocks.8", options=SMALL),
    Row("timm", "deit_tiny_patch16_224", "head", 192, 12, "blocks.8", options=SMALL),
    Row("timm", "deit_tiny_distilled_patch16_224", "head_dist.mean", 384, 12, "blocks.8", options=SMALL),
    Row("timm", "levit_128s", "head_dist.linear.mean", 384, 7, "stages.1", size=224),
    Row("timm", "beit_base_patch16_224", "head", 768, 12, "blocks.8", options=SMALL),
    Row("timm", "mixer_s32_224", "head", 512, 8, "blocks.5", options=SMALL),
    Row("timm", "convnext_atto", "head.fc", 320, 4, "stages.2"),
    Row("timm", "resnetv2_50x1_bit", "head.fc", 2048, 4, "stages.2"),
    Row("timm", "tf_efficientnet_lite0", "classifier", 1280, 15, "blocks.4.2"),
    Row("timm", "efficientnet_lite0", "classifier", 1280, 15, "blocks.4.2"),
    Row("timm", "mobilenetv4_conv_small", "classifier", 1280, 17, "blocks.2.5"),
)


QUICK = {"resnet18", "mobilenet_v3_small", "swin_t", "vit_tiny_patch16_224", "convnext_atto"}
"""One of each kind; the others take minutes."""


def parameters() -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(row, id=row.name, marks=() if row.name in QUICK else slow) for row in TABLE]


@pytest.fixture(scope="module", params=parameters())
def made(request: pytest.FixtureRequest) -> tuple[Row, Classifier]:
    row = request.param
    pytest.importorskip(row.source)
    transform = Transform(crop=row.size, mean=(0.5,) * 3, std=(0.5,) * 3)
    options = {"source": row.source, "name": row.name, "options": row.options, "transform": transform}
    classifier = load(Model(weights="random", **options), seed=0)
    head = classifier.module.get_submodule(classifier.taps.head)
    torch.nn.init.normal_(head.weight, std=0.05)  # some start with zeros, which fit any feature
    weight, bias = taps.head_weight(head)
    found = taps.find(classifier.module, torch.rand(2, 3, row.size, row.size))
    return row, replace(classifier, taps=found, head=(weight.numpy(), bias.numpy()))


def test_taps_are_found_and_the_head_on_the_feature_gives_the_logits(made: tuple[Row, Classifier]) -> None:
    row, classifier = made
    found = classifier.taps
    assert (found.head, len(found.blocks), found.early) == (row.head, row.blocks, row.early)
    assert {row.early, *found.blocks} <= set(found.layers)
    pixels = np.random.default_rng(0).integers(256, size=(2, row.size, row.size, 3), dtype=np.uint8)
    output = classifier.forward(pixels)
    with torch.inference_mode():
        plain = classifier.module(classifier.images(pixels)).numpy()
    np.testing.assert_array_equal(output["logits"], plain)
    assert np.ptp(plain, axis=1).min() > 0
    assert output["feature"].shape == (2, row.width)
    weight, bias = classifier.head
    rebuilt = output["feature"].astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(rebuilt, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).max()))
    assert output["block_norm"].shape == (2, row.blocks)
    assert np.isfinite(output["block_norm"]).all()
    assert (output["block_norm"] > 0).any(axis=0).all()


def test_each_detector_applies_or_says_why_not(made: tuple[Row, Classifier]) -> None:
    _, classifier = made
    dropouts = [each for each in classifier.module.modules() if isinstance(each, torch.nn.Dropout) and each.p]
    for name in detectors.names():
        detector = detectors.get(name)()
        if name == "mcdropout" and not dropouts:
            with pytest.raises(UserError, match="the model has no dropout layer"):
                check_applies(name, detector, Loaded(classifier))
            continue
        check_applies(name, detector, Loaded(classifier))


def test_squeezenet_has_no_linear_last_layer() -> None:
    transform = Transform(crop=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(
        UserError, match=r"'classifier\.1' runs at every position.* such as a ReLU, lies betw"
    ):
        load(Model(source="torchvision", name="squeezenet1_1", weights="random", transform=transform), seed=0)


def test_the_documented_table_is_this_one() -> None:
    documented = re.findall(r"^\| (?:torchvision|timm) \| .*\|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    expected = [row.documented for row in TABLE]
    assert [line for line in documented if "squeezenet" not in line] == expected
