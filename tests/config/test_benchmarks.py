"""The bundled benchmark configs: whole, in agreement with each other, and clear about what is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18

from pipeline import imports
from pipeline.cli import main
from pipeline.config import loading
from pipeline.errors import UserError
from pipeline.network import zoo
from pipeline.stages import prepare

OTHERS = ("quickstart", "photos", "photos-sweep")
BENCHMARKS = sorted(path.stem for path in loading.bundled().glob("*.yaml") if path.stem not in OTHERS)
TRAINED_BY_OPENOOD = ("cifar10-resnet18", "cifar100-resnet18", "imagenet200-resnet18")

Refusal = Callable[..., str]


def large(name: str) -> Any:
    """The parameter; networks that take seconds to build are tested with the slow ones."""
    return pytest.param(name, marks=pytest.mark.slow if "vit" in name or "swin" in name else ())


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What `ood-pipeline validate` says in an empty folder before it ends with status 2."""
    monkeypatch.chdir(tmp_path)

    def refused(name: str, *overrides: str) -> str:
        monkeypatch.setenv(imports.FOLDER, "")
        monkeypatch.setattr(sys, "path", sys.path.copy())
        options = [part for override in overrides for part in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["ood-pipeline", "validate", name, *options])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refused


def test_there_is_a_config_for_every_benchmark_and_model() -> None:
    models = ("resnet50", "vit-b-16", "swin-t")
    expected = {*TRAINED_BY_OPENOOD}
    expected |= {f"imagenet1k-{model}" for model in models} | {f"imagenet1k-mos-{model}" for model in models}
    assert set(BENCHMARKS) == expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_our_detectors_on_a_named_protocol(name: str) -> None:
    settings = loading.load(name)
    assert settings.name == name
    assert settings.protocol
    assert {"msp", "maxlogit", "energy", "gradnorm", "dice", "knn", "grood"} <= set(settings.built())
    roles = [dataset.role for dataset in settings.datasets]
    assert roles[:2] == ["train", "id"]
    assert "far_ood" in roles
    assert not any(detector.uses_ood() for detector in settings.built().values())
    unchecked = [dataset.name for dataset in settings.datasets if dataset.expected is None]
    assert unchecked in ([], ["imagenet200_train"])


def test_the_sizes_of_the_protocols_add_up() -> None:
    """Totals over groups, as published; single counts stand in the files."""

    def count(protocol: str, *roles: str) -> int:
        path = loading.bundled() / "protocols" / f"{protocol}.yaml"
        datasets = yaml.safe_load(path.read_text("utf-8"))["datasets"]
        return sum(dataset["expected"] for dataset in datasets if dataset["role"] in roles)

    assert count("openood-imagenet1k", "near_ood") == 54_879
    assert count("openood-imagenet1k", "far_ood") == 31_029
    assert count("openood-imagenet1k", "shifted_id") == 50_000
    assert count("imagenet1k-mos", "far_ood") == 35_640
    assert count("openood-imagenet200", "near_ood", "far_ood") == 54_879 + 31_029


@pytest.mark.parametrize("name", TRAINED_BY_OPENOOD)
def test_weights_lie_beside_the_folder_that_was_given_and_missing_data_are_told_first(
    name, refusal, tmp_path
) -> None:
    assert re.match(r"error: datasets\.\w+\.path: no such file: ", refusal(name, "data=./data"))
    weights = loading.load(name, ["data=./data"]).model.weights
    benchmark = name.removesuffix("-resnet18")
    assert weights.startswith(f"{tmp_path}/results/{benchmark}_resnet18_")
    assert weights.endswith("/s0/best.ckpt")


@pytest.mark.parametrize("name", [large(name) for name in BENCHMARKS])
def test_data_that_are_missing_are_named_with_the_folder_that_was_given(name, refusal, tmp_path) -> None:
    message = refusal(name, "data=./mine", "model.weights=random")
    first = loading.load(name, [f"data={tmp_path}/mine"]).datasets[0]
    assert first.path.startswith(f"{tmp_path}/mine/")
    assert message.startswith(f"error: datasets.{first.name}.path: no such f")
    assert first.path in message


def openood(folder: Path, name: str, classes: int) -> list[str]:
    """A tree as OpenOOD's download script leaves it, with few images; returns what lifts the counts."""
    for dataset in loading.load(name, [f"data={folder}"]).datasets:
        assert dataset.root is not None
        labels = range(classes) if dataset.role == "train" else [0, 1, 2]
        if "ood" in dataset.role:
            labels = [-1, -1]
        lines = []
        for number, label in enumerate(labels):
            path = f"{dataset.name}/some folder/{number:04}.png"
            file = Path(dataset.root) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number % 256, 9, 9)).save(file)
            lines.append(f"{path} {label}\r\n")
        Path(dataset.path).parent.mkdir(parents=True, exist_ok=True)
        Path(dataset.path).write_bytes("".join(lines).encode())
    return [f"datasets.{dataset.name}.expected=null" for dataset in loading.load(name).datasets]


def validate(name: str, folder: Path, *overrides: str) -> prepare.Prepared:
    """What the command `validate` does."""
    return prepare.prepare(loading.load(name, [f"workspace={folder}/workspace", *overrides]))


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cifar10-resnet18", 10), ("cifar100-resnet18", 100), ("imagenet200-resnet18", 200)],
)
def test_a_tree_as_openood_leaves_it_needs_only_one_path(name, classes, tmp_path) -> None:
    counts = openood(tmp_path / "openood" / "data", name, classes)
    weights = Path(str(loading.load(name, [f"data={tmp_path}/openood/data"]).model.weights))
    weights.parent.mkdir(parents=True)
    model = zoo.SmallResNet18(classes) if "cifar" in name else resnet18(num_classes=classes)
    torch.save(model.state_dict(), weights)
    ready = validate(name, tmp_path, f"data={tmp_path}/openood/data", "detectors.knn.k=1", *counts)
    assert [job.manifest.rows for job in ready.jobs.values()][:2] == [classes, 3]
    assert {job.manifest.rows for job in ready.of_role("near_ood", "far_ood")} == {2}
    assert ready.jobs[ready.config.of_role("id")[0].name].manifest.class_count == {0: 1, 1: 1, 2: 1}


def test_a_tree_with_too_few_images_is_refused_with_the_protocol(tmp_path) -> None:
    openood(tmp_path / "data", "cifar10-resnet18", 10)
    with pytest.raises(UserError) as caught:
        validate("cifar10-resnet18", tmp_path, f"data={tmp_path}/data", "model.weights=random")
    assert str(caught.value).startswith("datasets.cifar10_train: 10 images in ")
    assert "OpenOOD v1.5 CIFAR-10 expects 50,000." in str(caught.value)


@pytest.mark.parametrize("model", [large(name) for name in ("resnet50", "vit-b-16", "swin-t")])
def test_samples_of_the_imagenet_tree_need_no_counts(tmp_path, model) -> None:
    name = f"imagenet1k-{model}"
    openood(tmp_path / "data", name, 1000)
    names = [dataset.name for dataset in loading.load(name).datasets]
    samples = [f"datasets.{name}.limit=1000" for name in names]
    overrides = [f"data={tmp_path}/data", "model.weights=random", *samples]
    ready = validate(name, tmp_path, *overrides)
    shifted = [dataset.name for dataset in ready.config.of_role("shifted_id")]
    assert shifted == ["imagenet_v2", "imagenet_c", "imagenet_r"]


def test_the_page_on_benchmarks_names_every_config() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "benchmarks.md").read_text("utf-8")
    assert [name for name in BENCHMARKS if f"`{name}`" not in page] == []
