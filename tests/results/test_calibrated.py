"""What is shown of calibrated thresholds is what the run decided, and damage to it is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from pipeline.results import report
from pipeline.results.calibrated import sentence
from pipeline.results.evaluation import Evaluation, other_data
from pipeline.results.mlflow.content import of_detector
from pipeline.results.report.tables import Results
from pipeline.results.verify import examine
from tests.conftest import _dataset
from tests.results.test_verify import Damage, cell, scores
from tests.stored import newest


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """The workspace of the one evaluation of this module, once it was made."""
    return {}


@pytest.fixture
def finished(kept, settings, images, load, execute, tmp_path_factory) -> Path:
    """Workspace of a run that calibrates on a part of the ID images; not to be changed."""
    if not kept:
        settings["datasets"].append(_dataset(images, "production", "unlabelled"))
        settings["thresholds"] = {"false_alarm": [0.1, 0.05], "calibrate_on": "id"}
        made = execute(load(settings)).folder.parent.parent.parent
        kept["workspace"] = made.rename(tmp_path_factory.mktemp("finished") / "workspace")
    return kept["workspace"]


@pytest.fixture
def run(finished: Path) -> Evaluation:
    return Evaluation(newest(finished))


def bad(workspace: Path) -> list[tuple[str, str]]:
    return [(found.where, found.what) for found in examine(newest(workspace)) if not found.good]


def test_a_whole_run_is_as_it_is_counted_again(finished: Path) -> None:
    assert bad(finished) == []


def arrays(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Damage of what was kept for later decisions."""

    def damage(workspace: Path) -> None:
        path = newest(workspace) / "calibration.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return damage


def decided(column: str, value: Any) -> Damage:
    return cell(lambda workspace: newest(workspace) / "decisions.parquet", column, 0, value)


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (cell(scores("animals"), "p.knn", 3, lambda values: values[3] / 2), "scores/animals", "p-values"),
        (cell(scores("animals"), "p.knn", 3, None), "scores/animals", "p-values"),
        (cell(scores("production"), "is_ood.msp", 0, lambda v: not v[0]), "scores/production", "flags"),
        (cell(scores("test"), "calibration", 5, lambda v: not v[5]), "scores/test", "rows that calibrate"),
        (arrays(lambda found: found["msp"].sort()), "decisions", "calibration.safetensors"),
        (arrays(lambda found: found.pop("knn")), "decisions", "calibration.safetensors"),
        (decided("flagged", lambda values: values[0] + 1), "decisions", "decisions.parquet"),
        (decided("threshold", lambda values: np.nextafter(values[0], 9)), "decisions", "decisions.parquet"),
        (decided("dataset", "elsewhere"), "decisions", "decisions.parquet"),
        (decided("ci_low", 0.99), "decisions", "decisions.parquet"),
    ],
)
def test_damage_is_found(finished: Path, tmp_path: Path, damage: Damage, where: str, what: str) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    damage(workspace)
    assert (where, what) in bad(workspace)


def test_the_report_shows_every_share_in_full_and_where_thresholds_come_from(run: Evaluation) -> None:
    page = (run.folder / "report" / "index.html").read_text()
    section = page[page.index('<section id="decisions">') :].partition("</section>")[0]
    rows = run.decisions.to_pylist()
    for row in rows:
        assert f'title="{row["share"]}"' in section
    count = rows[0]["n_calibration"]
    assert f"{count} of the 300 images of test, drawn by their keys and the seed" in section
    assert f"all metrics are of the other {300 - count}." in section
    assert re.findall(r"<h3>False-alarm rate (.*?)</h3>", section) == ["5%", "10%"]
    assert "their p-value is at most the first false-alarm rate" in page
    assert Results.read(run.folder).scores(["test"], "msp").shape == (300 - count,)


def test_the_terminal_shows_the_first_rate(run: Evaluation) -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(report.decisions_table(run.folder))
    text = console.export_text()
    assert "Flagged as OOD at a false-alarm rate of 10%" in text
    assert sentence(run.record, run.decisions.to_pylist()) in " ".join(text.split())
    for row in run.decisions.to_pylist():
        if row["false_alarm"] == 0.1:
            assert f"{100 * row['share']:.2f}%" in text


def test_shares_and_intervals_of_many_datasets_are_whole_on_80_columns(run: Evaluation, monkeypatch) -> None:
    decided = Results.decided
    longer = {"dataset": "imagenet-validation", "role": "unlabelled"}

    def wide(self: Results) -> dict[float, dict[str, list[dict[str, Any]]]]:
        return {
            rate: {
                name: [*cells, *({**cells[0], **longer} for _ in range(5))] for name, cells in found.items()
            }
            for rate, found in decided(self).items()
        }

    monkeypatch.setattr(Results, "decided", wide)
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.decisions_table(run.folder))
    text = console.export_text()
    whole = {
        cell
        for cells in wide(Results.read(run.folder))[0.1].values()
        for each in cells
        for cell in (f"{100 * each['share']:.2f}%", f"{100 * each['ci_low']:.1f}–{100 * each['ci_high']:.1f}")
    }
    assert [cell for cell in whole if cell not in text] == []
    heads = [line.split()[:2] for line in text.splitlines() if "Detector" in line]
    assert len(heads) > 1 and set(map(tuple, heads)) == {("Detector", "Threshold")}


def rows_at_first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["detector"] == "knn" and row["false_alarm"] == 0.1)


def test_mlflow_gets_the_shares_at_the_first_rate(run: Evaluation) -> None:
    rows = run.decisions.to_pylist()
    found = of_detector("knn", run.record, run.metrics.to_pylist(), run.thresholds["knn"], rows).metrics
    shares = {
        row["dataset"]: row["share"] for row in rows if row["detector"] == "knn" and row["false_alarm"] == 0.1
    }
    assert {name: value for name, value in found.items() if "_0.1" in name} == {
        "threshold_0.1": rows_at_first(rows)["threshold"],
        "false_alarm_0.1/test": shares["test"],
        "caught_0.1/animals": shares["animals"],
        "caught_0.1/textures": shares["textures"],
    }


def test_a_run_on_other_id_images_is_told_apart_and_compared_on_those_that_both_test(
    run: Evaluation, settings, load, execute
) -> None:
    workspace = run.folder.parent.parent.parent
    settings |= {"name": "whole", "thresholds": None}  # the fixture may just have made the other run of it
    whole = Evaluation(execute(load(settings, workspace.as_uri()), last="evaluate").folder)
    assert other_data(run, whole).startswith("other ID images are tested than in the first run")
    for first, second in ((run, whole), (whole, run)):
        rows = first.against(second).to_pylist()
        same = [row for row in rows if {row["detector"][-3:], row["other"][-3:]} == {"knn"}]
        assert {row["difference"] for row in same} == {0.0}


def test_the_table_of_decisions_goes_to_mlflow(run: Evaluation, tmp_path: Path) -> None:
    from pipeline.results.mlflow.tracking import _stage

    _stage(run.folder, tmp_path)
    assert pq.read_table(tmp_path / "decisions.parquet").equals(run.decisions)
