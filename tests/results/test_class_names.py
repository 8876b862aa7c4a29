"""Names of classes: found where folders or files tell them, and shown beside the index, which stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.config.schema import Config
from pipeline.results import report
from pipeline.results.class_names import class_names, shown
from pipeline.workflows import bundle

NAMES = ["top", "<trouser>", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def test_class_folders_name_the_classes(
    settings: dict[str, Any], load: Callable[..., Config], tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
    settings["datasets"] = [
        {"name": "val", "role": "id", "format": "imagefolder", "path": str(tmp_path / "val")}
    ]
    assert class_names(load(settings), 2) == ["cat", "dog"]
    assert class_names(load(settings), 3) is None


def test_a_class_without_a_name_or_whose_name_is_the_index_is_the_index() -> None:
    names = {0: "sandal", 1: "1", 2: "10"}
    assert [shown(index, names) for index in range(4)] == ["0 (sandal)", "1", "2 (10)", "3"]


@pytest.fixture
def run(
    settings: dict[str, Any],
    images: Path,
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
) -> Path:
    """An evaluation whose test images lie in folders that a file of names gives their class."""
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    with np.load(images) as arrays:
        for number, (pixels, label) in enumerate(zip(arrays["test_x"], arrays["test_y"], strict=True)):
            folder = tmp_path / "test" / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
    entry = next(each for each in settings["datasets"] if each["name"] == "test")
    entry.update(format="imagefolder", path=str(tmp_path / "test"), labels=str(tmp_path / "classes.json"))
    del entry["images"]
    settings["detectors"] = ["msp"]
    return Path(str(execute(load(settings)).folder))


def test_a_run_keeps_them_and_report_explain_and_bundle_tell_them(run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "manifest.json").read_text())["class_names"] == NAMES
    page = (run / "report" / "index.html").read_text()
    assert re.search(r'<th scope="row" data-value="5">5 \(sandal\)</th>', page)
    assert re.search(r'<li title="sandal/\d+\.png, class 5 \(sandal\), predicted as class \d \(.+\)">', page)
    assert "(<trouser>)" not in page
    listed = pyarrow.csv.read_csv(run / "report" / "classes.csv").to_pylist()
    assert {row["value"]: row["name"] for row in listed} == dict(enumerate(NAMES))

    key = next((tmp_path / "test" / "sandal").iterdir()).name
    arguments = ["explain", str(run), f"sandal/{key}", "--nearest", "1"]
    told = CliRunner().invoke(main.app, [*arguments, "-q", "--html", str(tmp_path / "one.html")])
    first, _, rest = told.output.partition("\n")
    assert re.fullmatch(rf"sandal/{key} of test, class 5 \(sandal\), predicted as class \d \(.+\)", first)
    assert re.search(r"train_x/\d+ .* \d \([a-z<>]+\) +\d \([a-z<>]+\)", rest)
    assert "class 5 (sandal), predicted as class" in (tmp_path / "one.html").read_text()
    said = json.loads(CliRunner().invoke(main.app, [*arguments, "--json"]).stdout)
    assert (said["label"], said["classes"]["5"]) == (5, "sandal")
    assert bundle.make(str(run), tmp_path / "bundle").document["classes"] == NAMES


def test_a_run_of_an_earlier_version_shows_indices(run: Path) -> None:
    record = json.loads((run / "manifest.json").read_text())
    del record["class_names"]
    (run / "manifest.json").write_text(json.dumps(record))
    page = report.write(run, images=3)
    text = page.read_text()
    assert '<th scope="row" data-value="5">5</th>' in text
    assert re.search(r'class \d, predicted as class \d">', text) and "sandal)" not in text
    assert "name" not in pyarrow.csv.read_csv(page.parent / "classes.csv").column_names
