"""Networks that published checkpoints are loaded into."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import loading, schema
from pipeline.network import classifier, zoo


def test_the_small_resnet18_has_the_modules_of_the_published_checkpoints() -> None:
    """Key names as in OpenOOD's resnet18_32x32; shapes as in the paper."""
    state = zoo.SmallResNet18(10).state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{name}" for name in norm)}
    for stage in range(1, 5):
        for block in range(2):
            where = f"layer{stage}.{block}"
            expected |= {f"{where}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{where}.bn{i}.{name}" for i in (1, 2) for name in norm}
        if stage > 1:
            expected |= {f"layer{stage}.0.shortcut.0.weight"}
            expected |= {f"layer{stage}.0.shortcut.1.{name}" for name in norm}
    assert set(state) == expected
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer4.0.shortcut.0.weight"].shape == (512, 256, 1, 1)
    parameters = sum(parameter.numel() for parameter in zoo.SmallResNet18(10).parameters())
    assert parameters == 11_173_962


@pytest.mark.parametrize(("name", "maps"), [("cifar10", 4), ("cifar100", 4), ("imagenet200", 7)])
def test_every_network_has_the_taps_that_the_detectors_need(name, maps) -> None:
    settings = loading.load(f"{name}-resnet18").model
    assert isinstance(settings.transform, schema.Transform)
    found = classifier.load(settings.model_copy(update={"weights": "random"}), seed=0)
    assert found.head[0].shape == (int(name.removeprefix("cifar").removeprefix("imagenet")), 512)
    assert found.taps.blocks == tuple(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))
    assert found.taps.early == "layer3.1"
    last = found.module.get_submodule("layer4")
    shapes = []
    last.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    found.module(torch.zeros(1, 3, settings.transform.crop, settings.transform.crop))
    assert shapes == [(1, 512, maps, maps)]
