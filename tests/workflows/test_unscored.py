"""Rows that a detector cannot score, from the scores to whatever is told of them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.config import loading, schema
from pipeline.errors import UserError
from pipeline.results import verify
from pipeline.results.evaluation import Evaluation
from pipeline.results.mlflow import content
from pipeline.results.report.tables import Results
from pipeline.results.unscored import sentences
from pipeline.workflows import run, tune
from pipeline.workflows.progress import Quiet
from pipeline.workspace import files, tables
from tests.conftest import small

DETECTOR = """
from dataclasses import dataclass
import numpy as np
from pipeline.detectors.base import Detector

class Gaps(Detector):
    title = paper = formula = "gaps"
    columns = ("logits",)
    lost: dict[str, dict[int, str]] = {}
    temperature: float = 1.0

    def fit(self, train):
        return GapsScorer(self.lost, self.temperature)

@dataclass(frozen=True)
class GapsScorer:
    lost: dict
    temperature: float

    def __call__(self, batch):
        logits = batch["logits"].astype("float64") / self.temperature
        scores = -np.log(np.exp(logits).sum(axis=1))
        for row, key in enumerate(batch["key"]):
            name, _, number = key.partition("_x/")
            scores[row] = float(self.lost.get(name, {}).get(int(number), scores[row]))
        return scores
"""

LOST: dict[str, dict[str, dict[int, str]]] = {
    "both": {
        "test": {2: "nan", 5: "inf", 70: "nan", 71: "-inf"},
        "animals": {0: "nan"},
        "production": {99: "nan"},
    },
    "outside": {"animals": {3: "inf", 149: "nan"}, "textures": {7: "nan"}},
}
"""Rows without a score: label -> dataset -> row -> what came instead."""
INLINE = {"engine": "inline", "threads": 1}


@dataclass(frozen=True)
class Finished:
    """An evaluation that is not to be changed."""

    folder: Path
    raw: dict[str, Any]
    outcome: run.Outcome

    @property
    def run(self) -> Path:
        return Path(str(self.outcome.folder))

    def load(self, *overrides: str, **changes: Any) -> schema.Config:
        return loading.load(str(self.write(**changes)), list(overrides))

    def write(self, **changes: Any) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.raw | changes, sort_keys=False))
        return path

    def scores(self, dataset: str, label: str) -> np.ndarray:
        """Those that are left, read without our own code."""
        return pq.read_table(self.run / "scores" / dataset)[label].drop_null().to_numpy()


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """An evaluation with pictures and two detectors that cannot score all rows."""
    folder, raw = tmp_path_factory.mktemp("unscored"), small(images)
    (folder / "gaps.py").write_text(DETECTOR)
    roles = {"held": "id_val", "val": "ood_val", "production": "unlabelled"}
    raw["datasets"] = raw["datasets"][1:] + [
        {"name": name, "role": role, "format": "npz", "path": str(images), "images": f"{name}_x"}
        for name, role in roles.items()
    ]
    raw["detectors"] = [
        "energy",
        *({label: {"method": "./gaps.py:Gaps", "lost": LOST[label]}} for label in LOST),
    ]
    raw |= {"workspace": str(folder / "workspace"), "score": {"max_unscored_fraction": 0.02}}
    (folder / "first.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    outcome = run.execute(loading.load(str(folder / "first.yaml")), run.Options(**INLINE), Quiet())
    yield Finished(folder, raw, outcome)


def test_scores_and_flags_are_null_and_counts_and_names_are_recorded(finished) -> None:
    unscored = files.read_json(finished.run / "manifest.json")["unscored"]
    assert unscored.keys() == {"test", "animals", "textures", "production"}
    for dataset in ("test", "animals", "textures", "held", "val", "production"):
        table = pq.read_table(finished.run / "scores" / dataset)
        for label in ("energy", *LOST):
            lost = LOST.get(label, {}).get(dataset, {})
            flags = [f"is_ood.{label}"] if dataset == "production" else []
            for name in (label, *flags):
                assert np.flatnonzero(table[name].is_null().to_numpy()).tolist() == list(lost)
            keys = table["key"].to_numpy()[list(lost)]
            first = dict(list(zip(keys, lost.values(), strict=True))[:3])
            expected = {"rows": len(lost), "first": first} if lost else None
            assert unscored.get(dataset, {}).get(label) == expected
    found = Evaluation(finished.run).scores("animals", ["outside"])["outside"]
    assert found.to_pandas().isna().sum() == found.null_count == 2


def test_metrics_and_thresholds_are_those_of_the_rows_that_are_left(finished) -> None:
    evaluation = Evaluation(finished.run)
    rows = {(row["detector"], row["dataset"], row["metric"]): row for row in evaluation.metrics.to_pylist()}
    for label, n_id in (("both", 296), ("outside", 300)):
        inside = finished.scores("test", label)
        assert evaluation.thresholds[label] == np.sort(inside)[math.ceil(0.95 * n_id) - 1]
        for dataset, size in (("animals", 150), ("textures", 130)):
            outside = finished.scores(dataset, label)
            is_ood = np.repeat([0, 1], [len(inside), len(outside)])
            both = np.concatenate([inside, outside])
            auroc = rows[label, dataset, "auroc"]
            assert (auroc["n_id"], auroc["n_ood"]) == (n_id, size - len(LOST[label].get(dataset, {})))
            assert auroc["value"] == pytest.approx(roc_auc_score(is_ood, both), abs=1e-12)
            aupr = average_precision_score(is_ood, both)
            assert rows[label, dataset, "aupr_out"]["value"] == pytest.approx(aupr, abs=1e-12)
    assert rows["classifier", "test", "id_accuracy"]["n_id"] == 300


SAID = {
    "both": r"both has no score for 4 of 300 images of test \(test_x/0*2, test_x/0*5, test_x/0*70, \.\.\.\), "
    r"1 of 150 images of animals \(animals_x/0*0\), 1 of 100 images of production \(production_x/0*99\)\. "
    r"Its numbers are without them\.",
    "outside": r"outside has no score for 2 of 150 images of animals \(.*\), 1 of 130 images of textures "
    r"\(.*\)\. Its numbers are without them\. It lost OOD images alone, which can flatter it\.",
}


def test_the_command_the_program_and_the_report_say_so_and_that_one_side_alone_flatters(
    finished, undrawn
) -> None:
    for text, expected in zip(finished.outcome.unscored, SAID.values(), strict=True):
        assert re.fullmatch(expected, text)
    with pytest.warns(UserWarning, match=SAID["outside"]), pytest.warns(UserWarning, match=SAID["both"]):
        run.evaluated(finished.load(), **INLINE)
    command = ["evaluate", str(finished.write()), "--engine", "inline", "--threads", "1"]
    printed = CliRunner().invoke(main.app, command, catch_exceptions=False).output
    page = (finished.run / "report" / "index.html").read_text("utf-8")
    for expected in SAID.values():
        assert re.search(f"^warning  {expected}$", printed, re.MULTILINE)
        assert re.search(f'<p class="alert">{expected}</p>', page)
    assert "energy has no score" not in printed + page


def test_a_loss_of_id_rows_alone_is_told_apart_from_one_where_nothing_is_compared() -> None:
    datasets = {
        name: {"role": role, "features": 9}
        for name, role in {"test": "id", "far": "far_ood", "new": "unlabelled"}.items()
    }
    lost = {"d": {"rows": 1, "first": {"k": "nan"}}}
    assert sentences({"test": lost}, datasets)["d"].endswith("It lost ID images alone, which can flatter it.")
    del datasets["far"]
    for dataset in ("test", "new"):
        assert sentences({dataset: lost}, datasets)["d"].endswith("Its numbers are without them.")
    assert sentences({}, datasets) == {}


def test_figures_and_the_share_of_flags_leave_them_out(finished) -> None:
    results = Results.read(finished.run)
    assert len(results.scores(["test", "animals"], "both")) == 445
    assert np.isfinite(results.scores(["test", "animals"], "both")).all()
    flags = pq.read_table(finished.run / "scores" / "production")["is_ood.both"].to_pylist()
    assert results.flagged_share("production", "both") == flags.count(True) / 99


def test_mlflow_gets_counts_where_there_are_some(finished) -> None:
    manifest = files.read_json(finished.run / "manifest.json")
    counts = {
        label: {
            name: value
            for name, value in content.of_detector(label, manifest, [], 0.5).metrics.items()
            if name.startswith("unscored")
        }
        for label in ("energy", *LOST)
    }
    assert counts == {
        "energy": {},
        "both": {"unscored/test": 4, "unscored/animals": 1, "unscored/production": 1},
        "outside": {"unscored/animals": 2, "unscored/textures": 1},
    }


def test_a_recount_agrees_and_finds_what_was_changed(finished, tmp_path) -> None:
    assert not [finding for finding in verify.examine(finished.run) if not finding.good]
    workspace = Path(shutil.copytree(finished.folder / "workspace", tmp_path / "copy"))
    folder = workspace / finished.run.relative_to(finished.folder / "workspace")
    path = folder / "scores" / "animals" / "part-00000.parquet"
    table = pq.read_table(path)
    filled = table["outside"].fill_null(float("nan"))
    tables.write_table(path, table.set_column(table.column_names.index("outside"), "outside", filled))
    manifest = files.read_json(folder / "manifest.json")
    manifest["unscored"]["test"]["both"]["rows"] = 3
    files.write_json(folder / "manifest.json", manifest)
    found = {(finding.where, finding.what) for finding in verify.examine(folder) if not finding.good}
    assert found == {
        ("scores/animals", "bytes"),
        ("scores/animals", "finite scores"),
        ("scores/animals", "rows without a score"),
        ("scores/test", "rows without a score"),
        ("metrics", "values of outside"),
    }


def test_a_lower_limit_refuses_what_is_there_and_earlier_results_stay(finished) -> None:
    before = {
        path: path.read_bytes()
        for path in finished.run.rglob("*")
        if path.is_file() and path.name != "manifest.json" and path.parent.name != "logs"
    }
    with pytest.raises(
        UserError,
        match=r"^detectors\.both: 4 of 300 scores on test are not finite, more than "
        r"score\.max_unscored_fraction = 0\.01\. First: test_x/0*2 \(nan\); test_x/0*5 \(inf\); "
        r"test_x/0*70 \(nan\)\. Check these images, .*index\.kind.*; or raise the limit, or drop",
    ):
        run.execute(finished.load(score={}), run.Options(**INLINE), Quiet())
    assert files.read_json(finished.run / "manifest.json")["status"] == "finished"
    assert {path: path.read_bytes() for path in before} == before


def test_a_detector_without_any_score_is_refused_whatever_the_limit(finished) -> None:
    nothing = {"textures": dict.fromkeys(range(130), "nan")}
    with pytest.raises(UserError, match=r"detectors\.none: 130 of 130 scores on textures are not finite"):
        run.execute(
            finished.load(
                detectors=[{"none": {"method": "./gaps.py:Gaps", "lost": nothing}}],
                score={"max_unscored_fraction": 0.999},
            ),
            run.Options(**INLINE),
            Quiet(),
        )
    with pytest.raises(UserError, match=r"score\.max_unscored_fraction.*less than 1"):
        finished.load(score={"max_unscored_fraction": 1})


def test_points_of_a_search_are_compared_on_the_rows_that_all_have(finished, tmp_path) -> None:
    some, others = {"held": {1: "nan"}}, {"held": {2: "inf"}, "val": {5: "nan"}}
    found = tune.execute(
        finished.load(
            detectors=[{"gaps": {"method": "./gaps.py:Gaps"}}],
            tune={"grids": {"gaps": {"lost": [{}, some, others]}}},
        ),
        tmp_path / "tuned.yaml",
        Quiet(),
        run.Options(first="fit", **INLINE),
    )
    inside, outside = (pq.read_table(finished.run / "scores" / name) for name in ("held", "val"))
    with pytest.raises(UserError, match=r"no common score for 2 of 150 ID images, more than .* = 0\.01"):
        tune.execute(
            finished.load(
                detectors=[{"gaps": {"method": "./gaps.py:Gaps"}}],
                tune={"grids": {"gaps": {"lost": [{}, some, others]}}},
                score={},
            ),
            tmp_path / "other.yaml",
            Quiet(),
            run.Options(first="fit", **INLINE),
        )
    scores = [
        table["energy"].filter(pa.array(~np.isin(np.arange(len(table)), lost))).to_numpy()
        for table, lost in ((inside, [1, 2]), (outside, [5]))
    ]
    expected = roc_auc_score(np.repeat([0, 1], list(map(len, scores))), np.concatenate(scores))
    assert [point.mean for point in found.points] == pytest.approx([expected] * 3, abs=1e-12)
    assert [text.partition(" has ")[0] for text in found.unscored] == [p.point for p in found.points[1:]]
    assert ["ID images alone" in text for text in found.unscored] == [True, False]
