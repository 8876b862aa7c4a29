"""Several runs in one workspace at the same time: real processes, on the disk and in an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.schema import Config
from pipeline.workspace import claims, files, runs
from pipeline.workspace.files import Place
from tests.conftest import new_bucket, small

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


def forwarded(folder: Place) -> int:
    record = files.read_json(folder / "manifest.json")
    return sum(int(each["stages"]["extract"]["forward_images"]) for each in record["executions"])


DETECTORS: dict[str, list[Any]] = {"one": ["msp", {"knn": {"k": 5}}], "two": [{"knn": {"k": 9}}, "dice"]}


@dataclass(frozen=True)
class Shared:
    """A workspace, in which two evaluations were made by two processes at the same time."""

    workspace: str
    raw: dict[str, dict[str, Any]]
    """By name, like the others."""
    configs: dict[str, Path]
    said: dict[str, tuple[int, str]]
    """Exit status, and what went to the error stream."""


@pytest.fixture(scope="module", params=["folder", pytest.param("object store", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    workspace = str(folder / "workspace")
    if request.param == "object store":
        workspace = str(files.at(new_bucket(request.getfixturevalue("endpoint"))) / "shared")
    settings = small(images)
    for entry in settings["datasets"]:
        entry["limit"] = 64 if entry["role"] != "train" else 300
    settings["extract"]["shard_rows"] = 64
    raw = {name: {**settings, "name": name, "detectors": chosen} for name, chosen in DETECTORS.items()}
    configs = {name: folder / f"{name}.yaml" for name in raw}
    processes = {}
    for name, path in configs.items():
        path.write_text(yaml.safe_dump(raw[name]))
        processes[name] = started(path, workspace)
    ended = {name: process.communicate(timeout=120) for name, process in processes.items()}
    said = {name: (processes[name].returncode, error) for name, (_, error) in ended.items()}
    return Shared(workspace, raw, configs, said)


def test_two_runs_share_what_both_need_and_each_has_its_results(
    shared: Shared, load: Callable[..., Config], execute: Callable[..., Any]
) -> None:
    assert {name: status for name, (status, _) in shared.said.items()} == {"one": 0, "two": 0}, shared.said
    folders = {name: runs.located(str(files.at(shared.workspace) / "runs" / name)) for name in DETECTORS}
    assert sum(map(forwarded, folders.values())) == 300 + 3 * 64
    for name, raw in shared.raw.items():
        expected = execute(load(raw, "alone")).folder
        assert (folders[name] / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    if isinstance(place := files.at(shared.workspace), Path):
        kinds = [files.read_json(path / "_manifest.json")["kind"] for path in place.glob("fits/*")]
        assert kinds.count("bank 1") == 1


def test_a_second_run_of_the_same_evaluation_is_refused_or_waits(shared: Shared) -> None:
    path, place = shared.configs["one"], files.at(shared.workspace)
    run = runs.located(str(place / "runs" / "one"))
    before = len(files.read_json(run / "manifest.json")["executions"])
    with claims.opened(place) as ours:
        with ours.alone(f"runs/one/{run.name}"):
            waiting, refused = started(path, shared.workspace, "--wait"), started(path, shared.workspace)
            out, error = refused.communicate(timeout=60)
            assert refused.returncode == 2, out
            assert f"is being made by process {os.getpid()} on " in error
            assert "--wait" in error
            assert waiting.stdout is not None
            said = next(line for line in waiting.stdout if "waiting for" in line)  # it is as far as that
            assert f"waiting for process {os.getpid()} on " in said
            assert waiting.poll() is None
            assert len(files.read_json(run / "manifest.json")["executions"]) == before
        out, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, (out, error)
    assert len(files.read_json(run / "manifest.json")["executions"]) == before + 1
