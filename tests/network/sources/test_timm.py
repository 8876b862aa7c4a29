"""Models of timm come by name, with timm's own transform to the pixel, or with a reason why not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.config.schema import Model, Transform
from pipeline.data import decode
from pipeline.errors import UserError
from pipeline.network import sources

timm = pytest.importorskip("timm")
GIVEN = Transform(crop=32, mean=(0.5,) * 3, std=(0.5,) * 3)


def model(name: str, **fields: Any) -> Model:
    return Model(**({"source": "timm", "name": name, "weights": "random"} | fields))


@pytest.mark.parametrize("name", ["convnext_atto.d2_in1k", "resnet18.a1_in1k", "mobilenetv4_conv_small"])
def test_the_transform_is_that_of_timm_to_the_pixel(name, tmp_path):
    built = sources.build(model(name))
    data = timm.data.resolve_model_data_config(built.module, use_test_size=True)
    theirs = timm.data.create_transform(**data, is_training=False)
    pixels = np.random.default_rng(0).integers(256, size=(333, 421, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours = decode.decode((tmp_path / "image.png").read_bytes(), None, built.transform)
    mean, std = (np.array(values, np.float32) for values in (built.transform.mean, built.transform.std))
    normalised = (ours.astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(
        normalised.transpose(2, 0, 1), theirs(Image.fromarray(pixels)).numpy(), atol=1e-6
    )


def test_the_size_is_that_of_the_published_test():
    trained = timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert trained.input_size != trained.test_input_size
    assert sources.build(model("resnet18.a1_in1k")).transform.crop == trained.test_input_size[1]


def test_options_reach_the_constructor():
    built = sources.build(model("resnet18", options={"num_classes": 7, "in_chans": 1}, transform=GIVEN))
    assert built.module.fc.out_features == 7
    assert built.module.conv1.in_channels == 1


def test_weights_load_from_a_file(tmp_path: Path):
    torch.manual_seed(5)
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    built = sources.build(model("test_resnet", weights=str(tmp_path / "weights.safetensors")))
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.module.state_dict().items())
    with pytest.raises(UserError, match=r"does not fit the model.*(.|\n)*size mismatch(.|\n)*model\.options"):
        sources.build(
            model("test_resnet", weights=str(tmp_path / "weights.safetensors"), options={"num_classes": 3})
        )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "resnet_18"}, r"model\.name: unknown timm model 'resnet_18'\. Closest: (.*, )?resnet18"),
        ({"name": "hf-hub:timm/resnet18"}, r"model\.name: unknown timm model 'hf-hub:timm/resnet18'"),
        ({"name": "resnet18.a9_in1k"}, r"resnet18 has no variant 'resnet18\.a9_in1k'\. Closest: .*a1_in1k"),
        ({"weights": None}, r"model\.weights: name a weights file"),
        ({"weights": "IMAGENET1K_V1"}, r"model\.weights: no such file: IMAGENET1K_V1"),
        ({"transform": "IMAGENET1K_V1"}, r"model\.transform: timm has no preset 'IMAGENET1K_V1'"),
        ({"options": {"classes": 3}}, r"model\.options: timm's resnet18 does not take them: .*'classes'"),
        (
            {"name": "vit_base_patch16_sapiens2.fb"},
            r"model\.transform: this model scales images in crop mode 'squash'.*not supported",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        sources.build(model(**({"name": "resnet18"} | fields)))


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"input_size": (3, 64, 96)}, r"takes 64 x 96 images, which are not square"),
        ({"crop_mode": "border"}, r"crop mode 'border'"),
        (
            {"interpolation": "lanczos"},
            r"model\.transform: timm's own is not supported: interpolation: .*lanczos",
        ),
    ],
)
def test_a_transform_that_is_not_ours_is_refused(overlay, expected):
    options = {"pretrained_cfg_overlay": overlay}
    with pytest.raises(UserError, match=expected):
        sources.build(model("test_resnet", options=options))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model\.source: timm cannot .* pip install 'ood-pipeline\[timm\]'"):
        sources.build(model("resnet18"))
