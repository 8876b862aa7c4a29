"""One image explained: the scores are those of the run, and so are the distances to training images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.cli.explain import _page
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.results.evaluation import opened
from pipeline.workflows.explain import FEATURES, Explained, explain, pictures
from pipeline.workspace import tables


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """The run, once it is there; not to be changed."""
    return {}


@pytest.fixture
def run(
    settings: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    kept: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Two OOD sets with the same keys, one of them also as unlabelled images; thresholds."""
    if not kept:
        sets = {entry["name"]: entry for entry in settings["datasets"]}
        sets["textures"]["images"] = "animals_x"
        held = {**sets["test"], "name": "held", "role": "id_val", "images": "held_x", "labels": "held_y"}
        camera = {**sets["animals"], "name": "camera", "role": "unlabelled", "images": "production_x"}
        settings["datasets"] += [held, camera]
        few = {"samples": 64, "class_samples": 10}
        settings["detectors"] = ["msp", {"knn": {"k": 4}}, {"grood": few}, {"nnguide": {"k": 2}}]
        settings["thresholds"] = {"false_alarm": [0.1]}
        made = execute(load(settings)).folder
        workspace = made.parent.parent.parent.rename(tmp_path_factory.mktemp("explained") / "workspace")
        kept["run"] = workspace / made.relative_to(made.parent.parent.parent)
    return str(kept["run"])


def test_what_detectors_say_is_what_the_run_has(run: str) -> None:
    evaluation = opened(run)
    found = explain(run, "production_x/00000007", count=0)
    assert (found.dataset, found.label, found.nearest) == ("camera", -1, {})
    (row,) = (
        pa.concat_tables(
            tables.Table.open(evaluation.folder / "scores" / "camera").columns(
                ["key", "prediction", "msp", "knn", "p.knn", "is_ood.knn"]
            )
        )
        .filter(pa.compute.field("key") == found.key)
        .to_pylist()
    )
    said = {each.detector: each for each in found.said}
    assert set(said) == {"msp", "knn", "grood", "nnguide"}
    knn = said["knn"]
    assert (knn.score, knn.p_value, knn.is_ood) == (row["knn"], row["p.knn"], row["is_ood.knn"])
    inside = evaluation.scores("test", ["knn"])["knn"].to_numpy()
    assert knn.percentile == (inside < row["knn"]).mean()
    assert found.prediction == row["prediction"]
    assert list(found.norms) == evaluation.record["model"]["blocks"]
    assert all(each.is_ood == (each.p_value <= 0.1) for each in explain(run, "test_x/00000003", count=0).said)


def test_the_closest_training_images_are_those_that_detectors_found(run: str) -> None:
    found = explain(run, "production_x/00000093", count=6)
    score = {each.detector: each.score for each in found.said}
    distances = {name: [each.distance for each in near] for name, near in found.nearest.items()}
    assert set(distances) == {FEATURES, "grood", "nnguide"}
    assert all(sorted(each) == each and len(each) == 6 for each in distances.values())
    assert distances[FEATURES][3] == pytest.approx(score["knn"], rel=1e-6), "k = 4"
    assert distances["grood"][0] == pytest.approx(score["grood"], rel=1e-6), "k = 1"
    assert all(each.label == each.prediction for each in found.nearest["grood"]), "only those it keeps"

    train = tables.Table.open(next(Path(run).parents[2].glob("features/train-*")))
    rows = train.read(0, train.rows, ["key", "feature"])
    own = tables.Table.open(next(Path(run).parents[2].glob("features/camera-*")))
    image = own.read(93, 94, ["feature"])["feature"][0].astype(np.float64)
    features = rows["feature"].astype(np.float64)
    angle = features @ image / np.linalg.norm(features, axis=1) / np.linalg.norm(image)
    order = np.argsort(-angle)[:6]
    assert [each.key for each in found.nearest[FEATURES]] == rows["key"][order].tolist()


def test_keys_that_name_no_image_or_several_are_refused(run: str) -> None:
    with pytest.raises(UserError, match=r"animals_x/00000001: is a key of animals, textures\. Name one"):
        explain(run, "animals_x/00000001")
    assert explain(run, "animals_x/00000001", "textures", count=0).dataset == "textures"
    with pytest.raises(UserError, match=r"nothing: no image of animals has this key and scores"):
        explain(run, "nothing", "animals")
    with pytest.raises(UserError, match=r"--dataset: unknown dataset with scores 'animal'.*'animals'"):
        explain(run, "nothing", "animal")


def test_the_command_prints_it_or_a_document(run: str) -> None:
    arguments = ["explain", run, "production_x/00000001", "--nearest", "2", "-q"]
    shown = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert shown.output.startswith("production_x/00000001 of camera, predicted as class ")
    assert "Nearest by grood" in shown.output
    found = json.loads(CliRunner().invoke(main.app, [*arguments, "--json"]).stdout)
    assert found["dataset"] == "camera"
    assert [each["dataset"] for each in found["nearest"]["grood"]] == ["train", "train"]


def test_a_page_shows_the_image_and_its_neighbours(run: str, tmp_path: Path) -> None:
    page = tmp_path / "below" / "one.html"
    arguments = ["explain", run, "production_x/00000001", "--nearest", "2", "-q", "--html", str(page)]
    shown = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert shown.output.endswith(f"page     {page}\n")
    text, found = page.read_text(), explain(run, "production_x/00000001", count=2)
    assert f"<figcaption>predicted as class {found.prediction}<" in text, "it has no class of its own"
    assert text.count("<figure><img") == 1 + sum(map(len, found.nearest.values()))
    assert all(f"<td>{said.detector}</td><td>{said.score:.4g}</td>" in text for said in found.said)
    with np.load(next(iter(places_of(run)))) as arrays:
        expected = [arrays["production_x"][1], *(arrays["train_x"][row] for row in rows_of(found))]
    drawn = [
        np.asarray(Image.open(BytesIO(b64decode(data))).convert("L"), float)
        for data in re.findall(r"base64,([^\"]+)", text)
    ]
    assert all(abs(one - other).mean() < 12 for one, other in zip(drawn, expected, strict=True))


def test_the_page_is_written_though_nobody_reads_the_output(run: str, tmp_path: Path) -> None:
    page = tmp_path / "one.html"
    arguments = ["explain", run, "production_x/00000001", "--html", str(page)]
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    read, write = os.pipe()
    os.close(read)
    subprocess.run(command, stdout=write, stderr=subprocess.DEVNULL, check=False)
    os.close(write)
    assert page.is_file()


def places_of(run: str) -> set[str]:
    """Files of the images of a run."""
    config = yaml.safe_load(Path(run, "config.yaml").read_text())
    return {entry["path"] for entry in config["datasets"]}


def rows_of(found: Explained) -> list[int]:
    """Rows of the neighbours in their array, in the order in which they are shown."""
    return [int(each.key.rpartition("/")[2]) for nearest in found.nearest.values() for each in nearest]


def test_what_cannot_be_read_again_is_said_on_the_page(run: str) -> None:
    found = replace(explain(run, "production_x/00000001", count=1), key="<gone>")
    assert "&lt;gone&gt;" in _page(found, {})
    assert "no picture" in _page(found, {})
    assert ("camera", "<gone>") not in pictures(run, found)
