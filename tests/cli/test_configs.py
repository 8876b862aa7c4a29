"""The command `init`: a first config that the loader takes, of whatever lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.config import loading
from pipeline.errors import UserError


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command in a folder with a few images."""
    for name in ("val/0/a.png", "val/1/b.png", "more/val/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "night time.tar").touch()
    (tmp_path / "net.py").touch()
    (tmp_path / "w.safetensors").touch()
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main.app, ["init", *arguments], catch_exceptions=False)

    return run


def test_it_writes_a_config_of_what_was_named(init: Callable[..., Result], tmp_path: Path) -> None:
    shown = init(
        *("my first.yaml", "--model", "./net.py:build", "--weights", "w.safetensors", "--id", "val"),
        *("--far-ood", "more/val", "--far-ood", "night time.tar"),
    )
    assert shown.exit_code == 0, shown.output
    assert "ood-pipeline validate my first.yaml" in shown.output
    found = loading.load("my first.yaml")
    assert (found.name, found.model.source, found.model.name) == (
        "my-first",
        "factory",
        f"{tmp_path}/net.py:build",
    )
    assert found.model.weights == str(tmp_path / "w.safetensors")
    assert [(each.name, each.role, each.format, each.path) for each in found.datasets] == [
        ("val", "id", "imagefolder", str(tmp_path / "val")),
        ("val-2", "far_ood", "imagefolder", str(tmp_path / "more" / "val")),
        ("night-time", "far_ood", "webdataset", str(tmp_path / "night time.tar")),
    ]
    assert len(found.detectors) > 30


def test_what_lies_below_the_config_moves_with_it(init: Callable[..., Result], tmp_path: Path) -> None:
    model = ("--model", "more/net.py:build", "--weights", "more/weights")
    (tmp_path / "net.py").rename(tmp_path / "more" / "net.py")
    (tmp_path / "more" / "weights").touch()
    assert init("more/a.yaml", *model, "--id", "more/val", "--far-ood", "more/../val").exit_code == 0
    (tmp_path / "away").mkdir()
    moved = (tmp_path / "more").rename(tmp_path / "away" / "moved")
    found = loading.load(str(moved / "a.yaml"))
    assert (found.model.name, found.model.weights) == (f"{moved}/net.py:build", f"{moved}/weights")
    assert [each.path for each in found.datasets] == [str(moved / "val"), str(tmp_path / "val")]


def test_held_out_images_calibrate_thresholds(init: Callable[..., Result]) -> None:
    assert init("a.yaml", "--model", "resnet50", "--id", "val").exit_code == 0
    assert loading.load("a.yaml").thresholds is None
    assert init("b.yaml", "--model", "resnet50", "--id", "val", "--id-val", "more").exit_code == 0
    assert loading.load("b.yaml").thresholds.calibrate_on == "id_val"


@pytest.mark.parametrize("model", ["net.pt2", "./net.py:build"])
def test_a_model_without_a_preset_is_told_to_have_its_transform_written_out(
    init: Callable[..., Result], tmp_path: Path, model: str
) -> None:
    assert init("a.yaml", "--model", model, "--id", "val").exit_code == 0
    assert "transform: auto   # write it out: {resize" in (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(
    ("model", "source", "name"),
    [
        ("resnet50", "torchvision", "resnet50"),
        ("timm:vit_base_patch16_224", "timm", "vit_base_patch16_224"),
        ("net.pt2", "exported", "net.pt2"),
        ("package.module:build", "factory", "package.module:build"),
    ],
)
def test_the_source_follows_from_the_name_of_the_model(
    init: Callable[..., Result], tmp_path: Path, model: str, source: str, name: str
) -> None:
    assert init("a.yaml", "--model", model, "--id", "val").exit_code == 0
    found = loading.load("a.yaml").model
    assert (found.source, Path(found.name).name) == (source, name)


def test_names_that_are_other_things_in_yaml_stay_names(init: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "val").rename(tmp_path / "no")
    assert init("below/null.yaml", "--model", "resnet50", "--id", "no").exit_code == 0
    found = loading.load("below/null.yaml")
    assert (found.name, found.datasets[0].name) == ("null", "no")


def test_nothing_is_written_over_or_half(init: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"there\.yaml: exists already"):
        init("there.yaml", "--model", "resnet50", "--id", "val")
    assert (tmp_path / "there.yaml").read_text() == "mine"
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        init("a.yaml", "--model", "resnet50", "--id", "nowhere")
    assert not (tmp_path / "a.yaml").exists()
