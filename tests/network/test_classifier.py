"""A classifier gives the same bits as the model it was made of, and is known by its weights and source."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from pipeline import quickstart
from pipeline.columns import BLOCK_NORM, FEATURE, LOGITS
from pipeline.config.schema import Extract, Model, Transform
from pipeline.errors import UserError
from pipeline.network import taps
from pipeline.network.classifier import Classifier, feature_norm, load
from pipeline.network.description import same_network
from pipeline.network.sources import _weights
from pipeline.quickstart.resnet import build

FOLDER = Path(quickstart.__file__).parent
GREY = Transform(crop=28, mean=(0.286,), std=(0.353,), channels=1)

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
"""


class Trace:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def model(**fields: Any) -> Model:
    given = {"source": "factory", "name": "pipeline.quickstart.resnet:build", "transform": GREY}
    return Model(**(given | fields))


def random_state(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build().state_dict()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """The quickstart's classifier with its trained weights."""
    return load(model(weights=str(FOLDER / "resnet.safetensors")), seed=0)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(32, 28, 28, 1) real images."""
    with np.load(FOLDER / "images.npz") as arrays:
        return arrays["id_test_x"][:32].reshape(32, 28, 28, 1)


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    """Write a factory file and give its reference."""

    def written(source: str = FACTORY) -> str:
        (tmp_path / "net.py").write_text(source)
        return f"{tmp_path / 'net.py'}:build"

    return written


def hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_forward_gives_the_bits_of_the_plain_model(classifier, pixels):
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.286) / 0.353
    with torch.inference_mode():
        plain = classifier.module(images)
    output = classifier.forward(pixels)
    np.testing.assert_array_equal(output[LOGITS], plain.numpy())
    assert output[FEATURE].shape == (32, 128)
    assert {values.dtype for values in output.values()} == {np.dtype(np.float32)}


def test_the_head_on_the_feature_gives_the_logits(classifier, pixels):
    weight, bias = classifier.head
    output = classifier.forward(pixels)
    rebuilt = output[FEATURE].astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(rebuilt, output[LOGITS], atol=1e-4)


def test_block_norms_are_left_out_on_demand(classifier, pixels):
    with_blocks, without = classifier.forward(pixels), classifier.forward(pixels, blocks=False)
    assert set(with_blocks) - set(without) == {BLOCK_NORM}
    np.testing.assert_array_equal(with_blocks[LOGITS], without[LOGITS])


def test_a_row_does_not_depend_on_the_others_of_its_batch(classifier, pixels):
    alone = classifier.forward(np.repeat(pixels[5:6], 32, axis=0))
    mixed = classifier.forward(pixels)
    moved = classifier.forward(np.roll(pixels, 9, axis=0))
    for name in (FEATURE, LOGITS, BLOCK_NORM):
        np.testing.assert_array_equal(alone[name][0], mixed[name][5])
        np.testing.assert_array_equal(alone[name][31], moved[name][14])


def test_a_view_gives_the_bits_of_a_copy(classifier, pixels):
    copied = classifier.forward(pixels)
    for view in (np.stack([pixels, pixels], axis=4)[..., 0], pixels[..., 0][..., None]):
        assert view.strides != pixels.strides
        given = classifier.forward(view)
        for name in (FEATURE, LOGITS, BLOCK_NORM):
            np.testing.assert_array_equal(given[name], copied[name])


def test_hooks_are_gone_after_a_forward_pass_and_after_an_exception(classifier, pixels):
    classifier.forward(pixels)
    assert hooks(classifier.module) == 0
    with pytest.raises(RuntimeError, match="channels"):
        classifier.forward(np.repeat(pixels, 3, axis=3))
    assert hooks(classifier.module) == 0


def test_the_model_is_frozen_and_in_eval_mode(classifier):
    assert not any(module.training for module in classifier.module.modules())
    assert not any(parameter.requires_grad for parameter in classifier.module.parameters())


def test_images_are_normalised_per_channel(tmp_path):
    transform = Transform(crop=28, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    classifier = load(
        Model(source="torchvision", name="mobilenet_v3_small", weights="random", transform=transform), 0
    )
    pixels = np.random.default_rng(0).integers(256, size=(2, 28, 28, 3), dtype=np.uint8)
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    images = classifier.images(pixels)
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -0.5, 5.0], ids=["signed", "mostly negative", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_norm_is_the_mean_over_channels_of_the_norm_of_the_positive_part(shift, dtype):
    torch.manual_seed(0)
    maps = (torch.randn(3, 5, 4, 6) + shift).to(dtype)
    expected = []
    for image in maps.double().numpy():
        norms = [sum(max(value, 0.0) ** 2 for value in channel.ravel()) ** 0.5 for channel in image]
        expected.append(sum(norms) / len(norms))
    found = feature_norm(maps)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_feature_norm_of_maps_without_a_positive_value_is_zero():
    assert feature_norm(-torch.rand(2, 3, 4, 4)).tolist() == [0, 0]


def test_block_norms_are_the_feature_norms_of_the_blocks_in_their_order(classifier, pixels):
    maps = {}

    def keep(name):
        return lambda _module, _inputs, output: maps.update({name: output})

    blocks = classifier.taps.blocks
    with taps.hooked(classifier.module, {name: keep(name) for name in blocks}):
        found = classifier.forward(pixels)[BLOCK_NORM]
    expected = [np.sqrt((maps[name].double().clip(0).numpy() ** 2).sum((2, 3))).mean(1) for name in blocks]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-6)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "state_dict", "model_state_dict", "model"])
def test_weights_load_from_every_format(tmp_path, kind, prefix):
    state = random_state()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    saved = {prefix + name: tensor for name, tensor in state.items()}
    if kind == "safetensors":
        save_file(saved, path)
    else:
        torch.save(saved if kind == "pt" else {kind: saved, "epoch": 3}, path)
    loaded = load(model(weights=str(path)), seed=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.module.state_dict().items())


def test_weights_of_a_network_fit_a_module_around_it(tmp_path):
    around = torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"own": torch.nn.Linear(3, 2)})})
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "w.pt")
    _weights.load(around, str(tmp_path / "w.pt"))
    assert torch.equal(around["net"]["own"].weight, state["weight"])


def test_a_prefix_is_taken_off_weights_from_before_batch_norms_counted_batches(tmp_path):
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).state_dict()
    del state["0.num_batches_tracked"]
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    _weights.load(network, str(tmp_path / "w.pt"))
    assert torch.equal(network[1].weight, state["1.weight"])


def test_a_prefix_is_not_taken_off_weights_that_have_more_than_the_network(tmp_path):
    saved = {f"module.{name}": tensor for name, tensor in random_state().items()}
    torch.save({**saved, "teacher.fc.bias": torch.zeros(10)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt does not fit the model: .*unexpected .*module\."):
        load(model(weights=str(tmp_path / "w.pt")), seed=0)


def test_random_weights_depend_on_the_seed_alone():
    first, second, other = (load(model(weights="random"), seed) for seed in (3, 3, 4))
    assert first.digest == second.digest != other.digest


def test_the_digest_changes_with_one_weight_and_not_with_the_file(tmp_path):
    state = random_state()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    state["fc.bias"][3] += 1e-6
    save_file(state, tmp_path / "c.safetensors")
    a, b, c = (load(model(weights=str(tmp_path / n)), 0) for n in ("a.safetensors", "b.pt", "c.safetensors"))
    assert a.digest == b.digest
    assert a.digest != c.digest
    assert a.architecture == b.architecture == c.architecture


def test_the_digest_sees_buffers(tmp_path):
    state = random_state()
    first = load(model(weights="random"), seed=1)
    state["bn1.running_mean"][0] = 1
    save_file(state, tmp_path / "a.safetensors")
    assert load(model(weights=str(tmp_path / "a.safetensors")), 0).digest != first.digest


def test_the_architecture_changes_with_the_source_of_the_factory(factory):
    first = load(model(name=factory(), weights="random"), seed=0)
    again = load(model(name=factory(), weights="random"), seed=0)
    changed = load(model(name=factory(FACTORY + "\nTHRESHOLD = 3\n"), weights="random"), seed=0)
    assert first.architecture == again.architecture
    assert first.architecture != changed.architecture
    assert first.digest == changed.digest


def test_the_architecture_and_the_network_change_with_the_options(factory):
    name = factory(FACTORY.replace("build()", "build(classes=3)").replace("26, 3)", "26, classes)"))
    first, other = (
        load(model(name=name, weights="random", options=given), 0) for given in ({}, {"classes": 4})
    )
    assert (len(first.head[1]), len(other.head[1])) == (3, 4)
    assert first.architecture != other.architecture
    with pytest.raises(
        UserError, match=r"model\.options: .*net\.py:build\(.*\) cannot be called with .*'depth'"
    ):
        load(model(name=name, weights="random", options={"depth": 4}), 0)


def test_functions_of_one_file_give_different_architectures(factory):
    name = factory(FACTORY + "\n\ndef other():\n    return build()\n")
    first, other = (
        load(model(name=each, weights="random"), 0) for each in (name, name.replace(":build", ":other"))
    )
    assert first.digest == other.digest
    assert first.architecture != other.architecture


def test_a_factory_may_be_a_method(factory):
    source = FACTORY.replace("def build():", "class Net:\n  @classmethod\n  def build(cls):")
    name = factory(source.replace("    return", "      return")).replace(":build", ":Net.build")
    assert load(model(name=name, weights="random"), 0).taps.head == "3"


@pytest.mark.parametrize("key", ["weights", "pretrained", "checkpoint_path"])
def test_options_cannot_load_weights(key):
    with pytest.raises(ValueError, match=f"options: {key} would load weights; name them in weights"):
        model(options={key: "x.pt"})


def test_an_unknown_source_names_the_closest():
    with pytest.raises(UserError, match=r"model\.source: unknown source 'tim'\. Did you mean 'timm'"):
        load(model(source="tim"), 0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            {"fc.bias": torch.zeros(10)},
            r"\d+ entries missing \(conv1.weight, .*0 unexpec",
        ),
        (
            {**random_state(), "head.weight": torch.ones(1)},
            r"0 entries missing \(\), 1 unexpected \(head.weight",
        ),
        (
            {**random_state(), "fc.bias": torch.zeros(3)},
            r"(.|\n)*size mismatch for fc.b",
        ),
    ],
    ids=["missing", "unexpected", "other shape"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, expected):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=rf"model\.weights: .*w\.safetensors does not fit the model: {expected}"
    ):
        load(model(weights=str(tmp_path / "w.safetensors")), seed=0)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(100)])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"model\.weights: .*{name} (cannot be read|is not a file of tensors)"
    ):
        load(model(weights=str(tmp_path / name)), seed=0)


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path):
    torch.save({"fc.bias": Trace(str(tmp_path / "trace"))}, tmp_path / "w.pt")
    with pytest.raises(
        UserError, match=r"model\.weights: .*w\.pt is not a file of tensors alone, and nothing"
    ):
        load(model(weights=str(tmp_path / "w.pt")), seed=0)
    assert not (tmp_path / "trace").exists()


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: no such file: .*w\.pt"):
        load(model(weights=str(tmp_path / "w.pt")), seed=0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "pipeline.quickstart.resnet:bild"}, r"model\.name: unknown function 'bild'.*mean 'build'"),
        ({"name": "pipeline.quickstart.resnet"}, r"model\.name: got .*expected 'package\.module:function'"),
        ({"name": "pipeline.nowhere:build"}, r"model\.name: cannot import 'pipeline\.nowhere'"),
        ({"name": "pipeline.quickstart:digits"}, r"returned tuple; expected a torch\.nn\.Module"),
        ({"transform": "auto"}, r"model\.transform: a factory has no preset; give crop, mean and std"),
        (
            {"transform": Transform(crop=28, mean=(0.5,) * 3, std=(0.5,) * 3)},
            r"model: it does not run on 3 x 28 x 28 images: .*Check model\.transform",
        ),
    ],
)
def test_a_factory_that_gives_no_model_is_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        load(model(**fields), seed=0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"name": "resnet81"},
            r"model\.name: unknown torchvision model 'resnet81'\. Did you mean 'resnet18'",
        ),
        ({"weights": None}, r"model\.weights: name a weights file"),
        ({"transform": "IMAGENET1K_V7"}, r"model\.transform: unknown preset .*mean 'IMAGENET1K_V1'"),
        ({"name": "resnet50"}, r"model\.transform: .*different transforms; .*IMAGENET1K_V1, IMAGENET1K_V2"),
        (
            {"name": "vit_b_16", "transform": Transform(crop=64, mean=(0.5,) * 3, std=(0.5,) * 3)},
            r"model: it does not run on 3 x 64 x 64 images: Wrong image height.*Check model\.transform",
        ),
    ],
)
def test_a_torchvision_model_that_cannot_be_had_is_refused(fields, expected):
    given = {"source": "torchvision", "name": "resnet18", "weights": "random"}
    with pytest.raises(UserError, match=expected):
        load(Model(**(given | fields)), seed=0)


@pytest.mark.parametrize(("name", "preset"), [("squeezenet1_1", "auto"), ("resnet50", "IMAGENET1K_V2")])
def test_a_preset_is_that_of_torchvision(monkeypatch, name, preset):
    seen = []

    def found(module, images, head, blocks):
        seen.append(tuple(images.shape))
        return taps.Taps({"squeezenet1_1": "classifier.1", "resnet50": "fc"}[name], (), None, ())

    monkeypatch.setattr(taps, "find", found)
    given = load(Model(source="torchvision", name=name, weights="random", transform=preset), seed=0).transform
    weights = torchvision.models.get_model_weights(name)
    theirs = (weights.DEFAULT if preset == "auto" else weights[preset]).transforms()
    assert [given.resize] == theirs.resize_size
    assert [given.crop] == theirs.crop_size
    assert given.interpolation == theirs.interpolation.value
    assert (list(given.mean), list(given.std)) == (theirs.mean, theirs.std)
    assert seen == [(3, 3, given.crop, given.crop)]


def test_what_the_head_gives_to_large_values_is_checked_too(tmp_path):
    code = """
from pipeline.quickstart.resnet import ResNet10
class Clamped(ResNet10):
    def forward(self, x):
        return super().forward(x).clamp(-8, 8)
"""
    (tmp_path / "clamped.py").write_text(code)
    weights = str(FOLDER / "resnet.safetensors")
    with pytest.raises(UserError, match="'fc' applied to its input differs from the model's output"):
        load(model(name=f"{tmp_path}/clamped.py:Clamped", weights=weights), seed=0)


def test_other_behaviour_shows_in_the_answer_to_the_probe(tmp_path):
    """A buffer that is not saved, and a function that the model's file imports."""
    code = """
import torch
from pipeline.quickstart.resnet import ResNet10
import changer
class Net(ResNet10):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor({offset}), persistent=False)
    def forward(self, x):
        return super().forward(changer.change(x))
"""
    found = []
    for helper, body, offset in (("one", "x", 0.0), ("two", "x * 0.5", 0.0), ("three", "x", 1.0)):
        folder = tmp_path / helper
        (folder / "elsewhere").mkdir(parents=True)
        (folder / "elsewhere" / "changer.py").write_text(f"def change(x):\n    return {body}\n")
        (folder / "net.py").write_text(code.format(offset=offset))
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder / "elsewhere"))
            patch.delitem(sys.modules, "changer", raising=False)
            weights = str(FOLDER / "resnet.safetensors")
            classifier = load(model(name=f"{folder}/net.py:Net", weights=weights), seed=0)
            del sys.modules["changer"]
        found.append(classifier)
    one, two, three = found
    assert (one.digest, one.architecture) == (two.digest, two.architecture)
    assert not same_network(one.probe, two.probe)
    assert one.digest != three.digest


SHORT = (
    "CUDA out of memory. Tried to allocate 9.00 GiB. Including non-PyTorch memory, this process has 70 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)


@pytest.mark.parametrize("reason", [*SHORT, "CUDA error: device-side assert triggered"])
def test_a_network_that_does_not_fit_into_the_gpu_names_the_settings(monkeypatch, reason) -> None:
    def short_of_memory(*_: Any, **__: Any) -> None:
        raise (torch.OutOfMemoryError if reason.startswith("CUDA out") else RuntimeError)(reason)

    known = load(model(), seed=0)
    monkeypatch.setattr(torch.nn.Module, "to", short_of_memory)
    text = re.split(r" Including|\n", reason)[0].rstrip(".")
    told = f"model: the network does not fit into the memory of the GPU ({text}). Take a GPU with more, "
    error, message = (UserError, told) if reason in SHORT else (RuntimeError, reason)
    for put in (
        lambda: load(model(), seed=0),
        lambda: known.tuned(Extract(channels_last=True)),
    ):
        with pytest.raises(error, match=re.escape(message)):
            put()
