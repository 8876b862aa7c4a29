"""All numbers of a small evaluation against the golden files; `python -m tests.golden.make` makes them again.

A test fails for a dataset, a statistic or a detector, and names what is different.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline import detectors
from pipeline.config import schema
from tests.golden import entries, evaluation, outputs, tolerances, versions
from tests.golden.outputs import KINDS, Outputs

GOLDEN = {kind: entries.load(kind) for kind in (*KINDS, "metrics")}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> schema.Config:
    """The config of the evaluation, which was run."""
    return evaluation.evaluate(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def found(loaded: schema.Config) -> Outputs:
    """What it gives now."""
    return outputs.read(loaded)


def check(found: Outputs, kind: str, group: str) -> None:
    """All arrays of a group are as in the golden file."""
    golden, arrays = GOLDEN[kind][group], found.arrays[kind][group]
    assert sorted(arrays) == sorted(golden)
    wrong = [
        f"{kind}: {group}: {name}: {difference}"
        for name, values in arrays.items()
        for difference in entries.differences(golden[name], values, tolerances.of(kind, group, name))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_detector_is_among_the_golden_ones() -> None:
    assert set(detectors.names()) <= set(GOLDEN["scores"])


def test_every_tolerance_is_that_of_a_golden_array() -> None:
    arrays = [f"{group}: {name}" for group, names in GOLDEN["statistics"].items() for name in names]
    for pattern, _ in tolerances.ARRAYS:
        assert any(re.fullmatch(pattern, each) for each in arrays), pattern


def test_golden_files_were_made_with_the_versions_of_the_code(loaded: schema.Config) -> None:
    for kind, groups in versions.current(loaded).items():
        assert entries.load(f"versions of {kind}") == groups, f"{kind}: python -m tests.golden.make"


@pytest.mark.parametrize("kind", ["features", "scores", "metrics"])
def test_other_bits_under_the_same_version_are_refused(found: Outputs, kind: str) -> None:
    group = {"features": "near", "scores": "dice", "metrics": "dice"}[kind]
    now = entries.load(f"versions of {kind}")[group]
    values = {**found.arrays, "metrics": found.metrics}[kind][group]
    name = next(name for name, value in values.items() if np.asarray(value).dtype.kind == "f")
    other = {**values, name: np.asarray(values[name]) * (1 + 1e-3)}
    if kind == "metrics":
        other[name] = other[name].tolist()
    assert versions.unversioned(kind, group, GOLDEN[kind][group], values, now, now) == []
    wrong = versions.unversioned(kind, group, GOLDEN[kind][group], other, now, now)
    assert wrong and all(line.startswith(f"{kind}: {group}: {name}: ") for line in wrong)
    assert versions.unversioned(kind, group, GOLDEN[kind][group], other, now, {**now, "detector": [2]}) == []
    lost = {key: value for key, value in values.items() if key != name}
    assert versions.unversioned(kind, group, GOLDEN[kind][group], lost, now, now) == [
        f"{kind}: {group}: {name}: gone"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_statistics_and_detectors_are_the_golden_ones(found: Outputs, kind: str) -> None:
    assert sorted(found.arrays[kind]) == sorted(GOLDEN[kind])


@pytest.mark.parametrize("dataset", GOLDEN["features"])
def test_features_of_a_dataset_are_the_golden_ones(found: Outputs, dataset: str) -> None:
    check(found, "features", dataset)


@pytest.mark.parametrize("statistic", GOLDEN["statistics"], ids=str)
def test_a_statistic_is_the_golden_one(found: Outputs, statistic: str) -> None:
    check(found, "statistics", statistic)


@pytest.mark.parametrize("label", GOLDEN["scores"])
def test_scores_of_a_detector_are_the_golden_ones(found: Outputs, label: str) -> None:
    check(found, "scores", label)


@pytest.mark.parametrize("label", GOLDEN["metrics"])
def test_metrics_of_a_detector_are_the_golden_ones(found: Outputs, label: str) -> None:
    golden, numbers = GOLDEN["metrics"][label], found.metrics[label]
    assert sorted(numbers) == sorted(golden)
    allowed = {"threshold": max(tolerances.SCORES.get(label, 0), tolerances.METRICS)}
    wrong = [
        f"{label}: {name}: golden {golden[name]}, found {numbers[name]}"
        for name in golden
        if not entries.equal(golden[name], numbers[name], allowed.get(name, tolerances.METRICS))
    ]
    assert not wrong, "\n".join(wrong)
