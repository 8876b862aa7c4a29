"""What a person meets: exit statuses, one clear message per mistake, and nothing half done left behind."""

from __future__ import annotations

import http.server
import json
import math
import os
import re
import shlex
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline import __version__, detectors, imports
from pipeline.cli import doctor, main
from pipeline.cli.app import Commands
from pipeline.cluster import inline
from pipeline.config import loading
from pipeline.stages.prepare import prepare
from pipeline.workflows import tune
from pipeline.workspace import claims
from tests.servers import wait

COMMAND = Path(sys.executable).parent / "ood-pipeline"
SUBCOMMANDS = (
    *("run", "extract", "fit", "score", "evaluate", "report", "validate", "detectors", "doctor"),
    *(
        "submit",
        "status",
        "stop",
        "tune",
        "verify",
        "runs",
        "compare",
        "explain",
        "fiftyone",
        "ui",
        "clean",
        "init",
        "schema",
    ),
    *("bundle", "apply"),
)

NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x))

def build():
    return nn.Sequential(Block(1), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def softmax():
    return nn.Sequential(build(), nn.Softmax(1))

def broken():
    return 1 / 0

def endless():
    import pathlib, time
    pathlib.Path("started").touch()
    time.sleep(100)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command leaves in a terminal."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """A small evaluation on disk that a test may spoil."""

    folder: Path
    raw: dict[str, Any]

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def config(self) -> str:
        path = self.folder / "small.yaml"
        path.write_text(yaml.safe_dump(self.raw))
        return str(path)

    def dataset(self, role: str) -> dict[str, Any]:
        return next(dataset for dataset in self.raw["datasets"] if dataset["role"] == role)

    def without(self, role: str) -> None:
        self.raw["datasets"] = [dataset for dataset in self.raw["datasets"] if dataset["role"] != role]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Three classes of noise, a network for them, and one detector of every kind."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(30, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / "data.npz", x=noise, y=np.arange(30) % 3, odd=np.arange(30) % 3 + 5, part=np.arange(30) % 2
    )
    (tmp_path / "net.py").write_text(NET)
    labelled = {"format": "npz", "path": "data.npz", "images": "x", "labels": "y"}
    raw = {
        "name": "small",
        "workspace": str(tmp_path / "workspace"),
        "model": {
            "source": "factory",
            "name": "./net.py:build",
            "weights": "random",
            "transform": {"crop": 8, "mean": [0.5], "std": [0.25], "channels": 1},
        },
        "datasets": [
            {"name": "train", "role": "train", **labelled},
            {"name": "test", "role": "id", **labelled},
            {"name": "far", "role": "far_ood", "format": "npz", "path": "data.npz", "images": "x"},
        ],
        "detectors": ["msp"],
    }
    return Case(tmp_path, deepcopy(raw))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process, with whatever it does to the process undone afterwards."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "path", sys.path.copy())
        monkeypatch.setenv(imports.FOLDER, "")
        monkeypatch.setattr(sys, "argv", ["ood-pipeline", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def assert_nothing_looks_complete(workspace: Path) -> None:
    """Only manifests of datasets and notes about models that were fine may be there, and no draft of one."""
    left = [path.relative_to(workspace).parts for path in workspace.rglob("*") if path.is_file()]
    assert all(parts[0] in ("manifests", "models") and not parts[1].startswith(".") for parts in left), left


class Bomb:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def model(**fields: Any) -> Callable[[Case], None]:
    return lambda case: case.raw["model"].update(fields)


def dataset(role: str, /, **fields: Any) -> Callable[[Case], None]:
    return lambda case: case.dataset(role).update(fields)


def detector(entry: Any) -> Callable[[Case], None]:
    return lambda case: case.raw["detectors"].append(entry)


def empty_folder(case: Case) -> None:
    (case.folder / "empty").mkdir()
    case.dataset("far_ood").update(format="imagefolder", path="empty", images=None)


def folder_with_two_classes(case: Case) -> None:
    for name in ("cat", "dog"):
        (case.folder / "animals" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(case.folder / "animals" / name / "1.png")
    case.dataset("id").update(format="imagefolder", path="animals", images=None, labels=None)


def other_weights(case: Case) -> None:
    save_file({"4.weight": torch.ones(3, 4)}, case.folder / "w.safetensors")
    case.raw["model"]["weights"] = "w.safetensors"


def weights_with_code(case: Case) -> None:
    torch.save({"4.weight": Bomb(case.folder / "trace")}, case.folder / "w.pt")
    case.raw["model"]["weights"] = "w.pt"


def workspace_below_a_file(case: Case) -> None:
    (case.folder / "workspace").write_text("a file")
    case.raw["workspace"] = str(case.folder / "workspace" / "below")


def two_training_sets(case: Case) -> None:
    case.raw["datasets"].append(case.dataset("train") | {"name": "more"})


def held_out(**fields: Any) -> Callable[[Case], None]:
    """TempScale, and images to calibrate it on."""

    def spoil(case: Case) -> None:
        case.raw["datasets"].append(case.dataset("id") | {"name": "held_out", "role": "id_val"} | fields)
        case.raw["detectors"] = ["tempscale"]

    return spoil


def torchvision(**fields: Any) -> Callable[[Case], None]:
    return model(**{"source": "torchvision", "name": "resnet18", "transform": "auto"} | fields)


MISTAKES = {
    "missing data": (
        dataset("far_ood", path="nowhere.npz"),
        r"datasets\.far\.path: no such file: .*nowhere\.npz",
    ),
    "missing folder": (
        dataset("far_ood", format="imagefolder", path="nowhere"),
        r"datasets\.far\.path: no such folder: .*nowhere",
    ),
    "empty folder": (empty_folder, r"datasets\.far\.path: no images in .*empty\. Check the path"),
    "label outside the head": (
        dataset("id", labels="odd"),
        r"datasets\.test: label 5 is outside the head's classes 0\.\.2\. Check that labels and model belong",
    ),
    "class without training rows": (
        lambda case: (dataset("train", labels="part")(case), case.raw["detectors"].append("mds")),
        r"datasets\.train: 1 of the head's 3 classes have no images \(2\)\..*add the missing ones",
    ),
    "class without a folder": (
        folder_with_two_classes,
        r"datasets\.test: 1 of the head's 3 classes have no images \(2\)\. Class folders are numbered",
    ),
    "no labels": (dataset("id", labels=None), r"datasets\.test: role 'id' needs a label .*Name the labels"),
    "unknown detector": (
        detector("grodo"),
        r"detectors\.grodo: unknown detector 'grodo'\. Did you mean 'grood'",
    ),
    "unknown head": (model(head="5"), r"model\.head: unknown layer '5'\..*Known: 0, 0\.conv"),
    "unknown block": (
        model(blocks=["0.con"]),
        r"model\.blocks: unknown layer '0\.con'\. Did you mean '0\.conv'",
    ),
    "unknown block of a detector": (
        detector({"featurenorm": {"block": "00"}}),
        r"detectors\.featurenorm\.block: unknown block '00'\. Did you mean '0'\? Known: 0, 1\.",
    ),
    "unknown layer of a detector": (
        detector({"grood": {"mixup_layer": "1.cnv"}}),
        r"detectors\.grood: unknown layer '1\.cnv'\. Did you mean '1\.conv'",
    ),
    "unknown format": (
        dataset("far_ood", format="npy"),
        r"datasets\.far\.format: unknown format .*mean 'npz'",
    ),
    "unknown role": (
        dataset("far_ood", role="ood"),
        r"datasets\.far\.role: Input should be 'train'.*, got 'ood'",
    ),
    "unknown torchvision model": (
        torchvision(name="resnet17"),
        r"model\.name: unknown torchvision model 'resnet17'\. Did you mean 'resnet1",
    ),
    "unknown preset": (
        torchvision(transform="V1"),
        r"model\.transform: unknown preset 'V1'\..* Known: .*IMAGENET1K_V1",
    ),
    "weights that do not fit": (
        other_weights,
        r"model\.weights: .*w\.safetensors does not fit the model: 5 entries missing \(.*0 unexpected",
    ),
    "weights with code": (
        weights_with_code,
        r"model\.weights: .*w\.pt is not a file of tensors alone, and nothing in it was run\. Save",
    ),
    "no linear end": (
        model(name="./net.py:softmax"),
        r"model\.head: '0\.4' applied to its input differs .* name the true last one",
    ),
    "unwritable workspace": (
        workspace_below_a_file,
        r"workspace: cannot write to .*below: Not a directory\. Choose another folder",
    ),
    "workspace that holds no database": (
        lambda case: case.raw.update(workspace="s3://bucket/x"),
        r"tracking\.uri: not set, and s3://bucket/x cannot hold MLflow's database\. Name a server",
    ),
    "no ID data": (lambda case: case.without("id"), r"datasets: none has role 'id'; add the ID test images"),
    "two training sets": (two_training_sets, r"datasets: several have role 'train'; expected at most one"),
    "no training data": (
        lambda case: (case.without("train"), case.raw["detectors"].append("knn")),
        r"detectors\.knn: it learns from training images, but no dataset has role 'train'\. Add one",
    ),
    "no data to calibrate on": (
        lambda case: (case.without("train"), case.raw.update(detectors=["klmatching"])),
        r"detectors\.klmatching: it is calibrated on held-out ID images, .*'id_val' or 'train'\. Add one",
    ),
    "held-out images without labels": (
        held_out(labels=None),
        r"detectors\.tempscale: it is calibrated on labels, but 30 of 30 images of held_out .* none\. Name",
    ),
    "held-out images of other classes": (
        held_out(labels="odd"),
        r"datasets\.held_out: label 5 is outside the head's classes 0\.\.2\.",
    ),
    "no OOD validation data": (
        detector({"grood": {"prototype": "ood_val"}}),
        r"detectors\.grood: it uses OOD validation images, but no dataset has role 'ood_val'\. Add one",
    ),
    "more neighbours than rows": (
        detector({"knn": {"k": 31}}),
        r"detectors\.knn\.k is 31 but there are 30 training images; lower k",
    ),
    "more directions than dimensions": (
        detector({"neco": {"dim": 5}}),
        r"detectors\.neco: dim is 5 but the feature has 4 dimensions; lower dim",
    ),
    "more tiles than pixels": (
        detector({"featurenorm": {"grid": 9}}),
        r"detectors\.featurenorm\.grid is 9 but images have 8 pixels per side; lower grid",
    ),
}


def test_a_good_evaluation_is_shown_and_not_started(case, command):
    case.raw["detectors"] += [{"knn": {"k": 30}}, {"featurenorm": {"grid": 8}}, "grood"]
    outcome = command("validate", "--no-probe", case.config())
    assert (outcome.status, outcome.err) == (0, "")
    assert re.search(r"net\.py:build: 3 classes, feature 4", outcome.out)
    assert re.search(r"train +│ train +│ 30 +│ 3 classes of 10 to 10 ███ +│ no", outcome.out)
    assert "forward   90 images" in outcome.out
    assert_nothing_looks_complete(case.workspace)


def test_columns_that_are_missing_of_cached_features_are_named(case, command):
    assert command("extract", "--engine", "inline", "-q", case.config()).status == 0
    case.raw["detectors"].append("odin")
    outcome = command("validate", "--no-probe", case.config())
    assert re.search(r"train +│ train +│ 30 +│ .* │ yes +│", outcome.out)
    assert re.search(r"test +│ id +│ 30 +│ .* │ yes, no perturbed", outcome.out)


def test_files_that_are_left_out_are_told_before_a_run(case, command):
    folder = case.folder / "photos"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    (folder / "b.heic").touch()
    case.dataset("far_ood").update(format="imagefolder", path=str(folder))
    case.dataset("far_ood").pop("images", None)
    outcome = command("validate", "--no-probe", case.config())
    assert (outcome.status, outcome.err) == (0, "")
    assert "note      far: 1 of 2 files not read: .heic 1 (first: b.heic)\n" in outcome.out


def test_of_all_detectors_those_that_do_not_apply_are_shown_with_the_reason(case, command):
    case.raw["detectors"] = "all"
    outcome = command("run", "--dry-run", case.config())
    assert (outcome.status, outcome.err) == (0, "")
    reason = re.escape("k is 50 but there are 30 training images; lower k.")
    assert re.search(rf"^left out knn: {reason}$", outcome.out, re.MULTILINE)
    assert re.search(r"^detector  msp +MSP", outcome.out, re.MULTILINE)
    assert not re.search(r"^detector  knn", outcome.out, re.MULTILINE)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_status_2_and_one_message_that_names_field_and_fix(case, command, mistake):
    spoil, expected = MISTAKES[mistake]
    spoil(case)
    outcome = command("validate", "-q", "--no-probe", case.config())
    assert outcome.status == 2
    assert re.match(f"error: (.*small.yaml: )?{expected}", outcome.err), outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""
    assert_nothing_looks_complete(case.workspace)
    assert not (case.folder / "trace").exists()


@pytest.mark.parametrize("arguments", [["run"], ["run", "--dry-run"], ["extract"], ["report"]])
def test_every_command_checks_before_it_works(case, command, arguments):
    case.dataset("far_ood")["path"] = "nowhere.npz"
    outcome = command(*arguments, case.config())
    assert outcome.status == 2
    assert outcome.err.startswith("error: datasets.far.path: no such file")
    assert_nothing_looks_complete(case.workspace)


def test_a_run_as_json_is_one_document_with_the_values_of_its_files(case, command, undrawn):
    case.raw["tracking"] = {"enabled": False}
    outcome = command("run", case.config(), "--engine", "inline", "--json", "--quiet")
    found = json.loads(outcome.out)
    assert outcome.status == 0
    assert "extract" not in outcome.err
    assert found["results"] in outcome.err
    metrics = json.loads(Path(found["results"], "metrics.json").read_text())
    assert found["metrics"] == metrics
    assert any("fewer than 50" in text for text in found["warnings"])
    again = command("report", case.config(), "--json")
    assert json.loads(again.out)["metrics"] == metrics
    assert re.search(r"^report +\d", again.err, re.MULTILINE)
    quiet = command("report", case.config(), "--quiet")
    assert not re.search(r"^report +\d", quiet.out, re.MULTILINE)
    assert f"results  {found['results']}\n" in quiet.out


def test_a_config_that_is_not_there_lists_the_bundled_ones(command):
    outcome = command("validate", "quikstart")
    assert outcome.status == 2
    assert outcome.err.startswith("error: quikstart: no such config file.")
    assert "quickstart" in outcome.err


def test_the_quickstart_is_valid(command, tmp_path):
    outcome = command(
        *("validate", "--no-probe", "quickstart", "--workspace", str(tmp_path / "w")),
        *("--set", "detectors.knn.k=9"),
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert "taps      head fc; blocks layer1.0, layer2.0, layer3.0, layer4.0" in outcome.out
    assert "uses OOD data" not in outcome.out
    assert_nothing_looks_complete(tmp_path / "w")


def test_a_detector_that_uses_ood_data_is_marked(case, command):
    case.raw["datasets"].append(case.dataset("far_ood") | {"name": "val", "role": "ood_val"})
    case.raw["detectors"].append({"grood": {"prototype": "ood_val"}})
    outcome = command("run", case.config(), "--dry-run")
    assert [line.endswith("uses OOD data") for line in outcome.out.splitlines()[-2:]] == [False, True]


def test_a_detector_that_was_tuned_on_ood_data_is_marked(case, command):
    case.raw["detectors"].append({"knn": {"k": 3, "tuned_on_ood": True}})
    outcome = command("run", case.config(), "--dry-run")
    assert [line.endswith("uses OOD data") for line in outcome.out.splitlines()[-2:]] == [False, True]


def grids(found: Any) -> Callable[[Case], None]:
    return lambda case: case.raw.update(tune={"grids": found})


def without_ood_val(case: Case) -> None:
    grids({"knn": {"k": [1, 2]}})(case)
    case.without("ood_val")


def output_that_exists(case: Case) -> None:
    grids({"knn": {"k": [1, 2]}})(case)
    (case.folder / "small.tuned.yaml").write_text("mine")


TUNING_MISTAKES = {
    "no grids": (grids({}), r"tune\.grids: none, so there is nothing to choose from\. Add the values"),
    "no OOD validation data": (without_ood_val, r"datasets: none has role 'ood_val', whose OOD images dec"),
    "unknown detector": (
        grids({"kn": {"k": [1]}}),
        r"tune\.grids\.kn: unknown detector 'kn'\. Did you mean 'knn'\? Known: knn, msp",
    ),
    "unknown parameter": (
        grids({"knn": {"kk": [1]}}),
        r"tune\.grids\.knn\.kk: unknown key 'kk'\. Did you mean 'k'",
    ),
    "value out of range": (
        grids({"knn": {"k": [1, 0]}}),
        r"tune\.grids\.knn\.k: Input should be .*, got 0",
    ),
    "more neighbours than rows": (
        grids({"knn": {"k": [1, 31]}}),
        r"detectors\.knn\[k=31\]\.k is 31 but there are 30 training images; lower k",
    ),
    "images that also test": (
        grids({"knn": {"k": [1, 2]}}),
        r"datasets\.held_out: 30 of its images are also in train \(role 'train'\); images that decide must",
    ),
    "output that exists": (
        output_that_exists,
        r"--output: .*small\.tuned\.yaml exists already\. Name another file, or replace it with --force",
    ),
}


@pytest.mark.parametrize("mistake", TUNING_MISTAKES)
def test_a_mistake_in_tuning_has_status_2_and_leaves_nothing(case, command, mistake):
    spoil, expected = TUNING_MISTAKES[mistake]
    case.raw["detectors"] = ["msp", {"knn": {"k": 3}}]
    case.raw["datasets"] += [
        case.dataset("far_ood") | {"name": "held_out", "role": "id_val"},
        case.dataset("far_ood") | {"name": "odd", "role": "ood_val"},
    ]
    spoil(case)
    outcome = command("tune", case.config())
    assert outcome.status == 2
    assert re.match(f"error: (.*small.yaml: )?{expected}", outcome.err), outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert_nothing_looks_complete(case.workspace)
    assert [path.read_text() for path in case.folder.glob("*.tuned.yaml")] in ([], ["mine"])


def test_a_search_as_json_is_its_points_and_files(case, command, monkeypatch):
    point = tune.Point("knn", "knn[k=1]", {"k": 1}, {"odd": 0.5}, 0.5, 0.25, math.nan, True)
    done = tune.Outcome("auroc", (point,), case.workspace / "tune.csv", case.folder / "small.tuned.yaml")
    monkeypatch.setattr(tune, "execute", lambda *_: done)
    outcome = command("tune", case.config(), "--json")
    found = json.loads(outcome.out)
    assert (found["config"], found["table"]) == (str(done.config), str(done.table))
    assert [(each["point"], each["mean"], each["ci_high"]) for each in found["points"]] == [
        ("knn[k=1]", 0.5, None)
    ]
    assert str(done.config) in outcome.err


@pytest.mark.parametrize("name", ["a: b #1", "null", "[red]x", "123"])
def test_the_workspace_of_the_command_line_is_taken_as_it_is(case, command, monkeypatch, name):
    monkeypatch.chdir(case.folder)
    assert command("validate", "--no-probe", case.config(), "--workspace", name).status == 0
    assert (case.folder / name / "manifests").is_dir()
    assert not case.workspace.exists()


def test_a_data_set_that_is_mended_is_accepted_in_the_same_workspace(case, command):
    case.dataset("id")["labels"] = "odd"
    assert command("validate", "--no-probe", case.config()).status == 2
    case.dataset("id")["labels"] = "y"
    assert command("validate", "--no-probe", case.config()).status == 0


def listed(outcome: Outcome) -> dict[str, list[str]]:
    """Cells of the table of detectors, by name."""
    lines = [line for line in outcome.out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {name: cells for name, *cells in rows}


DETECTOR_COLUMNS = ("method", "year", "paper", "needs", "cost", "applies")


def test_the_detectors_are_listed_with_what_they_need(command):
    outcome = command("detectors")
    assert outcome.status == 0
    table = listed(outcome)
    assert list(table) == [*detectors.names(), *detectors.combining()]
    for name, (method, year, paper, needs, cost) in table.items():
        detector = detectors.get(name)()
        assert f"{method} ({year})" == detector.title
        assert paper.partition(", ")[0].removesuffix(" et al.") in detector.paper
        assert detector.paper.endswith(paper.partition(", ")[2])
        trains = [
            need for need in needs.split(", ") if need.startswith(("training", "held-out", "index", "extra"))
        ]
        assert bool(trains) == (detector.needs_train() or detector.calibrates())
        costly = [extra for extra in detector.extras() if not extra.tapped]
        assert (cost == "cheap") == (not detector.neighbours and not detector.passes() and not costly)
    assert table["msp"][2:] == ["Hendrycks et al., ICLR 2017, arXiv:1610.02136", "logits", "cheap"]
    assert table["featurenorm"][3:] == ["feature maps (block norms), extra pass (jigsaw)", "pass"]
    assert table["knn"][3:] == ["features, index", "index"]
    assert table["odin"][3:] == ["input gradient", "3 passes per image"]
    assert table["mahalanobis_ensemble"][3:] == ["feature maps (pooled), training statistics", "cheap"]
    assert table["grood"][3:] == ["features, training statistics, index, extra pass (mixup)", "index + pass"]


def test_the_list_tells_what_applies_to_a_config_and_why_not(case, command):
    (case.folder / "own.py").write_text(
        "from pipeline.detectors.knn import Knn\nclass Own(Knn):\n    title = 'Own (2026)'\n"
    )
    case.raw["model"]["blocks"] = []
    case.raw["detectors"] = [
        {"grood": {"prototype": "ood_val"}},
        {"far": {"method": "grood", "mixup_layer": "1.cnv"}},
        {"own": {"method": "./own.py:Own"}},
        {"both": {"method": "msp", "steps": ["react"]}},
    ]
    outcome = command("detectors", "--config", case.config())
    assert outcome.status == 0
    table = listed(outcome)
    assert list(table) == [*detectors.names(), *detectors.combining(), "far", "own", "both"]
    assert {table[name][-1] for name in ("msp", "nnguide", "dice")} == {"yes"}
    for name in ("knn", "own"):
        assert table[name][-1] == "no: k is 50 but there are 30 training images; lower k."
    assert table["both"][:2] == ["ReAct + MSP", "2021 + 2017"]
    assert table["featurenorm"][-1].startswith("no: the model has no block with maps or tokens")
    assert table["far"][-1].startswith("no: unknown layer '1.cnv'. Did you mean '1.conv'")
    assert table["grood"][3:5] == ["features, training statistics, index, OOD data", "index"]
    assert table["ensemble"][-1].startswith("no: members: got 0; expected two detectors of the run or more")
    assert table["grood"][-1].startswith("no: it uses OOD validation images, but no dataset has role")
    case.without("train")
    reason = listed(command("detectors", "--config", case.config()))["dice"][-1]
    assert reason.startswith("no: it learns from training images")


def test_a_detector_of_ones_own_is_explained_like_ours(case, command):
    path = case.folder / "own.py"
    path.write_text("from pipeline.detectors.knn import Knn\nclass Own(Knn):\n    title = 'Own (2026)'\n")
    outcome = command("detectors", f"{path}:Own")
    assert outcome.out.startswith("Own (2026)")
    assert "k = 50" in outcome.out


@pytest.mark.parametrize("name", [*detectors.names(), *detectors.combining()])
def test_a_detector_is_explained_with_formula_paper_and_every_parameter(command, name):
    outcome = command("detectors", name)
    method = detectors.get(name)
    assert outcome.status == 0
    assert method.formula in outcome.out
    assert method.paper in outcome.out
    assert f"How to read it: {method.reading}" in outcome.out
    for key, field in method.model_fields.items():
        assert f"  {key} = {field.default!r}  {field.description}" in outcome.out


def test_detectors_as_json_are_the_rows_of_the_list_and_what_explains_one(case, command):
    found = json.loads(command("detectors", "--json", "--config", case.config()).out)
    table = listed(command("detectors", "--config", case.config()))
    assert {row["name"]: [row[key] for key in DETECTOR_COLUMNS] for row in found} == table
    knn = json.loads(command("detectors", "knn", "--json").out)
    assert knn["parameters"]["k"]["default"] == 50
    assert (knn["formula"], knn["needs"]) == (detectors.get("knn").formula, "features, index")


def test_a_plan_as_json_holds_what_is_shown(case, command):
    outcome = command("validate", case.config(), "--engine", "inline", "--json")
    found = json.loads(outcome.out)
    assert (found["classes"], found["head"], found["blocks"]) == (3, "4", ["0", "1"])
    assert found["datasets"]["train"]["images_per_class"] == {"0": 10, "1": 10, "2": 10}
    assert (found["cost"]["images"], found["probe"]["images"]) == (90, 90)
    assert found["detectors"]["msp"] == {"method": "MSP (2017)", "needs": [], "uses_ood": False}
    assert found["actors"] >= 1
    assert "forward   90 images" in outcome.err
    lines = outcome.err.splitlines()
    assert {"prepare   checks the config, and that the data are there", "probe     loads PyTorch"} <= {*lines}
    quiet = command("validate", case.config(), "--no-probe", "-q", "--json")
    assert (json.loads(quiet.out)["classes"], "prepare" in quiet.err) == (3, False)


def test_an_unknown_detector_is_refused_with_the_closest_one(command):
    outcome = command("detectors", "knnn")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: unknown detector 'knnn'. Did you mean 'knn'?")


def test_the_version_is_that_of_the_package(command):
    assert command("--version").out == f"{__version__}\n"


def test_the_help_lists_every_command(command):
    outcome = command("--help")
    assert outcome.status == 0
    assert all(re.search(rf"\b{name}\b", outcome.out) for name in SUBCOMMANDS)
    assert "ood-pipeline run quickstart" in outcome.out


@pytest.mark.parametrize("name", ["bundle", "verify", "ui", "compare", "fiftyone"])
def test_the_help_says_where_runs_lie(name):
    help_text = CliRunner().invoke(main.app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "<workspace>/runs/<name>" in help_text


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_every_command_has_an_example_that_works(name):
    help_text = CliRunner().invoke(main.app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    (example,) = re.findall(rf"Example: (ood-pipeline {name}[^│\n]*)", help_text)
    group = typer.main.get_command(main.app)
    assert sorted(group.commands) == sorted(SUBCOMMANDS)
    _, subcommand, *arguments = shlex.split(example)
    context = group.commands[subcommand].make_context(subcommand, arguments)
    assert context.params.get("source", "quickstart") == "quickstart"


@contextmanager
def served(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    """Address of a server on this machine."""
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers as an MLflow server does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Stranger(socketserver.BaseRequestHandler):
    """Some other service behind the port."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


def test_the_doctor_finds_this_environment_in_order(command):
    outcome = command("doctor")
    assert (outcome.status, outcome.err) == (0, "")
    assert "bad" not in outcome.out
    assert re.search(rf"ok +torch +{re.escape(version('torch'))}\n", outcome.out)
    assert re.search(r"ok +faiss +faiss-(cpu|gpu) [0-9.]+, \d GPU\n", outcome.out)


def test_the_doctor_asks_the_tracking_server(command):
    with served(Healthy) as uri:
        outcome = command("doctor", "--mlflow", f"{uri}/")
    assert outcome.status == 0
    assert "answers 200" in outcome.out


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "no address", "file:///nowhere"])
def test_the_doctor_has_status_1_if_the_tracking_server_does_not_answer(command, uri):
    outcome = command("doctor", "--mlflow", uri)
    assert outcome.status == 1
    assert re.search(rf"bad +mlflow +{uri} does not answer: .*Start it, or check the URL", outcome.out)


def test_the_doctor_survives_a_server_that_speaks_no_http(command):
    with served(Stranger) as uri:
        outcome = command("doctor", "--mlflow", uri)
    assert outcome.status == 1
    assert "does not answer" in outcome.out


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"faiss-cpu": None}, r"bad +faiss +none\. Install exactly one"),
        (
            {"faiss-gpu": "1.15", "faiss-cpu": "1.14"},
            r"bad +faiss +faiss-cpu 1\.14, faiss-gpu 1\.15\. Install",
        ),
        ({"mlflow": None}, r"bad +mlflow +not installed"),
    ],
)
def test_the_doctor_finds_what_is_missing_or_there_twice(monkeypatch, command, installed, expected):
    def told(name: str) -> str:
        found = installed[name] if name in installed else version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", told)
    outcome = command("doctor")
    assert outcome.status == 1
    assert re.search(expected, outcome.out)


def test_the_installed_command_has_status_2_and_no_traceback_on_a_mistake(tmp_path):
    done = process("validate", "nowhere.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere.yaml: no such config file.")
    assert len(done.stderr.splitlines()) == 1


def test_the_installed_command_has_status_2_on_an_unknown_option(tmp_path):
    done = process("run", "quickstart", "--frehs", folder=tmp_path)
    assert done.returncode == 2
    assert "--frehs" in done.stderr


def test_modules_beside_the_user_are_found_and_their_errors_have_status_1_and_a_traceback(case):
    case.raw["model"]["name"] = "net:broken"
    done = process("validate", case.config(), folder=case.folder)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert_nothing_looks_complete(case.workspace)


def test_a_command_that_is_terminated_leaves_in_order(case):
    case.raw["model"]["name"] = "./net.py:endless"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([COMMAND, "run", "-q", case.config()], cwd=case.folder, **pipes)
    wait("the network to be built", (case.folder / "started").exists)
    running.terminate()
    assert running.communicate(timeout=60) == (b"", b"")
    assert running.returncode == 143


def test_a_command_that_is_interrupted_has_status_130_and_says_how_to_go_on(case):
    case.raw["model"]["name"] = "./net.py:endless"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [
        "env",
        "--default-signal=INT",
        COMMAND,
        "run",
        "-q",
        case.config(),
    ]  # background jobs ignore it
    running = subprocess.Popen(command, cwd=case.folder, **pipes)
    wait("the network to be built", (case.folder / "started").exists)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (out, err.decode()) == (
        b"",
        "interrupted; what was finished is kept, and the same command goes on from there\n",
    )
    assert running.returncode == 130


@pytest.mark.parametrize("working", [True, False])
def test_a_command_that_is_interrupted_again_waits_for_no_thread(monkeypatch, working):
    ended, done = [], threading.Event()
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(inline, "THREADS", "of this test alone")
    thread = threading.Thread(target=done.wait, name=f"{inline.THREADS}_0")
    commands = typer.Typer(cls=Commands)

    @commands.callback()
    def several() -> None: ...

    @commands.command()
    def work() -> None:
        if working:
            thread.start()
        raise KeyboardInterrupt

    try:
        assert CliRunner().invoke(commands, ["work"]).exit_code == 130
    finally:
        done.set()
        if working:
            thread.join()  # the other case must not see it
    assert ended == [130] * working


def test_a_command_that_is_interrupted_imports_nothing_more(monkeypatch):
    monkeypatch.delitem(sys.modules, inline.__name__)
    commands = typer.Typer(cls=Commands)

    @commands.callback(invoke_without_command=True)
    def work() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(commands, []).exit_code == 130
    assert inline.__name__ not in sys.modules


def test_an_evaluation_that_is_under_way_is_refused(case, command):
    name = prepare(loading.load(case.config())).folder.name
    with claims.opened(case.workspace) as ours, ours.alone(f"runs/{case.raw['name']}/{name}"):
        outcome = command("run", case.config())
    assert outcome.status == 2
    assert re.match(
        rf"error: {case.workspace}/runs/.* is being made by process {os.getpid()} .*--wait", outcome.err
    )
    assert len(outcome.err.splitlines()) == 1
    assert not (case.workspace / "runs").exists()
    assert not (case.workspace / "features").exists()


@pytest.mark.parametrize("name", ["", "runs", "runs/small", "runs/small/0123/report", "runs/old"])
def test_what_is_no_run_folder_cannot_be_verified(tmp_path, command, name):
    (tmp_path / "runs" / "small" / "0123" / "report").mkdir(parents=True)
    (tmp_path / "runs" / "old").mkdir()
    for folder in ("small/0123", "old"):
        (tmp_path / "runs" / folder / "config.yaml").touch()
    outcome = command("verify", str(tmp_path / name))
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(
        r"error: .*: no run folder\. Give the path or URI of <workspace>/runs/<name> or one of its ids; "
        r"`ood-pipeline runs` lists them\.\n",
        outcome.err,
    )


def test_a_run_that_never_came_far_has_status_1_and_no_traceback(tmp_path, command):
    (tmp_path / "runs" / "small" / "0123").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "0123" / "config.yaml").touch()
    (tmp_path / "runs" / "small" / "latest").write_text("0123\n")
    outcome = command("verify", "-q", str(tmp_path / "runs" / "small"))
    assert (outcome.status, outcome.err) == (1, "")
    path = r".*/runs/small/0123/manifest\.json"
    assert re.match(rf"bad +manifest\.json +files: {path} is missing\n", outcome.out)
    assert re.search(rf"\nfix  run the evaluation again, which writes {path} anew\n$", outcome.out)
