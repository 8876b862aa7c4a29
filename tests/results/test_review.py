"""Images to look at: the right ones, with their pictures as far as they can be read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pytest
from PIL import Image

from pipeline.config.schema import Config
from pipeline.results.report.review import BUDGET, Review, Shown, _within, review
from pipeline.results.report.tables import Results
from pipeline.workspace import tables
from tests.results.test_report import Setup, make_run


@pytest.fixture
def folders(settings: dict[str, Any], images: Path, tmp_path: Path) -> dict[str, Any]:
    """The small evaluation with its near-OOD images as files, one of which is large."""
    with np.load(images) as arrays:
        pixels = arrays["animals_x"][:60]
    place = tmp_path / "animals"
    place.mkdir()
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(place / f"{number:02}.png")
    entry = next(entry for entry in settings["datasets"] if entry["name"] == "animals")
    entry.update(format="imagefolder", path=str(place))
    del entry["images"]
    settings["detectors"] = ["msp", "energy"]
    return settings


def test_the_images_are_those_with_the_extreme_scores_and_have_their_pictures(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = execute(load(folders)).folder
    results = Results.read(folder)
    found = review(results, 3)
    best, other = results.detectors
    assert (found.detector, found.rivals) == (best, (best, other))

    inside = results.column("test", best)
    scores = results.column("animals", best)
    shown = {
        why: [image for image in found.images if image.dataset == "animals" and image.why == why]
        for why in ("missed", "caught", "disputed")
    }
    assert [image.score for image in shown["missed"]] == sorted(scores)[:3]
    assert [image.score for image in shown["caught"]] == sorted(scores, reverse=True)[:3]
    ranks = [
        [(results.column("test", name) < value).mean() for value in results.column("animals", name)]
        for name in (best, other)
    ]
    spread = np.abs(np.subtract(*ranks))
    assert sorted(spread)[-3:] == [spread[image.row] for image in reversed(shown["disputed"])]
    alarms = [image for image in found.images if image.why == "false alarm"]
    assert [image.score for image in alarms] == sorted(inside, reverse=True)[:3]
    assert {image.dataset for image in alarms} == {"test"}

    for image in found.images:
        assert image.percentile == (inside < image.score).mean()
        with Image.open(io.BytesIO(image.picture)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (28, 28))
        if image.dataset == "animals":
            assert Path(image.uri) == tmp_path / "animals" / image.key
            with Image.open(image.uri) as original, Image.open(io.BytesIO(image.picture)) as picture:
                difference = np.asarray(original.convert("RGB"), float) - np.asarray(picture, float)
            assert np.abs(difference).mean() < 12, "JPEG's loss"
        else:
            assert image.uri == ""
    page = (folder / "report" / "index.html").read_text()
    assert page.count('<li title="') == len(review(results, 6).images)
    listed = pyarrow.csv.read_csv(folder / "report" / "review.csv")
    assert listed["key"].to_pylist() == [image.key for image in review(results, 6).images]

    (tmp_path / "animals" / shown["missed"][0].key).unlink()
    again = {image.key: image for image in review(results, 3).images}
    assert again[shown["missed"][0].key].picture == b""
    assert again[shown["caught"][0].key].picture == shown["caught"][0].picture


def test_images_that_calibrate_are_not_shown(
    settings: dict[str, Any], load: Callable[..., Config], execute: Callable[..., Any]
) -> None:
    settings["detectors"] = ["msp"]
    settings["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id"}
    folder = execute(load(settings)).folder
    found = [image for image in review(Results.read(folder), 4).images if image.dataset == "test"]
    table = pa.concat_tables(
        tables.Table.open(folder / "scores" / "test").columns(["key", "msp", "calibration"])
    )
    tested = table.filter(pc.invert(table["calibration"])).sort_by([("msp", "descending")])
    assert 0 < len(tested) < len(table)
    assert [image.key for image in found] == tested["key"].to_pylist()[:4]


def test_without_listings_images_are_named_without_pictures(tmp_path: Path) -> None:
    found = review(Results.read(make_run(tmp_path, Setup())), 2)
    assert {image.dataset for image in found.images} == {"cifar10_test", "tin", "svhn", "production"}
    assert all(image.key.endswith(".png") and not image.picture and not image.uri for image in found.images)


def test_none_are_shown_if_none_are_wanted(tmp_path: Path) -> None:
    assert review(Results.read(make_run(tmp_path, Setup())), 0) == Review()


def test_pictures_beyond_the_budget_are_left_out() -> None:
    images = [Shown("d", "missed", row, 0.0, 0.0, picture=bytes(BUDGET // 2)) for row in range(3)]
    assert [len(image.picture) for image in _within(images, BUDGET)] == [BUDGET // 2, BUDGET // 2, 0]
