"""The bundled benchmark configs: whole, in agreement with each other, and clear about what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline import cli, config, imports

BENCHMARKS = sorted(path.stem for path in config.bundled().glob("*.yaml") if path.stem != "quickstart")
TRAINED_BY_OPENOOD = ("cifar10-resnet18", "cifar100-resnet18", "imagenet200-resnet18")
MOS = ("imagenet1k-mos-resnet50", "imagenet1k-mos-vit-b-16", "imagenet1k-mos-swin-t")

Refusal = Callable[..., str]


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
            cli.main()
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
    settings = config.load(name)
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
        path = config.bundled() / "protocols" / f"{protocol}.yaml"
        datasets = yaml.safe_load(path.read_text("utf-8"))["datasets"]
        return sum(dataset["expected"] for dataset in datasets if dataset["role"] in roles)

    assert count("openood-imagenet1k", "near_ood") == 54_879
    assert count("openood-imagenet1k", "far_ood") == 31_029
    assert count("openood-imagenet1k", "shifted_id") == 50_000
    assert count("imagenet1k-mos", "far_ood") == 35_640
    assert count("openood-imagenet200", "near_ood", "far_ood") == 54_879 + 31_029


@pytest.mark.parametrize("name", TRAINED_BY_OPENOOD)
def test_weights_that_are_missing_are_named_with_the_folder_that_was_given(name, refusal, tmp_path) -> None:
    message = refusal(name, "data=./data")
    benchmark = name.removesuffix("-resnet18")
    assert message.startswith(f"error: model.weights: no such file: {tmp_path}/results/{benchmark}_resnet18_")
    assert message.endswith("/s0/best.ckpt\n")


@pytest.mark.parametrize("name", MOS)
def test_data_that_are_missing_are_named_with_the_folder_that_was_given(name, refusal, tmp_path) -> None:
    message = refusal(name, "data=./mine", "model.weights=random")
    first = config.load(name, [f"data={tmp_path}/mine"]).datasets[0]
    assert first.path.startswith(f"{tmp_path}/mine/")
    assert message.startswith(f"error: datasets.{first.name}.path: no such folder: {first.path}")


def test_the_page_on_benchmarks_names_every_config() -> None:
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text("utf-8")
    assert [name for name in BENCHMARKS if f"`{name}`" not in page] == []
