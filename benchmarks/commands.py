"""`ood-pipeline` as a user runs it: another process, a fresh Ray, a config file, a workspace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from memory import Watch

from pipeline.workspace import files
from pipeline.workspace.runs import located

PROGRAM = (sys.executable, "-m", "pipeline.cli")
ON_RAY = ("--engine", "ray")
NOT_INHERITED = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")
"""Of the environment: the cluster is a fresh one, and code is compiled once, as it is for a user."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    seconds: float
    prepare: float
    """Seconds of the checks before the first stage: opening the data, loading the model."""
    record: dict[str, Any]
    """`manifest.json` of the run."""
    peaks: dict[str, tuple[int, int]]
    """Memory by kind of process, if it was watched."""

    @property
    def stages(self) -> dict[str, dict[str, float]]:
        """Numbers of each stage in this command, whatever earlier ones did."""
        found: dict[str, dict[str, float]] = self.record["executions"][-1]["stages"]
        return found


def run(
    command: str,
    settings: dict[str, Any],
    folder: Path,
    watch: float | None = None,
    options: Sequence[str] = ON_RAY,
) -> Done:
    """Run a command with its workspace in `folder`; a second call there finds what the first left.

    Args:
        command: name of the command.
        settings: the config.
        folder: where config, workspace and log lie.
        watch: seconds between two samples of memory; None takes none.
        options: more of the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = [command, "config.yaml", "--workspace", str(folder / "workspace"), *options]
    seconds, said, peaks = called(arguments, folder, watch)
    prepare = re.search(r"^prepare +([\d.]+) s", said, re.MULTILINE)
    assert prepare is not None
    record = located(str(folder / "workspace" / "runs" / settings["name"])) / "manifest.json"
    return Done(seconds, float(prepare[1]), files.read_json(record), peaks)


def estimated(settings: dict[str, Any], folder: Path, options: Sequence[str] = ON_RAY) -> float:
    """Seconds that a run of a config in an empty folder will take, as `validate` says before it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = ["validate", "config.yaml", "--workspace", str(folder / "workspace"), *options]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    told = subprocess.run(
        [*PROGRAM, *arguments, "-q", "--json"], cwd=folder, env=environment, capture_output=True, check=True
    )
    seconds: dict[str, float] = json.loads(told.stdout)["seconds"]
    return sum(seconds.values())


def called(
    arguments: Sequence[str], folder: Path, watch: float | None = None
) -> tuple[float, str, dict[str, tuple[int, int]]]:
    """Seconds of a command in a folder, what it printed, and peaks of memory if they are watched."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    log = folder / "log.txt"
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=stream, stderr=stream, cwd=folder, env=environment
        )
        try:
            peaks = _watched(process, watch) if watch else {}
            status = process.wait()
        finally:
            process.terminate()
    seconds, said = time.perf_counter() - started, log.read_text()
    if status:
        raise SystemExit(f"ood-pipeline {arguments[0]} failed:\n{said[-2000:]}")
    return seconds, said, peaks


def _watched(process: subprocess.Popen[bytes], period: float) -> dict[str, tuple[int, int]]:
    with Watch(process.pid, period) as watch:
        process.wait()
    return watch.peaks
