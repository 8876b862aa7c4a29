"""Published weights of torchvision come from torch's hub folder, with the transform of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import GoogLeNet_Weights, MobileNet_V3_Small_Weights, get_model

from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import sources

NAME = "mobilenet_v3_small"
FILE = "mobilenet_v3_small-047dcff4.pth"


def model(**fields: Any) -> Model:
    return Model(**({"source": "torchvision", "name": NAME, "weights": "IMAGENET1K_V1"} | fields))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of downloaded weights, and no network."""

    def no_network(url: str, *_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_published_weights_and_their_transform_come_from_the_hub_folder(checkpoints: Path) -> None:
    assert MobileNet_V3_Small_Weights.IMAGENET1K_V1.url.endswith(FILE)
    torch.manual_seed(3)
    state = get_model(NAME, weights=None).state_dict()
    torch.save(state, checkpoints / FILE)
    built = sources.build(model())
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.module.state_dict().items())
    assert (built.transform.resize, built.transform.crop) == (256, 224)


def test_published_weights_have_their_own_transform_where_others_differ(checkpoints: Path) -> None:
    weights = torchvision.models.get_model_weights("mobilenet_v2")
    for name, resize in (("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232)):
        file = checkpoints / weights[name].url.rpartition("/")[2]
        torch.save(get_model("mobilenet_v2", weights=None).state_dict(), file)
        assert sources.build(model(name="mobilenet_v2", weights=name)).transform.resize == resize
    given = Transform(crop=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert sources.build(model(name="mobilenet_v2", transform=given)).transform == given


def test_weights_that_cannot_be_downloaded_say_what_to_fetch_and_where_to_put_it(checkpoints: Path) -> None:
    with pytest.raises(UserError) as caught:
        sources.build(model())
    message = str(caught.value)
    assert message.startswith(f"model.weights: IMAGENET1K_V1 is not in {checkpoints} and cannot be had: ")
    assert f"Fetch {MobileNet_V3_Small_Weights.IMAGENET1K_V1.url} to {checkpoints / FILE} " in message


def test_a_published_file_with_code_is_refused_and_never_run(checkpoints: Path, tmp_path: Path) -> None:
    class Trace:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "trace"), "w"))

    torch.save({"weight": Trace()}, checkpoints / FILE)
    with pytest.raises(UserError, match="is not a file of tensors alone, and nothing in it was run"):
        sources.build(model())
    assert not (tmp_path / "trace").exists()


def test_unknown_published_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown published weights 'IMAGENET1K_V3'.*mean 'IMAGENET1K_V1'"):
        sources.build(model(weights="IMAGENET1K_V3"))


@pytest.mark.parametrize(
    ("transform", "inside"),
    [("IMAGENET1K_V1", True), ("auto", True), (Transform(crop=64, mean=(0,) * 3, std=(1,) * 3), False)],
)
def test_googlenet_converts_the_normalisation_of_its_preset(transform, inside) -> None:
    built = sources.build(model(name="googlenet", weights="random", transform=transform))
    assert built.module.transform_input is inside
    assert GoogLeNet_Weights.IMAGENET1K_V1.transforms().mean == [0.485, 0.456, 0.406]


def test_options_reach_the_constructor() -> None:
    built = sources.build(model(weights="random", options={"num_classes": 7}))
    assert built.module.classifier[-1].out_features == 7
    assert built.code != sources.build(model(weights="random")).code


def test_options_that_a_model_does_not_take_are_refused(checkpoints: Path) -> None:
    with pytest.raises(UserError, match=r"model\.options: torchvision's resnet18 does not take.*'x'"):
        sources.build(model(name="resnet18", weights="random", options={"x": 1}))
    torch.save(get_model(NAME, weights=None).state_dict(), checkpoints / FILE)
    with pytest.raises(UserError, match=r"model\.options: .*num_classes"):
        sources.build(model(options={"num_classes": 7}))
