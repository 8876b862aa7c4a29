"""Which detector to take, in words: every number is one of the metrics, and what is level is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.results.report.tables import Results
from pipeline.results.report.verdict import verdict
from tests.results.test_report import Setup, make_run

THREE = ("grood", "knn", "featurenorm")
BETTER = {"grood": 3.0, "knn": 2.5, "featurenorm": 1.0}


def told(folder: Path, **changes: object) -> tuple[Results, list[str]]:
    results = Results.read(make_run(folder, Setup(**changes)))
    return results, verdict(results)


def test_the_best_is_named_with_its_values_and_what_it_misses(tmp_path: Path) -> None:
    results, sentences = told(tmp_path, detectors=THREE, shift=BETTER)
    rows = {
        (row["group"], row["dataset"], row["metric"]): row
        for row in results.metrics.to_pylist()
        if row["detector"] == "grood"
    }
    near, far = (rows[group, group, "auroc"] for group in ("near_ood", "far_ood"))
    first, second, third = sentences
    assert first.startswith(
        f"grood, GROOD (2025), ranks best: AUROC {near['value']:.3f} ({near['ci_low']:.3f}–"
    )
    assert f"{far['value']:.3f} (" in first
    assert second == "On the same images its lead over every other is more than chance."
    missed = {key: f"{row['value']:.0%}" for key, row in rows.items() if key[2] == "fpr95_id"}
    worst = max(("tin", "svhn"), key=lambda name: rows[Setup().ood[name], name, "fpr95_id"]["value"])
    assert missed["near_ood", "near_ood", "fpr95_id"] in third
    assert third.endswith(f"at worst {missed[Setup().ood[worst], worst, 'fpr95_id']} of {worst}.")


def test_detectors_that_cannot_be_told_from_it_are_named_and_what_it_searches(tmp_path: Path) -> None:
    shift = {**BETTER, "knn": 4.0}
    _, sentences = told(tmp_path, detectors=THREE, shift=shift, level=("knn", "grood"))
    assert sentences[0].startswith("knn, KNN (2025), ranks best")
    assert sentences[1] == "On the same images its lead over grood may be chance; take what costs least."
    assert sentences[-1] == "For every image it searches 1,950 vectors of training images."


def test_what_has_seen_ood_images_is_proposed_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    _, sentences = told(tmp_path / "a", detectors=THREE, shift=BETTER, uses_ood=("grood",))
    assert sentences[0].startswith("knn, ")
    _, sentences = told(tmp_path / "b", detectors=THREE, shift=BETTER, uses_ood=THREE)
    assert sentences[0].startswith("grood, ")


def test_what_separates_little_is_told(tmp_path: Path) -> None:
    _, sentences = told(tmp_path, detectors=("grood",), shift={"grood": 0.1})
    assert re.search(r"AUROC below 0\.75 separates little", sentences[-1])
    assert not any("same images" in sentence for sentence in sentences)


@pytest.mark.parametrize("detectors", [("grood",), THREE])
def test_without_ood_images_nothing_is_said(tmp_path: Path, detectors: tuple[str, ...]) -> None:
    assert told(tmp_path, ood={}, detectors=detectors)[1] == []
