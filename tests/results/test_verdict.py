"""Which detector to take, in words: every number is one of the metrics, and what is level is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.results.report.tables import Results
from pipeline.results.report.verdict import _beside, _compared, verdict
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


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ({"near_ood": {"knn": 1}, "far_ood": {"knn": 1}}, ["lead over every other is more than chance"]),
        ({"near_ood": {"knn": 0}, "far_ood": {"knn": 0}}, ["lead over knn may be chance; take what costs"]),
        (
            {"near_ood": {"knn": -1}, "far_ood": {"knn": 1}},
            ["On Near-OOD knn is better, by more than chance"],
        ),
        ({"near_ood": {"knn": 0}, "far_ood": {"knn": 1}}, ["On Near-OOD its difference from knn may be"]),
        (
            {"near_ood": {"knn": -1, "msp": 0}, "far_ood": {"knn": -1, "msp": 0}},
            ["its lead over msp may be chance", "On Near-OOD knn is better", "On Far-OOD knn is better"],
        ),
        ({}, []),
    ],
)
def test_who_is_better_or_level_on_a_group_is_named(
    tests: dict[str, dict[str, int]], said: list[str]
) -> None:
    found = list(_beside(tests))
    assert len(found) == len(said)
    assert all(text in sentence for text, sentence in zip(said, found, strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("difference", "p", "expected"), [(0.1, 0.01, 1), (-0.1, 0.01, -1), (-0.1, 0.2, 0)])
def test_whose_auroc_is_larger_does_not_depend_on_who_is_named_first(
    tmp_path: Path, first: bool, difference: float, p: float, expected: int
) -> None:
    results, _ = told(tmp_path, detectors=THREE, shift=BETTER)
    pair = ("grood", "knn") if first else ("knn", "grood")
    row = {
        **dict.fromkeys(results.differences.column_names),
        **{"detector": pair[0], "other": pair[1], "metric": "auroc", "p_holm": p},
        **{"group": "near_ood", "dataset": "near_ood", "difference": difference if first else -difference},
    }
    made = replace(results, differences=pa.Table.from_pylist([row]))
    assert _compared(made, "grood", ["knn"]) == {"near_ood": {"knn": expected}}
    assert _compared(made, "grood", []) == {}


def test_what_has_seen_ood_images_is_proposed_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    _, sentences = told(tmp_path / "a", detectors=THREE, shift=BETTER, uses_ood=("grood",))
    assert sentences[0].startswith("knn, ")
    assert sentences[1] == "Not ranked with it, as they have seen OOD images: grood."
    _, sentences = told(tmp_path / "b", detectors=THREE, shift=BETTER, uses_ood=THREE)
    assert sentences[0].startswith("grood, ")
    assert not any("Not ranked" in sentence for sentence in sentences)


def test_what_separates_little_is_told(tmp_path: Path) -> None:
    _, sentences = told(tmp_path, detectors=("grood",), shift={"grood": 0.1})
    assert re.search(r"AUROC below 0\.75 separates little", sentences[-1])
    assert not any("same images" in sentence for sentence in sentences)


@pytest.mark.parametrize("detectors", [("grood",), THREE])
def test_without_ood_images_nothing_is_said(tmp_path: Path, detectors: tuple[str, ...]) -> None:
    assert told(tmp_path, ood={}, detectors=detectors)[1] == []
