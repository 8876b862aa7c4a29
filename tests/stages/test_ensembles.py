"""Ensembles in whole runs: from cached scores, seen as any detector, made again if what they combine is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from pipeline.errors import UserError
from pipeline.results.evaluation import Evaluation
from pipeline.results.verify import examine
from pipeline.stages import score
from pipeline.stages.prepare import prepare
from pipeline.workspace import tables
from tests.detectors.test_ensemble import slow
from tests.stages.test_calibration import with_held_out

MEMBERS = ["knn", "msp"]


def entries(**parameters: Any) -> list[Any]:
    """Two detectors and an ensemble of them, which stands before them."""
    return [{"both": {"method": "ensemble", "members": MEMBERS, **parameters}}, "msp", {"knn": {"k": 5}}]


def rows_of(evaluation: Evaluation, dataset: str) -> dict[str, np.ndarray]:
    found = evaluation.scores(dataset)
    return {name: found[name].to_numpy() for name in ("key", "both", *MEMBERS)}


@pytest.mark.parametrize("thresholds", [None, {"false_alarm": [0.1], "calibrate_on": "id"}])
def test_an_ensemble_is_a_detector_of_the_run(settings, load, execute, thresholds) -> None:
    settings["detectors"] = entries(combine="harmonic")
    settings["thresholds"] = thresholds
    raw = with_held_out(settings)
    evaluation = Evaluation(execute(load(raw)).folder)
    rows = {name: rows_of(evaluation, name) for name in ("held", "test", "animals")}
    own = {name: np.zeros(len(found["key"]), bool) for name, found in rows.items()}
    if thresholds is None:
        own["held"][:] = True
    else:
        own["test"] = _marks(evaluation)
    held = {
        label: np.concatenate([rows[name][label][own[name]] for name in ("held", "test")])
        for label in MEMBERS
    }
    for name, found in rows.items():
        for side in (True, False):
            part = {label: found[label][own[name] == side] for label in MEMBERS}
            expected = slow("harmonic", held, part, side)
            np.testing.assert_allclose(found["both"][own[name] == side], expected, rtol=1e-12)
    metrics = evaluation.metrics
    of_each = [metrics.filter(pc.equal(metrics["detector"], label)).num_rows for label in ("both", *MEMBERS)]
    assert len(set(of_each)) == 1 and of_each[0] > 0
    assert list(evaluation.record["detectors"]) == ["both", "msp", "knn"]
    assert evaluation.record["detectors"]["both"]["parameters"]["combine"] == "harmonic"
    assert [finding for finding in examine(evaluation.folder) if not finding.good] == []
    if thresholds is not None:
        assert {row["detector"] for row in evaluation.decisions.to_pylist()} == {"both", *MEMBERS}


def _marks(evaluation: Evaluation) -> np.ndarray:
    parts = tables.Table.open(evaluation.folder / "scores" / "test").columns(["calibration"])
    return np.concatenate([part["calibration"].to_numpy() for part in parts])


def test_an_ensemble_costs_no_pass_over_features_and_no_fit(settings, load, execute, monkeypatch) -> None:
    settings["detectors"] = ["msp", {"knn": {"k": 5}}]
    raw = with_held_out(settings)
    execute(load(raw), last="score")
    calls, of = [], score.Scoring.of
    monkeypatch.setattr(
        score.Scoring,
        "of",
        lambda self, rows, **more: (calls.append(sorted(self.scorers)), of(self, rows, **more))[1],
    )
    raw["detectors"] = entries()
    execute(load(raw), last="score")
    assert calls == [["both"]] * 4  # held, test and two of OOD
    calls.clear()
    execute(load(raw), last="score")
    assert calls == []
    raw["detectors"] = entries(combine="mean")
    execute(load(raw), last="score")
    raw["datasets"][-1]["limit"] = 100  # other images calibrate
    execute(load(raw), last="score")
    assert [each for each in calls if "both" in each] == [["both"]] * 8


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["knn", "msq"],
            r"detectors\.both\.members: unknown detector 'msq'\. Did you mean 'msp'\? Known: knn, msp",
        ),
        (["knn"], r"detectors\.both\.members: got 1; expected two detectors of the run or more"),
        (["knn", "knn"], r"detectors\.both\.members: knn is named twice"),
        (["knn", "both"], r"detectors\.both\.members: both combines others itself"),
    ],
)
def test_members_are_detectors_of_the_run(settings, load, members, message) -> None:
    settings["detectors"] = entries(members=members)
    with pytest.raises(UserError, match=message):
        prepare(load(with_held_out(settings)))


def test_an_ensemble_needs_images_to_calibrate_on(settings, load) -> None:
    settings["detectors"] = entries()
    with pytest.raises(
        UserError, match=r"^detectors\.both: .* no dataset has role 'id_val'\. Add one, or set thresholds\."
    ):
        prepare(load(settings))
    settings["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id"}
    prepare(load(settings))


def test_a_member_that_does_not_apply_is_told_with_its_reason(settings, load) -> None:
    settings["detectors"] = entries(members=["knn", "drop"])
    drop = {"label": "drop", "method": "mcdropout", "optional": True}
    with pytest.raises(
        UserError, match=r"^detectors\.both\.members: drop does not apply: .*ropout.* Leave it out"
    ):
        prepare(load(with_held_out(settings | {"detectors": [*settings["detectors"], drop]})))


def test_an_ensemble_of_what_saw_ood_images_says_so(settings, load) -> None:
    settings["detectors"] = [
        {"both": {"method": "ensemble", "members": ["msp", "knn"]}},
        "msp",
        {"knn": {"k": 5, "tuned_on_ood": True}},
    ]
    ready = prepare(load(with_held_out(settings)))
    assert [ready.uses_ood(label) for label in ("both", "msp", "knn")] == [True, False, True]


def test_ensembles_are_not_among_all_detectors_and_not_tuned(settings, load) -> None:
    settings["detectors"] = "all"
    assert "ensemble" not in load(settings).built()
    settings["detectors"] = entries()
    settings["tune"] = {"grids": {"both": {"combine": ["mean", "rank"]}}}
    with pytest.raises(UserError, match=r"tune\.grids\.both: it combines others; tune its members"):
        load(settings).points()
