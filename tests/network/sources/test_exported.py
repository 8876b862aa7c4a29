"""An exported program gives what its network gave, by the same layers, and nothing in its file is run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.export import Dim

from pipeline import detectors
from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import taps
from pipeline.network.classifier import Classifier, load
from pipeline.network.sources import _archive
from pipeline.stages.prepare import check_applies
from tests.network.loaded import Loaded

SIDE = 32
GIVEN = Transform(crop=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)


def export(module: nn.Module, path: Path, dynamic: bool = True) -> str:
    images = torch.rand(2, 3, SIDE, SIDE)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), path)
    return str(path)


def exported(path: str, **fields: Any) -> Classifier:
    return load(Model(**({"source": "exported", "name": path, "transform": GIVEN} | fields)), seed=0)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(SIDE, 8, 4, 2, 12, 24, num_classes=5)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=5)


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


class Mlp(nn.Module):
    """A network whose steps are functions, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIDE * SIDE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(x.flatten(1)))


def plain() -> nn.Module:
    """No module occurs twice, so the blocks are its activations."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


@pytest.mark.parametrize(
    "network", [resnet, *(pytest.param(each, marks=pytest.mark.slow) for each in (vit, swin)), plain]
)
def test_a_program_has_the_output_and_the_taps_of_its_network(network, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network().eval()
    nn.init.normal_(list(module.parameters())[-2])  # the head's weight, which starts with zeros in some
    expected = taps.find(module, torch.rand(2, 3, SIDE, SIDE))
    classifier = exported(export(module, tmp_path / "net.pt2"))
    found = classifier.taps
    assert (found.head, found.blocks, found.early) == (expected.head, expected.blocks, expected.early)
    assert found.blocks
    assert found.layouts == expected.layouts
    pixels = np.random.default_rng(0).integers(256, size=(5, SIDE, SIDE, 3), dtype=np.uint8)
    with torch.inference_mode():
        plain = module(classifier.images(pixels)).numpy()
    output = classifier.forward(pixels)
    np.testing.assert_allclose(output["logits"], plain, rtol=1e-5, atol=1e-5)
    weight, bias = classifier.head
    np.testing.assert_allclose(output["feature"] @ weight.T + bias, plain, atol=1e-4)


def test_detectors_apply_as_to_the_network(tmp_path: Path) -> None:
    classifier = exported(export(resnet().eval(), tmp_path / "net.pt2"))
    with pytest.raises(UserError, match=r"no dropout layer with a rate above 0"):
        check_applies("mcdropout", detectors.get("mcdropout")(), Loaded(classifier))
    for name in detectors.names():
        if name == "mcdropout":
            continue
        check_applies(name, detectors.get(name)(), Loaded(classifier))


def test_a_program_without_blocks_has_no_feature_norm_and_no_layer_to_mix(tmp_path: Path) -> None:
    classifier = exported(export(Mlp().eval(), tmp_path / "net.pt2"))
    assert (classifier.taps.blocks, classifier.taps.early) == ((), None)
    with pytest.raises(UserError, match=r"detectors\.f: the model has no block with maps or tokens"):
        check_applies("f", detectors.get("featurenorm")(), Loaded(classifier))
    with pytest.raises(UserError, match=r"detectors\.g: the model has no block to mix images at.*proto_mean"):
        check_applies("g", detectors.get("grood")(), Loaded(classifier))
    for prototype in ("noise", "proto_mean"):
        check_applies("g", detectors.get("grood")(prototype=prototype), Loaded(classifier))


def test_images_are_mixed_at_a_layer_of_a_program(tmp_path: Path) -> None:
    classifier = exported(export(resnet().eval(), tmp_path / "net.pt2"))
    pixels = np.random.default_rng(0).integers(256, size=(4, SIDE, SIDE, 3), dtype=np.uint8)
    with taps.hooked(classifier.module, {"layer3": lambda _module, _inputs, output: output.flip(0)}):
        mixed = classifier.forward(pixels, blocks=False)["feature"]
    np.testing.assert_array_equal(mixed, classifier.forward(pixels, blocks=False)["feature"][::-1])


def test_equal_files_have_equal_digests_and_another_program_has_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = plain().eval()
    first, again = (exported(export(module, tmp_path / "a.pt2")) for _ in range(2))
    with torch.no_grad():
        module[-1].bias[0] += 1
    other = exported(export(module, tmp_path / "b.pt2"))
    assert first.digest == again.digest != other.digest
    assert first.architecture != other.architecture
    assert exported(str(tmp_path / "b.pt2")).architecture == other.architecture


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weights": "random"}, r"an exported program has its own; leave them out"),
        ({"options": {"depth": 3}}, r"an exported program has its own; leave them out"),
        ({"transform": "auto"}, r"model\.transform: an exported program has no preset; give crop, mean"),
        ({"name": "nowhere.pt2"}, r"model\.name: no such file: nowhere\.pt2"),
        (
            {"transform": Transform(crop=64, mean=(0.5,) * 3, std=(0.5,) * 3)},
            r"model\.transform: the program takes images of 3 x 32 x 32, the transform gives 3 x 64 x 64",
        ),
    ],
)
def test_a_config_that_does_not_go_with_a_program_is_refused(fields, expected, tmp_path: Path) -> None:
    path = export(Mlp().eval(), tmp_path / "net.pt2")
    with pytest.raises(UserError, match=expected):
        exported(**({"path": path} | {"path" if k == "name" else k: v for k, v in fields.items()}))


def test_a_program_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batches of 2 images alone\. Export it with torch\.export\.export"):
        exported(export(Mlp().eval(), tmp_path / "net.pt2", dynamic=False))


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm2d(3)])
def test_a_program_in_training_mode_is_refused(layer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exported in training mode\. Export it with .*model\.eval\(\)"):
        exported(export(nn.Sequential(layer, Mlp()).train(), tmp_path / "net.pt2"))


@pytest.mark.parametrize("content", [b"", b"no program", bytes(100)])
def test_a_file_that_is_no_archive_is_refused(content, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.name: .*net\.pt2 cannot be read: .*torch\.export\.save"):
        exported(str(tmp_path / "net.pt2"))


def test_a_graph_that_torch_does_not_understand_is_refused(tampered) -> None:
    with pytest.raises(
        UserError, match=r"model\.name: torch .* cannot load .*changed\.pt2: .*Export it with"
    ):
        exported(tampered({"models/model.json": lambda _: b"[]"}))


def test_a_file_of_weights_is_no_program(tmp_path: Path) -> None:
    torch.save(Mlp().state_dict(), tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"net\.pt2 has no models/model\.json"):
        exported(str(tmp_path / "net.pt2"))


class Trace:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[[dict[str, Callable[[bytes], bytes]]], str]:
    """Export a program and change members of its archive."""

    def changed(changes: dict[str, Callable[[bytes], bytes]]) -> str:
        source, target = export(Mlp().eval(), tmp_path / "net.pt2"), tmp_path / "changed.pt2"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                change = changes.pop(name.partition("/")[2], bytes)
                new.writestr(name, change(old.read(name)))
            for name, change in changes.items():
                new.writestr(f"net/{name}", change(b""))
        return str(target)

    return changed


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    """Change every entry of these names in a JSON file."""

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        if isinstance(value, dict):
            return {key: changes.get(key, visit(item)) for key, item in value.items()}
        return value

    return lambda content: json.dumps(visit(json.loads(content))).encode()


def test_example_inputs_and_guards_of_an_archive_are_never_run(tampered, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(Trace(trace), buffer)
    path = tampered(
        {
            "data/sample_inputs/model.pt": lambda _: buffer.getvalue(),
            "models/model.json": edited(guards_code=[f"open({str(trace)!r}, 'w')"]),
            "data/aotinductor/model/model.so": lambda _: b"no library",
            "data/constants/opaque_obj_0": lambda _: pickle.dumps(Trace(trace)),
        }
    )
    assert exported(path).taps.head == "fc"
    assert not trace.exists()


@pytest.mark.parametrize("name", ["data/weights/model_weights_config.json"])
def test_pickled_weights_are_refused(tampered, name: str) -> None:
    with pytest.raises(UserError, match=r"holds 'fc\.weight' as a pickled object, and nothing in it was run"):
        exported(tampered({name: edited(use_pickle=True)}))


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0", "../../secret"])
def test_objects_among_the_weights_are_refused(tampered, kind: str) -> None:
    with pytest.raises(UserError, match=r"as a pickled object, and nothing in it was run"):
        exported(tampered({"data/weights/model_weights_config.json": edited(path_name=kind)}))


@pytest.mark.parametrize(
    "target", ["torch.load", "torch.ops.load_library", "_operator.call", "#torch.ops.x", "torch.hub.load"]
)
def test_unknown_operators_are_refused(tampered, target: str) -> None:
    with pytest.raises(UserError, match=r"calls '.*', which is no known operator, and nothing in it was run"):
        exported(tampered({"models/model.json": edited(target=target)}))


def test_sizes_that_are_no_arithmetic_are_refused(tampered) -> None:
    with pytest.raises(UserError, match=r"has the size 'exec\(1\)', which is no arithmetic; nothing was run"):
        exported(tampered({"models/model.json": edited(expr_str="exec(1)")}))


@pytest.mark.parametrize(
    ("expression", "harmless"),
    [
        ("s77", True),
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(9), Symbol('s77', positive=True, integer=True))", True),
        ("2*s77 + 3", True),
        ("-(s77//4)", True),
        ("__import__('os')", False),
        ("Max('__import__(\"os\").getpid()', 1)", False),
        ("Symbol('s77', positive=exec('1'))", False),
        ("Symbol('a b')", False),
        ("Symbol(__import__('os'))", False),
        ("().__class__", False),
        ("[s77 for s77 in (1,)]", False),
        ("(lambda: 1)()", False),
        ("Mul(Integer)(2)", False),
        ("print", False),
        ("s77 +", False),
        ("Symbol()", False),
        ("Symbol(s77)", False),
    ],
)
def test_only_arithmetic_is_a_size(expression: str, harmless: bool) -> None:
    assert _archive._is_arithmetic(expression) is harmless
