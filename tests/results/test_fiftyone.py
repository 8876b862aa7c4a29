"""Images of a run as a dataset of FiftyOne: the chosen ones, with what the run says of them.

What asks FiftyOne itself needs its package and a database that it can reach (FIFTYONE_DATABASE_URI).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.schema import Config
from pipeline.data.decode import as_file
from pipeline.errors import UserError
from pipeline.results import fiftyone as work
from pipeline.results.report.review import chosen
from pipeline.results.report.tables import Results
from pipeline.workspace import tables
from tests.results.test_report import Setup, make_run
from tests.results.test_review import folders as folders  # a fixture


def test_without_its_package_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    run = make_run(tmp_path / "runs" / "r", Setup())
    with pytest.raises(
        UserError, match=r"FiftyOne cannot be imported .* pip install 'ood-pipeline\[fiftyone\]'"
    ):
        work.export(str(run))


def test_raw_pixels_become_a_png_with_the_same_pixels_and_encoded_images_stay_as_they_are(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 1), np.uint8)
    file, ending = as_file(pixels.tobytes(), pixels.shape)
    (tmp_path / f"a{ending}").write_bytes(file)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), pixels[:, :, 0])
        image.save(tmp_path / "b.jpg")
    encoded = (tmp_path / "b.jpg").read_bytes()
    assert as_file(encoded, None) == (encoded, ".jpg")


@pytest.fixture
def name() -> Iterator[str]:
    """Of a dataset that FiftyOne has not, and has no more after the test."""
    voxel = pytest.importorskip("fiftyone")
    name = f"test-{uuid4().hex}"
    yield name
    if voxel.dataset_exists(name):
        voxel.delete_dataset(name)


def test_samples_are_the_chosen_images_with_tags_classes_scores_and_p_values(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    import fiftyone

    folders["detectors"] = [{"en.ergy": {"method": "energy"}}, "msp"]
    folders["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id"}
    run = execute(load(folders)).folder
    found = chosen(Results.read(run), 5)

    inside = [image for image in found.images if image.dataset != "animals"]
    made = work.export(str(run), name, 5)
    assert (made.inside, made.gone) == (len({(image.dataset, image.key) for image in inside}), [])
    assert {sample.tags[0] for sample in fiftyone.load_dataset(name)} == {"animals"}

    with pytest.raises(UserError, match=f"FiftyOne has a dataset {name}.*--force"):
        work.export(str(run), name, 5)
    options = ["--name", name, "--images", "5", "--files", str(tmp_path / "written"), "--force"]
    result = CliRunner().invoke(app, ["fiftyone", str(run), *options], catch_exceptions=False)
    assert f"fiftyone app launch {name}" in result.output
    dataset = fiftyone.load_dataset(name)
    assert dataset.persistent
    samples = {(sample.tags[0], sample.key): sample for sample in dataset}
    assert len(samples) == len(dataset)
    assert samples.keys() == {(image.dataset, image.key) for image in found.images}
    for dataset_name, role in {"test": "id", "animals": "near_ood", "textures": "far_ood"}.items():
        table = pa.concat_tables(
            tables.Table.open(run / "scores" / dataset_name).columns(
                ["key", "label", "prediction", "msp", "en.ergy", "p.msp", "p.en.ergy"]
            )
        )
        rows = {row["key"]: row for row in table.to_pylist()}
        own = {key: sample for (where, key), sample in samples.items() if where == dataset_name}
        for key, sample in own.items():
            row = rows[key]
            whys = [image.why for image in found.images if (image.dataset, image.key) == (dataset_name, key)]
            assert sample.tags == [dataset_name, role, *whys]
            assert sample.prediction.label == str(row["prediction"])
            assert (sample.score_msp, sample.score_en_ergy) == (row["msp"], row["en.ergy"])
            assert (sample.p_msp, sample.p_en_ergy) == (row["p.msp"], row["p.en.ergy"])
            known = None if sample.ground_truth is None else sample.ground_truth.label
            assert known == (str(row["label"]) if row["label"] >= 0 else None)
            with Image.open(sample.filepath) as image:
                assert image.size == (28, 28)
            within = tmp_path / ("animals" if dataset_name == "animals" else f"written/{dataset_name}")
            assert Path(sample.filepath).parent == within


def test_images_that_are_gone_are_counted_and_an_export_of_none_leaves_no_dataset(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    import fiftyone

    run = execute(load(folders)).folder
    image = next(image for image in chosen(Results.read(run), 1).images if image.dataset == "animals")
    (tmp_path / "animals" / image.key).unlink()
    assert work.export(str(run), name, 5).gone == [f"animals/{image.key}"]
    for file in (tmp_path / "animals").iterdir():
        file.unlink()
    before = fiftyone.list_datasets()
    with pytest.raises(UserError, match="no image is left"):
        work.export(str(run), name, 5, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--files: "):
        work.export(str(run), name, 5, tmp_path / "file", force=True)
    with pytest.raises(UserError, match="--name: FiftyOne takes no"):
        work.export(str(run), "!", 5, tmp_path / "written")
    assert fiftyone.list_datasets() == before
