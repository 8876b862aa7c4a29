"""Several runs in one workspace at the same time: real processes, on the disk and in an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.schema import Config
from pipeline.stages.prepare import prepare
from pipeline.workspace import claims, files, runs
from pipeline.workspace.files import Place

RUN = """
from pipeline.cli.main import main
from pipeline.results.report import plots
for name in ("histograms", "roc"):  # drawing takes most of the time of a small run
    setattr(plots, name, lambda *_: bytes(16) + (2).to_bytes(4, "big"))
main()
"""


def started(path: Path, workspace: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, "run", str(path), "--workspace", workspace]
    return subprocess.Popen(
        [*command, "--engine", "inline", "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(raw: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def forwarded(folder: Place) -> int:
    record = files.read_json(folder / "manifest.json")
    return sum(int(each["stages"]["extract"]["forward_images"]) for each in record["executions"])


@pytest.fixture
def raw(settings: dict[str, Any]) -> dict[str, Any]:
    for entry in settings["datasets"]:
        entry["limit"] = 64 if entry["role"] != "train" else 300
    settings["extract"]["shard_rows"] = 64
    settings["tracking"] = {"enabled": False}
    return settings


@pytest.fixture(params=["folder", pytest.param("object store", marks=pytest.mark.slow)])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "shared")
    return str(files.at(request.getfixturevalue("bucket")) / "shared")


def test_two_runs_share_what_both_need_and_each_has_its_results(
    raw: dict[str, Any],
    workspace: str,
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
) -> None:
    chosen = {"one": ["msp", {"knn": {"k": 5}}], "two": [{"knn": {"k": 9}}, "dice"]}
    processes, alone = {}, {}
    for name, detectors in chosen.items():
        config = {**raw, "name": name, "detectors": detectors}
        processes[name] = started(written(config, tmp_path / f"{name}.yaml"), workspace)
        alone[name] = config
    said = {name: process.communicate(timeout=60) for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == {"one": 0, "two": 0}, said
    folders = {name: runs.located(str(files.at(workspace) / "runs" / name)) for name in chosen}
    assert sum(map(forwarded, folders.values())) == 300 + 3 * 64
    for name, config in alone.items():
        expected = execute(load(config, f"alone-{name}")).folder
        assert (folders[name] / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    if isinstance(files.at(workspace), Path):
        kinds = [files.read_json(path / "_manifest.json")["kind"] for path in Path(workspace).glob("fits/*")]
        assert kinds.count("bank 1") == 1


def test_a_second_run_of_the_same_evaluation_is_refused_or_waits(
    raw: dict[str, Any], workspace: str, tmp_path: Path, load: Callable[..., Config]
) -> None:
    path = written(raw, tmp_path / "small.yaml")
    ready = prepare(load(raw, workspace))
    with claims.opened(files.at(workspace)) as ours:
        with ours.alone(f"runs/small/{ready.folder.name}"):
            waiting, refused = started(path, workspace, "--wait"), started(path, workspace)
            out, error = refused.communicate(timeout=60)
            assert refused.returncode == 2, out
            assert f"is being made by process {os.getpid()} on " in error
            assert "--wait" in error
            assert waiting.poll() is None
        out, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, error
    assert f"waiting for process {os.getpid()} on " in out
    assert (ready.folder / "metrics.json").is_file()
