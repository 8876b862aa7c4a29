"""Real ImageNet-1K classifiers on real photos: EfficientNet-Lite on the two that come with scikit-learn."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.config import loading
from pipeline.workspace import files
from tests.stored import newest

PALACE, STUPA, DAISY = 698, 832, 985
ANY_BIRD = "7;8;9"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder as the config wants it: a temple and a flower as ID, their upper left corners as OOD."""
    folder = tmp_path / "photos"
    folder.mkdir()
    temple, flower = (Image.fromarray(image) for image in load_sample_images().images)
    for name, image in (("temple", temple), ("flower", flower), ("again", temple)):
        image.save(folder / f"{name}.jpg", quality=95)
    for name, image in (("sky", temple), ("leaves", flower)):
        image.crop((0, 0, 100, 100)).save(folder / f"{name}.jpg")
    labels = f"temple.jpg,{STUPA};{PALACE}\nflower.jpg,{DAISY}\nagain.jpg,{ANY_BIRD}\n"
    (folder / "id.csv").write_text(f"path,label\n{labels}")
    (folder / "ood.csv").write_text("path,label\nsky.jpg,\nleaves.jpg,\n")
    return folder


def test_photos_are_recognised_and_any_accepted_label_counts(photos, tmp_path, execute) -> None:
    loaded = loading.load("photos", [f"data={photos}", f"workspace={tmp_path}", "tracking.enabled=false"])
    outcome = execute(loaded)
    table = pq.read_table(outcome.folder / "scores" / "photos-id").to_pydict()
    predicted = dict(zip(table["key"], table["prediction"], strict=True))
    assert predicted == {"temple.jpg": PALACE, "flower.jpg": DAISY, "again.jpg": PALACE}
    labels = dict(zip(table["key"], table["label"], strict=True))
    assert labels == {"temple.jpg": PALACE, "flower.jpg": DAISY, "again.jpg": 7}
    rows = files.read_json(outcome.folder / "metrics.json")
    assert next(row["value"] for row in rows if row["metric"] == "id_accuracy") == 2 / 3


@pytest.mark.slow
def test_all_networks_of_the_sweep_know_the_palace_and_stand_in_one_table(photos, tmp_path, undrawn) -> None:
    workspace = tmp_path / "workspace"
    given = ("--set", f"data={photos}", "--set", "tracking.enabled=false", "--workspace", str(workspace))
    words = ["run", "photos-sweep", "--engine", "inline", "--quiet", *given]
    done = CliRunner().invoke(main.app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    names = [f"photos-sweep-lite{size}" for size in (0, 1, 2)]
    assert re.search(rf"Detector +{' +'.join(names)} *\n", done.stdout)
    for name in names:
        table = pq.read_table(newest(workspace, name) / "scores" / "photos-id").to_pydict()
        predicted = dict(zip(table["key"], table["prediction"], strict=True))
        assert [predicted["temple.jpg"], predicted["again.jpg"]] == [PALACE, PALACE], "the flower is no class"
