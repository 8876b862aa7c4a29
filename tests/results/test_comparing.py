"""Runs side by side: the values are theirs, and what is called better is so on the same images."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from pipeline.errors import UserError
from pipeline.results.comparing import Comparing, compared
from pipeline.results.evaluation import Evaluation
from pipeline.results.report import leaderboards
from tests.results.test_evaluation import run
from tests.results.test_report import Setup
from tests.stored import stored


@dataclass(frozen=True)
class Recorded(Evaluation):
    """A run with another record."""

    record: dict[str, Any]  # type: ignore[misc]


WORSE = Setup(shift={"grood": 0.5, "knn": 2.0})


def of_metric(evaluation: Evaluation, detector: str, dataset: str) -> float:
    rows = evaluation.metrics.to_pylist()
    where = detector, dataset, "auroc"
    return next(row["value"] for row in rows if (row["detector"], row["dataset"], row["metric"]) == where)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluation]:
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "a": WORSE,
        "b": replace(WORSE, shift={"grood": 2.0, "knn": 2.0}),
        "fewer": replace(WORSE, rows=100),
    }
    return {name: run(folder, name, setup) for name, setup in made.items()}


@pytest.fixture(scope="module")
def both(evaluations: dict[str, Evaluation]) -> Comparing:
    return compared([evaluations["a"], evaluations["b"]], ["auroc"], group=False)


def test_values_and_ranks_are_those_of_the_runs(both: Comparing, evaluations: dict[str, Evaluation]) -> None:
    cells = [cell for cell in both.cells if cell.dataset == "near_ood"]
    names = dict(zip((column.name for column in both.columns), ("a", "b"), strict=True))
    assert len(cells) == 4
    for cell in cells:
        assert cell.value == of_metric(evaluations[names[cell.column]], cell.detector, "near_ood")
        assert cell.ci_low < cell.value < cell.ci_high
    worst = max(cells, key=lambda cell: cell.rank)
    assert (names[worst.column], worst.detector, worst.rank) == ("a", "grood", 4)
    assert not worst.level  # the same images tell it from the best


def test_equal_scores_on_the_same_images_are_level_with_the_best(both: Comparing) -> None:
    assert both.caption.startswith("95% intervals. (rank) among all. = not told from the best")
    knn = [cell for cell in both.cells if (cell.detector, cell.dataset) == ("knn", "near_ood")]
    assert knn[0].value == knn[1].value
    assert knn[0].rank == knn[1].rank
    assert all(cell.level is not False for cell in knn)


def test_rows_are_joined_by_their_keys(evaluations: dict[str, Evaluation], tmp_path: Path) -> None:
    first, second = evaluations["a"], run(tmp_path, "other order", WORSE)
    for name in ("tin", "svhn", "cifar10_test"):
        table = second.scores(name)
        order = np.random.default_rng(0).permutation(len(table))
        stored(second.folder / "scores" / name, [table.take(order)])
    rows = first.against(second).to_pylist()
    same = [row for row in rows if row["detector"].split("/")[1] == row["other"].split("/")[1]]
    assert same
    assert all(row["difference"] == 0 for row in same)


def test_a_run_on_other_images_is_shown_without_rank_or_test_and_told(
    evaluations: dict[str, Evaluation],
) -> None:
    found = compared(list(evaluations.values()), ["auroc"], group=False)
    other = [cell for cell in found.cells if cell.column.endswith("fewer")]
    assert other
    assert all(cell.rank is None and cell.level is None for cell in other)
    (note,) = found.notes
    assert "other images in cifar10_test (100) than in the first run (120): no rank and no test" in note
    assert max(cell.rank for cell in found.cells if cell.rank) == 4


def test_repeats_become_their_mean_and_standard_deviation(evaluations: dict[str, Evaluation]) -> None:
    pair = [evaluations["a"], evaluations["b"]]  # configs that differ in seed and weights
    found = compared(pair, ["auroc"], ["tin"])
    (column,) = found.columns
    assert column.name == "quickstart (2 runs)"
    cell = next(cell for cell in found.cells if cell.detector == "grood")
    values = [of_metric(each, "grood", "tin") for each in pair]
    assert (cell.value, cell.std, cell.n) == (mean(values), stdev(values), 2)
    assert (cell.ci_low, cell.level) == (None, None)
    text = leaderboards.FORMATS["markdown"](found)
    assert f"{mean(values):.4f} ± {stdev(values):.4f}" in text
    assert "\n± standard deviation over repeats. (rank) among all.\n" in text


def test_repeats_may_have_other_images_and_the_first_column_is_never_foreign(
    evaluations: dict[str, Evaluation],
) -> None:
    found = compared(list(evaluations.values())[::-1], ["auroc"])  # the seed decides on images (`limit`)
    (column,) = found.columns
    assert (column.name, column.foreign) == ("quickstart (3 runs)", "")
    assert {cell.rank for cell in found.cells} == {1, 2}


def test_runs_without_ood_data_are_compared_by_their_failures(tmp_path: Path) -> None:
    runs = [run(tmp_path, name, Setup(ood={}, passes=False)) for name in ("a", "b")]
    found = compared(runs, ["aurc"], group=False)
    assert sorted(cell.rank for cell in found.cells) == [1, 1, 3, 3]
    first, second = (cell.level for cell in found.cells if cell.rank == 1)
    assert (first, second) == (None, True)  # the same scores


def test_what_only_some_repeats_have_is_marked(evaluations: dict[str, Evaluation], tmp_path: Path) -> None:
    more = run(tmp_path, "c", replace(WORSE, detectors=("grood", "knn", "featurenorm")))
    found = compared([evaluations["a"], more, evaluations["b"]], ["auroc"], ["tin"])
    texts = {cell.detector: leaderboards.text_of(cell) for cell in found.cells}
    assert {name for name, text in texts.items() if "[1 of 3 runs]" in text} == {"featurenorm"}


def test_the_same_evaluation_again_is_no_repeat(evaluations: dict[str, Evaluation], tmp_path: Path) -> None:
    again = run(tmp_path, "a", WORSE)
    found = compared([evaluations["a"], evaluations["b"], again], ["auroc"])
    assert [[each.folder for each in column.runs] for column in found.columns] == [
        [evaluations["a"].folder, evaluations["b"].folder],
        [again.folder],
    ]


def test_the_cost_of_scores_is_told_where_all_were_computed(evaluations: dict[str, Evaluation]) -> None:
    (column,) = compared([evaluations["a"]], ["auroc"]).columns
    for scores, expected in ((200, 12_500), (150, None), (400, None), (None, None)):
        stage = {"seconds": 1.25, "rows": 100} | ({} if scores is None else {"scores": scores})
        record = evaluations["a"].record | {"stages": {"score": stage}}
        made = replace(column, runs=(Recorded(evaluations["a"].folder, record),))
        assert made.costs()["scores of all detectors"] == expected


def test_another_config_is_no_repeat(evaluations: dict[str, Evaluation], tmp_path: Path) -> None:
    other = run(tmp_path, "c", WORSE)
    (other.folder / "config.yaml").write_text(
        yaml.safe_dump({"seed": 1, "model": {"weights": "c"}, "index": 1})
    )
    assert len(compared([evaluations["a"], other], ["auroc"]).columns) == 2


def test_every_format_holds_every_value(both: Comparing) -> None:
    printer = Console(width=200, record=True, file=StringIO())
    printer.print(leaderboards.console_table(both))
    texts = {name: write(both) for name, write in leaderboards.FORMATS.items()} | {
        "table": printer.export_text()
    }
    for cell in both.cells:
        for name in ("table", "markdown", "latex", "html"):
            assert f"{cell.value:.4f}" in texts[name], name
    values = {(cell.column, cell.detector, cell.dataset): cell.value for cell in both.cells}
    rows = list(csv.DictReader(texts["csv"].splitlines()))
    assert {(r["column"], r["detector"], r["dataset"]): float(r["value"]) for r in rows} == values
    document = json.loads(texts["json"])["cells"]
    assert {(r["column"], r["detector"], r["dataset"]): r["value"] for r in document} == values
    assert {r["extraction_seconds_per_million"] for r in document} == {1e6 / 2100.4}
    assert "476" in texts["table"]
    assert all("476" in texts[name] for name in ("markdown", "latex", "html"))
    assert r"\toprule" in texts["latex"]
    assert "↑" not in texts["latex"]
    assert texts["html"].count("<table>") == 3  # two groups and the cost


def test_rows_of_openoods_leaderboard_are_percentages(evaluations: dict[str, Evaluation]) -> None:
    head = "Training,Postprocessor,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,"
    pair = [evaluations["a"], evaluations["b"]]
    apart = leaderboards.FORMATS["openood"](compared(pair, ["auroc"], group=False))
    first, *rows = csv.reader(apart.splitlines())
    assert ",".join(first) == head + "Additional_Description"
    assert [(row[1], row[-1]) for row in rows] == [
        (detector, f"quickstart/{name}") for name in "ab" for detector in ("grood", "knn")
    ]
    model = pair[0].record["model"]["name"]
    for training, detector, near, far, accuracy, outliers, arch, column in rows:
        made = evaluations[column.removeprefix("quickstart/")]
        assert near == f"{100 * of_metric(made, detector, 'near_ood'):.2f}"
        assert far == f"{100 * of_metric(made, detector, 'far_ood'):.2f}"
        assert (training, accuracy, outliers, arch) == ("/", "91.37", "No", model)
    (_, grood, _) = csv.reader(leaderboards.FORMATS["openood"](compared(pair, ["auroc"])).splitlines())
    values = [100 * of_metric(run, "grood", "near_ood") for run in pair]
    assert grood[2] == f"{mean(values):.2f} ± {stdev(values):.2f}"
    assert grood[4] == "91.37 ± 0.00"


def test_openoods_leaderboard_has_the_accuracy_over_all_id_images(tmp_path: Path) -> None:
    made = run(tmp_path, "a", Setup())
    rows = made.metrics.to_pylist()
    (first,) = (row for row in rows if row["metric"] == "id_accuracy")

    def told(*accuracies: dict[str, Any]) -> str:
        others = [row for row in rows if row is not first]
        pq.write_table(pa.Table.from_pylist([*others, *accuracies]), made.folder / "metrics.parquet")
        text = leaderboards.FORMATS["openood"](compared([Evaluation(made.folder)], ["auroc"]))
        return next(csv.DictReader(text.splitlines()))["ID_Accuracy"]

    one, two = first | {"value": 0.9, "n_id": 300}, first | {"dataset": "two", "value": 0.5, "n_id": 100}
    assert told(one, two, first | {"dataset": "fog", "group": "shifted_id"}) == "80.00"
    assert told() == "/"


def test_what_openoods_leaderboard_asks_and_a_run_lacks_is_a_stroke(tmp_path: Path) -> None:
    made = run(tmp_path, "a", Setup(ood={"svhn": "far_ood"}, uses_ood=("knn",)))
    text = leaderboards.FORMATS["openood"](compared([made], ["auroc"]))
    rows = {row["Postprocessor"]: row for row in csv.DictReader(text.splitlines())}
    assert {name: (row["Near-OOD_AUROC"], row["Outlier_Data"]) for name, row in rows.items()} == {
        "grood": ("/", "No"),
        "knn": ("/", "Yes"),
    }


def test_a_run_on_other_images_is_refused_with_the_reason(evaluations: dict[str, Evaluation]) -> None:
    compared([evaluations["a"], evaluations["b"]], ["auroc"], group=False).require_same_data()
    found = compared(list(evaluations.values()), ["auroc"], group=False)
    with pytest.raises(UserError, match=r"quickstart/fewer: other images in cifar10_test .*--other-data"):
        found.require_same_data()


def test_runs_of_different_names_are_no_repeats(evaluations: dict[str, Evaluation], tmp_path: Path) -> None:
    other = run(tmp_path, "c", WORSE)
    (other.folder / "config.yaml").write_text(
        yaml.safe_dump({"name": "other", "seed": 1, "model": {"weights": "c"}})
    )
    assert len(compared([evaluations["a"], other], ["auroc"]).columns) == 2


def test_what_is_wrong_is_one_message(evaluations: dict[str, Evaluation]) -> None:
    first = evaluations["a"]
    with pytest.raises(UserError, match="given twice"):
        compared([first, first], ["auroc"])
    with pytest.raises(UserError, match=r"--metric: unknown metric 'aurok'\. Did you mean 'auroc'"):
        compared([first], ["aurok"])
    with pytest.raises(UserError, match="--dataset: unknown dataset 'tim'"):
        _ = compared([first], ["auroc"], ["tin", "tim"]).cells
    with pytest.raises(UserError, match="--metric: no run has a value of fpr90_id on any group"):
        _ = compared([first], ["auroc", "fpr90_id"]).cells
    with pytest.raises(UserError, match="--dataset: no run has a value of auroc on cifar10_test"):
        _ = compared([first], ["auroc"], ["tin", "cifar10_test"]).cells
