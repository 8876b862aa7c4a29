"""The commands `runs` and `clean` on a workspace with several runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import quickstart
from pipeline.cli import main
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.stages import prepare
from pipeline.workflows import run
from pipeline.workflows.progress import Quiet
from pipeline.workspace import claims, files, leftovers
from pipeline.workspace.runs import SEARCH

SHIPPED = "package://pipeline.quickstart/resnet.safetensors"


def command(*arguments: str) -> str:
    found = CliRunner().invoke(main.app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert found.exit_code == 0
    return found.stdout


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The workspace with the runs, once it is there."""
    return {}


@pytest.fixture
def runs(
    settings: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    whole: dict[str, Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[Path]]:
    """A copy of a workspace and the folders of three runs: two of one name, and one that did not finish."""
    for entry in settings["datasets"]:
        entry["limit"] = 64 if entry["role"] != "train" else 200
    workspace = tmp_path / "workspace"
    if not whole:
        folders = []
        for name, p, last in (("small", 20, "report"), ("small", 50, "report"), ("other", 50, "extract")):
            settings |= {"name": name, "detectors": ["msp", {"dice": {"p": p}}]}
            settings["model"]["weights"] = SHIPPED if name == "small" else "random"
            folders.append(execute(load(settings), last=last).folder.relative_to(workspace))
        whole |= {"folders": folders, "workspace": tmp_path_factory.mktemp("whole") / "workspace"}
        shutil.copytree(workspace, whole["workspace"])
    else:
        shutil.copytree(whole["workspace"], workspace)
    settings |= {"name": "small", "detectors": ["msp", {"dice": {"p": 50}}]}
    settings["model"]["weights"] = SHIPPED
    return workspace, [workspace / folder for folder in whole["folders"]]


def test_a_changed_config_never_touches_an_earlier_result(
    runs: tuple[Path, list[Path]], settings: dict[str, Any], load: Any, execute: Any
) -> None:
    _, (first, second, _) = runs
    assert first.parent == second.parent != first
    assert (first.parent / "latest").read_text().strip() == second.name
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    settings["detectors"] = ["msp", {"dice": {"p": 20}}]
    execute(load(settings), first="report")
    after = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= set((first / "report").iterdir())
    folder = execute(load(settings), fresh=True).folder
    assert folder.name == f"{first.name}-2"
    assert {path: path.read_bytes() for path in before} == {**before, **{p: after[p] for p in before}}
    assert (folder / "metrics.json").read_bytes() == (first / "metrics.json").read_bytes()


def test_runs_are_listed_with_their_best_detectors_and_states(runs: tuple[Path, list[Path]]) -> None:
    workspace, folders = runs
    (folders[0] / "manifest.json").write_text("{")
    found = command("runs", "--workspace", str(workspace))
    lines = {folder.name: line for folder in folders for line in found.splitlines() if folder.name in line}
    assert re.search(r"small +\w+ +unreadable", lines[folders[0].name])
    assert re.search(
        r"small +\w+ +finished +20\d\d-.* 4 +2 +(msp|dice) 0\.\d{4} +(msp|dice) 0\.\d{4}",
        lines[folders[1].name],
    )
    assert re.search(r"other +\w+ +partial +20\d\d-", lines[folders[2].name])


def test_only_what_no_run_refers_to_is_deleted(
    runs: tuple[Path, list[Path]], settings: dict[str, Any], load: Any, execute: Any
) -> None:
    workspace, folders = runs
    kept = {path for path in workspace.rglob("*") if path.is_file()}
    nothing = command("clean", "--workspace", str(workspace))
    assert nothing == "nothing to delete\n"
    shutil.rmtree(folders[0])
    shutil.rmtree(folders[2])
    lost = workspace / "manifests" / "lost-0123"
    lost.mkdir()
    (lost / "rows.parquet").write_bytes(b"of a run that is still checking its config")
    listed = command("clean", "--workspace", str(workspace))
    assert "manifests/" not in listed
    os.utime(lost / "rows.parquet", times=(0, time.time() - leftovers.YOUNG - 1))
    assert "manifests/lost-0123" in command("clean", "--workspace", str(workspace))
    assert "--delete deletes them" in listed
    names = set(re.findall(r"MiB +((?:fits|scores|features)/\S+)", listed))
    assert {name.partition("/")[0] for name in names} == {"fits", "scores", "features"}
    assert {path for path in workspace.rglob("*") if path.is_file()} >= {
        p for p in kept if folders[1] in p.parents
    }
    command("clean", "--workspace", str(workspace), "--delete")
    assert not any((workspace / name).exists() for name in names)
    before = {path: path.read_bytes() for path in folders[1].glob("metrics.*")}
    again = execute(load(settings)).folder
    assert again == folders[1]
    record = files.read_json(again / "manifest.json")
    assert record["executions"][-1]["stages"]["extract"]["forward_images"] == 0
    assert {path: path.read_bytes() for path in before} == before


def test_what_older_versions_left_is_named_by_a_run_and_deleted_by_clean(
    runs: tuple[Path, list[Path]], settings: dict[str, Any], load: Any
) -> None:
    workspace, (_, second, _) = runs
    old = (
        workspace / "runs" / "ancient" / "manifest.json",
        workspace / "features" / "a-0123" / "_manifest.json",
    )
    for path in old:
        path.parent.mkdir()
        path.write_text('{"hash": "0123"}')
    said: list[str] = []
    display = Quiet()
    display.say = said.append  # type: ignore[method-assign]
    run.execute(
        load(settings), run.Options(first="report", publish="never", engine="inline", threads=1), display
    )
    (line,) = said
    assert line.startswith("runs/ancient and 1 more folders (0.0 MiB) are of versions before 0.3")
    command("clean", "--workspace", str(workspace), "--delete")
    assert not any(path.parent.exists() for path in old)
    assert (second / "manifest.json").is_file()


def test_a_workspace_that_is_not_there_or_in_use_is_refused(tmp_path: Path) -> None:
    runner = CliRunner()
    for name in ("runs", "clean"):
        found = runner.invoke(main.app, [name, "--workspace", str(tmp_path / "no")])
        assert isinstance(found.exception, UserError)
        assert "no such folder" in str(found.exception)
    with claims.opened(tmp_path) as ours, ours.alone("runs/a/0123"):
        found = runner.invoke(main.app, ["clean", "--workspace", str(tmp_path)])
    assert isinstance(found.exception, UserError)
    assert "in use" in str(found.exception)


def test_the_example_of_compare_runs_and_two_parameters_are_two_columns(
    runs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, folders = runs
    help_text = (
        CliRunner().invoke(main.app, ["compare", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    )
    (example,) = re.findall(r"Example: ood-pipeline (compare [^│\n]*)", help_text)
    one = command(*shlex.split(example.replace("./workspace/runs/quickstart", str(folders[0]))))
    assert "### Near-OOD: AUROC ↑" in one
    assert "### ID, test: AURC ↓" in one
    out = tmp_path / "out.csv"
    assert command("compare", *map(str, folders[:2]), "--format", "csv", "--out", str(out)) == ""
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["column"] for row in rows} == {f"small/{folder.name}" for folder in folders[:2]}
    levels = [row["level"] for row in rows if row["detector"] == "msp"]
    assert "True" in levels  # the same scores
    assert "False" not in levels
    table = command("compare", *map(str, folders[:2]))
    assert all(f"{float(row['value']):.4f}" in table for row in rows)


def test_all_that_a_shell_finds_below_a_name_is_compared_each_run_once(
    runs: tuple[Path, list[Path]],
) -> None:
    _, (first, second, _) = runs
    search = first.parent / "0123456789ab"
    search.mkdir()
    (search / SEARCH).write_text("{}")
    found = sorted(map(str, first.parent.glob("*")))
    assert found == sorted(map(str, [first, second, search, first.parent / "latest"]))
    columns = json.loads(command("compare", *found, str(second), "--json"))["cells"]
    assert {(cell["column"], cell["runs"]) for cell in columns} == {
        (f"small/{folder.name}", 1) for folder in (first, second)
    }


def test_runs_on_other_data_are_compared_only_if_asked(
    runs: tuple[Path, list[Path]], load, execute, settings
):
    _, (first, *_) = runs
    settings |= {"name": "fewer", "datasets": settings["datasets"][:-1]}
    fewer = str(execute(load(settings)).folder)
    with pytest.raises(UserError, match=r"fewer: other datasets than in the first run \(textures\)"):
        command("compare", str(first), fewer)
    assert "no rank and no test" in command("compare", str(first), fewer, "--other-data")
    found = json.loads(command("compare", str(first), "--json"))
    assert {cell["detector"] for cell in found["cells"]} == {"msp", "dice"}
    with pytest.raises(UserError, match="--format openood: has its own metrics"):
        command("compare", str(first), "--format", "openood", "--metric", "aurc")
    assert command("compare", str(first), "--format", "openood").startswith("Training,Postprocessor,Near")


def test_repeats_share_features_and_are_summarised(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, check = [], prepare._check_roles
    monkeypatch.setattr(prepare, "_check_roles", lambda given: [prepared.append(given.seed), check(given)])
    settings["datasets"] = [entry for entry in settings["datasets"] if entry["role"] != "train"]
    settings["detectors"] = ["msp"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    run = ("run", str(path), "--workspace", str(tmp_path / "workspace"), "--engine", "inline")
    output = command(*run, "--seeds", "0,1")
    assert "small (2 runs)" in output
    assert prepared == [0, 1]  # each once
    assert "Near-OOD: AUROC" in output
    assert "±" in output
    records = [
        files.read_json(found) for found in (tmp_path / "workspace").glob("runs/small/*/manifest.json")
    ]
    assert sorted(record["seed"] for record in records) == [0, 1]
    assert sorted(record["stages"]["extract"]["forward_images"] for record in records) == [0, 580]
    assert sorted(record["stages"]["score"]["scores"] for record in records) == [0, 580]
    for wrong in ("0,0", "1,01", "0,x"):
        with pytest.raises(UserError, match="--seeds"):
            command(*run, "--seeds", wrong)
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes((Path(quickstart.__file__).parent / "resnet.safetensors").read_bytes())
    before = sorted((tmp_path / "workspace" / "runs" / "small").iterdir())
    for other, message in (
        (str(copied), "have the same content"),
        (str(tmp_path / "no"), str(tmp_path / "no")),
    ):
        with pytest.raises(UserError, match=message):
            command(*run, "--set", "seed=7", "--weights", SHIPPED, "--weights", other)
    assert sorted((tmp_path / "workspace" / "runs" / "small").iterdir()) == before
