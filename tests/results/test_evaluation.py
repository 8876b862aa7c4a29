"""Two runs on the same images are compared row by row, and on other images not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.results.evaluation import Evaluation
from tests.results.test_report import Setup, make_run


def run(folder: Path, name: str, setup: Setup) -> Evaluation:
    made = make_run(folder / name, setup)
    (made / "config.yaml").write_text(yaml.safe_dump({"seed": len(name), "model": {"weights": name}}))
    return Evaluation(made.rename(made.parent / name))


def test_detectors_of_two_runs_are_compared_on_the_same_images(tmp_path: Path) -> None:
    setup = Setup(shift={"grood": 0.5, "knn": 2.0})
    first = run(tmp_path, "first", setup)
    second = run(tmp_path, "second", replace(setup, shift={"grood": 2.0, "knn": 2.0}))
    found = {
        (row["detector"], row["other"], row["dataset"]): row
        for row in first.against(second).to_pylist()
        if row["metric"] == "auroc"
    }
    assert len(found) == 6 * 4  # pairs of four detectors, on two datasets and two groups
    better = found["first/grood", "second/grood", "near_ood"]
    assert better["difference"] < 0
    assert better["p_holm"] < 0.01
    assert found["first/knn", "second/knn", "tin"]["p_value"] == 1  # the same scores
    assert found["first/knn", "second/knn", "tin"]["group"] == "near_ood"


def test_runs_on_other_images_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path, "first", Setup())
    with pytest.raises(
        UserError, match=r"other images in cifar10_test \(100\) than in the first run \(120\)"
    ):
        first.against(run(tmp_path, "second", Setup(rows=100)))
    with pytest.raises(UserError, match="nothing to compare"):
        first.against(first)
    third = run(tmp_path, "third", Setup())
    record = third.record
    for name in ("tin", "svhn"):
        record["datasets"][name]["role"] = "unlabelled"
    (Path(third.folder) / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="nothing to compare"):
        first.against(Evaluation(third.folder))
