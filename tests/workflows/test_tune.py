"""A search over grids, against the same search by other people's code on the same cached rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import load_file
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.cli.progress import Display
from pipeline.config import loading, schema
from pipeline.errors import UserError
from pipeline.metrics import comparisons
from pipeline.results import report
from pipeline.stages import extract, index, passes
from pipeline.workflows import run, tune
from pipeline.workspace import files
from tests.conftest import ARRAYS, small

K, P = [1, 5, 30], [0, 50, 90.5]
INLINE = ("--engine", "inline", "--threads", "1")
OPTIONS = run.Options(first="fit", engine="inline", threads=1)
VALIDATION = ("animals_val", "textures_val")


def quiet() -> Display:
    return Display(Console(quiet=True))


def no_forward_pass(*_: Any) -> Any:
    raise AssertionError("an image went to the network")


def no_labels(*_: Any) -> Any:
    raise AssertionError("a metric that cannot decide was computed")


@dataclass(frozen=True)
class Search:
    """A search that was done by the command, and where everything lies."""

    folder: Path
    raw: dict[str, Any]
    output: str
    banks: list[index.BankFiles]
    """Those that were held in memory."""

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def results(self) -> Path:
        return next(self.workspace.glob("runs/small/*/tune.json")).parent

    def load(self, raw: dict[str, Any]) -> schema.Config:
        path = self.folder / "changed.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return loading.load(str(path))

    def features(self, dataset: str) -> dict[str, np.ndarray]:
        """Cached rows of a dataset, read without our own code."""
        parts = sorted(self.workspace.glob(f"features/{dataset}-*/part-*.parquet"))
        table = pa.concat_tables([pq.read_table(part) for part in parts])
        return {name: np.array(table[name].to_pylist()) for name in table.column_names}


@pytest.fixture(scope="module")
def searched(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Search]:
    """Features of all images, and then a search, in which no image may be forwarded."""
    folder = tmp_path_factory.mktemp("tune")
    raw = small(images)
    with np.load(ARRAYS) as arrays:
        np.savez(
            folder / "validation.npz",
            id_x=arrays["id_test_x"][450:650],
            animals_x=arrays["ood_animals_x"][250:350],
            textures_x=arrays["ood_textures_x"][180:260],
        )
    other = {"format": "npz", "path": "validation.npz"}
    raw["datasets"] += [
        {"name": "held_out", "role": "id_val", "images": "id_x", **other},
        {"name": "animals_val", "role": "ood_val", "images": "animals_x", **other},
        {"name": "textures_val", "role": "ood_val", "images": "textures_x", **other},
    ]
    raw["detectors"] += [{"dice": {"p": 10}}]
    raw |= {"workspace": str(folder / "workspace"), "tune": {"grids": {"knn": {"k": K}, "dice": {"p": P}}}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    run.execute(loading.load(str(path)), run.Options(last="extract", engine="inline", threads=1), quiet())
    banks: list[index.BankFiles] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "run", no_forward_pass)
        patch.setattr(passes.Runner, "run", no_forward_pass)
        patch.setattr(comparisons, "failures", no_labels)
        start = index.start
        patch.setattr(
            index, "start", lambda engine, held, *more: banks.extend(held) or start(engine, held, *more)
        )
        found = CliRunner().invoke(main.app, ["tune", str(path), *INLINE], catch_exceptions=False)
    assert found.exit_code == 0
    yield Search(folder, raw, found.output, banks)


def by_hand(searched: Search) -> dict[str, dict[float, list[float]]]:
    """AUROC of every point on every OOD validation set, by scikit-learn and the papers' formulas."""
    train = searched.features("train")["feature"]
    weights = load_file(Path(ARRAYS).parent / "resnet.safetensors")
    contribution = weights["fc.weight"] * train.astype(np.float64).mean(axis=0)
    neighbours = NearestNeighbors(n_neighbors=max(K)).fit(normalize(train.astype(np.float64)))
    scores: dict[str, dict[str, dict[float, np.ndarray]]] = {}
    for name in ("held_out", *VALIDATION):
        feature = searched.features(name)["feature"].astype(np.float64)
        distance, _ = neighbours.kneighbors(normalize(feature))
        sparse = {p: weights["fc.weight"] * (contribution > np.percentile(contribution, p)) for p in P}
        scores[name] = {
            "knn": {k: distance[:, k - 1] for k in K},
            "dice": {p: -logsumexp(feature @ sparse[p].T + weights["fc.bias"], axis=1) for p in P},
        }
    truth = {name: np.repeat([0, 1], [200, len(scores[name]["knn"][1])]) for name in VALIDATION}
    return {
        detector: {
            value: [
                roc_auc_score(truth[name], np.r_[inside[value], scores[name][detector][value]])
                for name in VALIDATION
            ]
            for value in inside
        }
        for detector, inside in scores["held_out"].items()
    }


def test_every_point_has_the_auroc_that_scikit_learn_finds_and_the_best_is_chosen(searched) -> None:
    expected = by_hand(searched)
    points = files.read_json(searched.results / "tune.json")["points"]
    for detector, parameter in (("knn", "k"), ("dice", "p")):
        found = {p["parameters"][parameter]: p for p in points if p["detector"] == detector}
        assert list(found) == list(expected[detector])
        for value, aurocs in expected[detector].items():
            assert list(found[value]["values"].values()) == pytest.approx(aurocs, abs=1e-4)
            assert found[value]["mean"] == pytest.approx(np.mean(aurocs), abs=1e-4)
        means = {value: np.mean(aurocs) for value, aurocs in expected[detector].items()}
        assert np.diff(sorted(means.values())).min() > 1e-3  # no tie that rounding could break
        best = max(means, key=means.__getitem__)
        assert [value for value, point in found.items() if point["chosen"]] == [best]
        tuned = {e.label: e for e in loading.load(str(searched.folder / "small.tuned.yaml")).detectors}
        assert tuned[detector].parameters == {parameter: best}


def test_all_points_are_in_the_table_and_on_the_screen(searched) -> None:
    with (searched.results / "tune.csv").open("rb") as file:
        rows = pyarrow.csv.read_csv(file).to_pylist()
    assert [json.loads(row["parameters"]) for row in rows] == [{"k": k} for k in K] + [{"p": p} for p in P]
    for row in rows:
        sets = [row[f"auroc/{name}"] for name in VALIDATION]
        assert row["auroc/mean"] == pytest.approx(np.mean(sets))
        assert row["auroc/ci_low"] <= row["auroc/mean"] <= row["auroc/ci_high"]
        assert (f"{row['point']} *" in searched.output) == row["chosen"]
        assert f"{row['auroc/mean']:.4f}" in searched.output
    assert str(searched.results / "tune.csv") in searched.output.replace("\n", "")


def test_points_that_search_the_same_vectors_share_one_bank(searched) -> None:
    assert len({bank.folder for bank in searched.banks}) == 1


def test_only_training_and_validation_rows_are_read(searched) -> None:
    scored = {folder.name.rpartition("-")[0] for folder in searched.workspace.glob("scores/*")}
    assert scored == {"held_out", *VALIDATION}
    assert files.read_json(searched.results / "tune.json")["datasets"] == {
        "train": "train",
        "held_out": "id_val",
        **dict.fromkeys(VALIDATION, "ood_val"),
    }


def test_another_metric_decides_on_the_same_scores(searched, monkeypatch) -> None:
    monkeypatch.setattr(tune.Search, "_score_ours", no_forward_pass)
    raw = deepcopy(searched.raw)
    raw["tune"]["metric"] = "fpr95_id"
    raw["workspace"] = str(searched.workspace)
    before = {name: (searched.results / name).read_bytes() for name in ("tune.json", "tune.csv")}
    output = searched.folder / "other.yaml"
    found = tune.execute(searched.load(raw), output, quiet(), OPTIONS)
    for detector in ("knn", "dice"):
        mine = [point for point in found.points if point.detector == detector]
        assert [point.chosen for point in mine].count(True) == 1
        chosen = next(point for point in mine if point.chosen)
        assert chosen.mean == min(point.mean for point in mine)
    for name, content in before.items():
        (searched.results / name).write_bytes(content)


def test_the_new_config_runs_on_the_cached_features_and_its_results_are_marked(searched) -> None:
    tuned = loading.load(str(searched.folder / "small.tuned.yaml"))
    tried = set(searched.workspace.glob("scores/*_val-*/*"))
    folder = run.execute(tuned, run.Options(engine="inline", threads=1), quiet()).folder
    assert folder.parent.name == "small-tuned"
    made = set(searched.workspace.glob("scores/*_val-*/*")) - tried
    assert {path.name.partition("-")[0] for path in made} == {"msp"}  # the others were tried
    for name in VALIDATION:
        scored = pq.read_table(folder / "scores" / name)
        for detector in ("knn", "dice"):
            kept = [pq.read_table(path)["score"] for path in tried if path.match(f"{name}-*/{detector}-*")]
            assert scored[detector] in kept
    record = files.read_json(folder / "manifest.json")
    assert record["stages"]["extract"]["forward_images"] == 0
    assert {label: entry["uses_ood"] for label, entry in record["detectors"].items()} == {
        "msp": False,
        "knn": True,
        "dice": True,
    }
    page = (folder / "report" / "index.html").read_text()
    assert 'knn <span class="badge">uses OOD data</span>' in page
    assert 'msp <span class="badge">' not in page
    screen = Console(width=200, record=True, file=StringIO())
    screen.print(report.console_table(folder))
    text = screen.export_text()
    assert "knn *" in text
    assert "msp *" not in text


def without(role: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["datasets"] = [dataset for dataset in raw["datasets"] if dataset["role"] != role]

    return change


def another_set(raw: dict[str, Any]) -> None:
    raw["datasets"][-1] |= {"limit": 20}


def a_pass(raw: dict[str, Any]) -> None:
    raw["detectors"].append({"grood": {"prototype": "noise"}})
    raw["tune"]["grids"]["grood"] = {"samples": [50, 60]}


def a_column(raw: dict[str, Any]) -> None:
    raw["detectors"].append("odin")
    raw["tune"]["grids"]["odin"] = {"noise": [0.001, 0.002]}


def test_set(raw: dict[str, Any]) -> None:
    raw["datasets"][-1] |= {key: raw["datasets"][1][key] for key in ("path", "images")}


test_set.__test__ = False  # type: ignore[attr-defined]

REFUSED = {
    "no OOD validation data": (without("ood_val"), r"none has role 'ood_val', whose OOD images decide"),
    "no ID validation data": (without("id_val"), r"none has role 'id_val'.*test images must not decide"),
    "features missing": (
        another_set,
        r"extract: not done for textures_val\. Run `ood-pipeline extract` first",
    ),
    "passes missing": (
        a_pass,
        r"tune\.grids: grood\[samples=50\] \(noise\), grood\[samples=60\] \(noise\) need passes .*"
        "Run `ood-pipeline fit`",
    ),
    "columns missing": (
        a_column,
        r"tune\.grids: odin\[noise=0\.001\], odin\[noise=0\.002\] need columns .*Run `ood-pipeline extract`",
    ),
    "a test set": (test_set, r"datasets\.textures_val: 300 of its images are also in test \(role 'id'\)"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_tuned_honestly_is_refused(searched, mistake) -> None:
    change, expected = REFUSED[mistake]
    raw = deepcopy(searched.raw)
    change(raw)
    output = searched.folder / "refused.yaml"
    with pytest.raises(UserError, match=expected):
        tune.execute(searched.load(raw), output, quiet(), OPTIONS)
    assert not output.exists()
